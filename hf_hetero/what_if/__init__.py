"""Other ways to share the same batches, and lengths to try them on. No torch, no GPU, no model."""
