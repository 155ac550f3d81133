"""What is refused because it could not be trained exactly, and why."""
