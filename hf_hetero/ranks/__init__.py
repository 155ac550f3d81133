"""This room holds the process groups of a run, and what its ranks tell each other outside the model."""
