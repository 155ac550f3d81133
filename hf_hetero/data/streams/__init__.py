"""Of data that can only be iterated: read ahead by one rank, and dealt out to those who need it."""
