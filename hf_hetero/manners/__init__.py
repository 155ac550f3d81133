"""Models that do not go the way of most: a loss of their own, or samples that no ranks can share."""
