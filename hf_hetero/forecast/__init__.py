"""This folder estimates a run on GPUs that one does not have."""
