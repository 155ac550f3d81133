"""A row sums up one step of a run: what a page of ten thousand steps can hold of each, whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_hetero.plan import idle_share
from hf_hetero.report.records import MOST_TOKENS, Record

Integers = NDArray[np.int64]

BINS_PER_DOUBLING = 2
"""Lengths are counted in bins, each ending at the square root of two times where it begins."""

SHORTEST_S = 1e-9
"""No clock tells less; a file may say so."""

Key = tuple[int, int]
"""A degree, and a bin of lengths (`length_bin`)."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """A `StepRow` is a step in numbers.

    Args:
        step: its number.
        seconds, wait_s: measured: of its passes, until the device was done, and before them for its plan and its data.
        planned_s, bound_s, planning_s: predicted seconds, seconds that no plan undercuts, and seconds of planning.
        idle_share: of the rank-seconds, if that was measured; under `is_lockstep` it was not.
        is_lockstep: all ranks waited for each other in every layer.
        num_ranks, num_micro_batches, num_groups: of its plan; groups of all micro-batches.
        longest: tokens of its longest sample.
        peak_bytes: of the fullest rank; 0 where it was not measured.
        samples, tokens: by degree and bin of lengths.
    """

    step: int
    seconds: float
    wait_s: float
    planned_s: float
    bound_s: float
    planning_s: float
    idle_share: float
    is_lockstep: bool
    num_ranks: int
    num_micro_batches: int
    num_groups: int
    longest: int
    peak_bytes: int = 0
    samples: Mapping[Key, int] = field(default_factory=dict[Key, int])
    tokens: Mapping[Key, int] = field(default_factory=dict[Key, int])

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return sum(self.samples.values())

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return sum(self.tokens.values())

    @property
    def tokens_per_s(self) -> float:
        """Return tokens a second, over all ranks, waiting included."""
        total = self.seconds + self.wait_s
        return self.num_tokens / total if total >= SHORTEST_S else 0.0

    @property
    def samples_by_degree(self) -> dict[int, int]:
        """Count the samples of each degree, ascending."""
        return by_degree(self.samples)

    @property
    def variety(self) -> tuple[int, int]:
        """Say how much a picture of the step shows: its degrees, then its samples outside the commonest one."""
        counts = self.samples_by_degree.values()
        return len(counts), sum(counts) - max(counts, default=0)


def row_of(record: Record) -> StepRow:
    """Sum up a step's record. It was checked when it was read: to make its plan again would take most of the time."""
    plan, lengths = record["plan"], record["lengths"]
    groups = [group for micro_batch in plan["micro_batches"] for group in micro_batch["groups"]]
    samples, tokens = _counts(groups, lengths)
    return StepRow(
        step=record["step"],
        seconds=record["seconds"],
        wait_s=record["wait_s"],
        planned_s=plan.get("seconds", 0.0),
        bound_s=plan.get("lower_bound_s", 0.0),
        planning_s=plan.get("planning_s", 0.0),
        idle_share=idle_share(record["busy_s"]),
        is_lockstep=bool(record.get("is_lockstep")),
        num_ranks=plan["num_ranks"],
        num_micro_batches=len(plan["micro_batches"]),
        num_groups=len(groups),
        longest=max(lengths, default=0),
        peak_bytes=record.get("peak_bytes", 0),
        samples=samples,
        tokens=tokens,
    )


def _counts(groups: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> tuple[dict[Key, int], dict[Key, int]]:
    """Count the samples of groups, and their tokens, by degree and bin: all at once, for there may be many of each."""
    tokens = np.array(lengths, dtype=np.int64)
    bins = STARTS.searchsorted(tokens, side="right") - 1
    held = np.fromiter(chain.from_iterable(group["samples"] for group in groups), dtype=np.int64)
    degrees = [len(group["ranks"]) for group in groups]
    different = sorted(set(degrees))
    first_key = {degree: number * len(STARTS) for number, degree in enumerate(different)}
    keys = np.repeat([first_key[d] for d in degrees], [len(group["samples"]) for group in groups]) + bins[held]
    counts, sums = np.bincount(keys), np.zeros(keys.max(initial=-1) + 1, dtype=np.int64)
    np.add.at(sums, keys, tokens[held])  # not by weights of `bincount`, which are no integers
    filled = np.flatnonzero(counts)
    named = [(different[key // len(STARTS)], key % len(STARTS)) for key in filled.tolist()]
    return (
        dict(zip(named, counts[filled].tolist(), strict=True)),
        dict(zip(named, sums[filled].tolist(), strict=True)),
    )


def length_bin(length: int) -> int:
    """Return the bin that a length falls into.

    >>> [length_bin(length) for length in (1, 2, 3, 4, 1024)]
    [0, 2, 3, 4, 20]
    """
    return math.floor(BINS_PER_DOUBLING * math.log2(length))


def _starts() -> Integers:
    """Return the least length of each bin in tokens, and of those that are empty that of the next."""
    starts: list[int] = []
    for number in range(length_bin(MOST_TOKENS) + 1):
        length = max(1, math.floor(bin_start(number)) - 1)
        while length_bin(length) < number:
            length += 1
        starts.append(length)
    return np.array(starts, dtype=np.int64)


def bin_start(number: int) -> float:
    """Return the least length of a bin, in tokens."""
    return 2.0 ** (number / BINS_PER_DOUBLING)


def by_degree(counts: Mapping[Key, int]) -> dict[int, int]:
    """Sum counts over the bins of each degree, ascending."""
    totals: dict[int, int] = {}
    for (degree, _), count in sorted(counts.items()):
        totals[degree] = totals.get(degree, 0) + count
    return totals


def totals(counts: Iterable[Mapping[Key, int]]) -> dict[Key, int]:
    """Sum counts of several steps, ascending by degree and bin."""
    sums: dict[Key, int] = {}
    for one in counts:
        for key, count in one.items():
            sums[key] = sums.get(key, 0) + count
    return dict(sorted(sums.items()))


STARTS = _starts()
"""Of all bins that there are."""
