"""This folder fits a user's model for planned steps, and watches it: loss, head, recompute, offload, experts, time."""
