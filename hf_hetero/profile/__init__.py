"""This room measures a cost model."""
