"""The room of collators, which turn examples and this rank's share of a plan into this rank's tensors."""

from hf_hetero.collators.classes import ClassCollator
from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.pairs import PairCollator

__all__ = ["ClassCollator", "PackedCollator", "PairCollator"]
