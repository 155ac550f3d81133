"""This room makes a cost model without a measurement."""
