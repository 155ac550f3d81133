"""This room learns classes and numbers: of whole sequences, or of each token."""
