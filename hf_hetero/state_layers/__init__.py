"""Layers that carry a state along a sample, instead of looking back at its tokens, are shared among ranks here."""
