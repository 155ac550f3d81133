"""Attention across a group of ranks: context, kernels, exchanges, and the function that transformers calls."""
