"""Plans for ranks and links that are not alike. `uneven` is the door."""
