"""This room says what the rows of a dataset hold."""
