"""Collators: examples and this rank's share of a plan -> this rank's tensors."""

from hf_hetero.collators.packed import PackedCollator

__all__ = ["PackedCollator"]
