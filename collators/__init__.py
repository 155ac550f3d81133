"""The room of collators, which turn examples and this rank's share of a plan into this rank's tensors."""

from hf_hetero.collators.classes import ClassCollator
from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.pairs import PairCollator
from hf_hetero.collators.texts import TextsCollator

__all__ = ["ClassCollator", "PackedCollator", "PairCollator", "TextsCollator"]
