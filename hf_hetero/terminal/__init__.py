"""What a command says: described once, drawn in a terminal, plain lines elsewhere."""
