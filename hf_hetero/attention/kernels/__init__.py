"""Attention on one device: what a kernel is given and gives back, the kernels, and the choice between them."""

from hf_hetero.attention.kernels.choice import choose_kernel

__all__ = ["choose_kernel"]
