"""What somebody adds to a model, and why a plan would change it."""
