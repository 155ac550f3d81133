"""The room of samples: what the rows of a dataset hold."""
