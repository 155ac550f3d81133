"""A straggler is a rank that is slower than its plan by more than the others, step after step."""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainingArguments

from hf_hetero.plan import MicroBatch, Plan, StepReport

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
NUM_STEPS = 20
"""Steps that are looked at together: one step may be disturbed on any rank."""
SLOWER = 1.25
"""From so many times the others' ratio of measured to planned seconds on, a rank is named."""


class Stragglers:
    """`Stragglers` compare each rank's measured seconds with those that the cost model charges its groups.

    A cost model may be wrong for all ranks alike, and groups differ, so that neither seconds nor ratios of one rank say
    much; but who has a slower device, or shares it, has a higher ratio than the others whatever is planned. Ranks wait
    for each other inside a group, so that a straggler's companions seem slow in the groups that they share: who was
    measured in others, too, is named only if these say the same.

    Args:
        num_steps: that are looked at together.
        slower: ratio by the median of the other ranks' from which on a rank is named.
    """

    def __init__(self, num_steps: int = NUM_STEPS, slower: float = SLOWER) -> None:
        self._slower = slower
        # plans, with measured and planned seconds of each rank in each micro-batch, (2, micro-batches, ranks)
        self._steps: deque[tuple[Plan, Floats]] = deque(maxlen=num_steps)
        self._numbers: deque[int] = deque(maxlen=num_steps)
        self._before: tuple[str, list[float]] = ("", [])  # which steps were looked at last, and each rank's ratio then
        self._named: tuple[int, ...] = ()
        self._num_since = 0

    def add(self, report: StepReport) -> None:
        """Look at a step. Where all ranks wait for the slowest in each layer, nobody can tell who it is."""
        if report.is_lockstep or not report.planned_s or report.plan.num_ranks < 2:
            return
        planned = np.array(report.planned_s)
        measured = np.where(planned > 0, np.array(report.busy_s), 0.0)  # of what has a price
        self._steps.append((report.plan, np.stack([measured, planned])))
        self._numbers.append(report.step)
        self._num_since += 1

    def slowdowns(self) -> list[float]:
        """Return each rank's ratio by the median of the other ranks'; [] until every rank has computed something."""
        if not self._steps:
            return []
        measured, planned = self._sums()
        if not measured.all() or not planned.all():
            return []
        ratios = measured / planned
        return (ratios / _medians_of_others(ratios)).tolist()

    def _sums(self) -> Floats:
        """Return measured and planned seconds of each rank, shape (2, ranks)."""
        return np.sum([seconds.sum(axis=1) for _, seconds in self._steps], axis=0)

    def _slow(self, slowdowns: Sequence[float]) -> tuple[int, ...]:
        """Return who is slow, and does not only seem so because of companions who are slower."""
        by_slowness = sorted(range(len(slowdowns)), key=lambda rank: -slowdowns[rank])
        suspects = [rank for rank in by_slowness if slowdowns[rank] >= self._slower]
        if len(suspects) < 2:
            return tuple(suspects)
        whole, seconds = self._sums(), np.concatenate([seconds for _, seconds in self._steps], axis=1)
        # the first rank of each rank's group says which group it is; shape (micro-batches of all steps, ranks)
        groups = np.array([_first_ranks(micro_batch) for plan, _ in self._steps for micro_batch in plan.micro_batches])
        apart, found = np.ones(groups.shape), list[int]()
        for rank in suspects:
            own = (seconds * apart).sum(axis=1)
            measured, planned = np.where(own.all(axis=0), own, whole)  # never seen apart: nobody can tell them apart
            ratios = measured / planned
            if (ratios / _medians_of_others(ratios))[rank] >= self._slower:
                found.append(rank)
                apart[groups == groups[:, [rank]]] = 0
        return tuple(sorted(found))

    def words(self) -> str:
        """Name the stragglers of the last steps, once for as long as they are the same; "" where there is none to name.

        They are looked for once in so many steps as are looked at together.
        """
        if self._num_since < (self._steps.maxlen or 1):
            return ""
        self._num_since = 0
        slowdowns, steps = self.slowdowns(), f"{self._numbers[0]} to {self._numbers[-1]}"
        before, self._before = self._before, (steps, slowdowns)
        slow = self._slow(slowdowns)
        if slow == self._named:
            return ""
        self._named = slow
        return _words([self._evidence(rank, slowdowns[rank], before) for rank in slow], steps) if slow else ""

    def _evidence(self, rank: int, slowdown: float, before: tuple[str, Sequence[float]]) -> str:
        """Say what was planned and measured of a slow rank, and what it was when steps were last looked at."""
        measured, planned = self._sums()[:, rank]
        steps, of_then = before
        then = f"; {of_then[rank]:.2f} times in steps {steps}" if of_then else ""
        seconds = f"{planned:.3g} s planned, {measured:.3g} s measured"
        return f"rank {rank} takes {slowdown:.2f} times as long ({seconds}{then})"


def _first_ranks(micro_batch: MicroBatch) -> list[int]:
    """Return for each rank the first one of its group."""
    first = {rank: group.ranks[0] for group in micro_batch.groups for rank in group.ranks}
    return [first[rank] for rank in sorted(first)]


def _medians_of_others(values: Floats) -> Floats:
    """Return for each of some values, two at least, the median of all others: sorted once, for there may be many."""
    order = values.argsort()
    rank_of = np.empty(len(values), dtype=np.int64)
    rank_of[order] = np.arange(len(values))
    ascending, middle = values[order], (len(values) - 1) // 2

    def of_others(place: int) -> Floats:
        """Return the value at a place among the others: one further on from where the value itself was taken out."""
        return ascending[place + (rank_of <= place)]

    return of_others(middle) if len(values) % 2 == 0 else (of_others(middle - 1) + of_others(middle)) / 2


def _words(evidence: Sequence[str], steps: str) -> str:
    """Say who is slow, by how much, and what to look for."""
    return (
        f"In steps {steps}, by what was planned and the median of the other ranks: {', '.join(evidence)}. Look at its "
        "device (clocks, heat, other processes) and its host (data loading, cores shared with others). If it has to "
        "stay, RankSpeedsCallback has plans give it less."
    )


def alert(args: TrainingArguments, words: str) -> None:
    """Say it in the log, and to trackio where that is the run's tracker."""
    logger.warning("%s", words)
    if "trackio" not in (args.report_to or []):
        return
    try:
        trackio: Any = importlib.import_module("trackio")  # whose types need not be there
        trackio.alert(title="A rank is slow", text=words, level=trackio.AlertLevel.WARN)
    except Exception as error:  # a tracker that cannot be told ends no run
        logger.warning("trackio could not be told: %s: %s", type(error).__name__, error)
