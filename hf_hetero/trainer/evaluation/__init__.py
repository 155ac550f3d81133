"""This folder evaluates and predicts by planned steps."""
