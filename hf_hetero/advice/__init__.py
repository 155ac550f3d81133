"""The room of advice before a run: what fits, how fast, what to start from, what to change next. All by estimate."""
