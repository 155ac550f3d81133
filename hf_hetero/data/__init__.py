"""This room leads from a dataset to planned steps."""
