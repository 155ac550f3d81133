"""Means that a trainer keeps of its calls, one value a micro-batch, become means over tokens.

TRL's trainers do: `compute_loss` appends a mean over all ranks to `_metrics[mode][name]`, and `log` takes the plain
mean of what has come together. That would depend on how a plan cuts a step. Weighted by the target tokens of each
micro-batch it does not: it is the mean over the tokens of all steps since the last log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

COUNTED = ("_metrics", "_total_train_tokens", "_means")
"""Attributes of a trainer, TRL's or this package's, in which its `compute_loss` keeps what it counts."""


class LoggedMeans:
    """`LoggedMeans` hold the target tokens, of all ranks, of the micro-batches that a trainer's values are of.

    Args:
        trainer: whose `_metrics` are `{"train": {name: values}, "eval": {name: values}}`; false where it has none.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._num_targets: dict[str, list[int]] = {"train": [], "eval": []}

    def __bool__(self) -> bool:
        return hasattr(self._trainer, "_metrics")

    def add(self, mode: str, num_targets: Sequence[int]) -> None:
        """Add some micro-batches, of each of which the trainer has kept a value.

        Args:
            mode: train or eval.
            num_targets: of each, over all ranks.
        """
        if self:
            self._num_targets[mode] += num_targets

    def weigh(self, mode: str) -> None:
        """Put the mean over tokens in the place of the values of each name; of other values nothing is known."""
        if not self:
            return
        weights, self._num_targets[mode] = self._num_targets[mode], []
        total = sum(weights)
        metrics: dict[str, list[float]] = self._trainer._metrics[mode]
        for values in metrics.values():
            # one value for each micro-batch, or else they are of something that was not counted here
            if total and len(values) == len(weights) > 1:
                values[:] = [sum(value * weight for value, weight in zip(values, weights, strict=True)) / total]


@contextmanager
def uncounted(trainer: Any) -> Iterator[None]:
    """Have `compute_loss` called meanwhile without a trace in what the trainer logs."""
    before = {name: deepcopy(vars(trainer)[name]) for name in COUNTED if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)
