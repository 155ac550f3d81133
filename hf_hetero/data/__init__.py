"""The room of data: from a dataset to planned steps."""
