"""What is done to a user's model for planned steps, or watched in it: loss, head, recompute, offload, experts, time."""
