"""The room of ranks: their process groups, and what they tell each other outside the model."""
