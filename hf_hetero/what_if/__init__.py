"""The room of what-ifs: other ways to share the same batches, and lengths to try them on. No torch, GPU or model."""
