"""A row sums up one step of a run: what a page of ten thousand steps can hold of each, whatever the number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hf_hetero.plan import idle_share
from hf_hetero.report.records import Record

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
        seconds, wait_s: measured: of its passes, and before them for its plan and its data.
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
    of_degree: dict[int, list[int]] = {}
    for group in groups:
        of_degree.setdefault(len(group["ranks"]), []).extend(group["samples"])
    bins = {length: length_bin(length) for length in set(lengths)}
    samples: dict[Key, int] = {}
    tokens: dict[Key, int] = {}
    for degree, held in of_degree.items():
        # each length once, however many samples have it
        for length, count in Counter(map(lengths.__getitem__, held)).items():
            key = degree, bins[length]
            samples[key] = samples.get(key, 0) + count
            tokens[key] = tokens.get(key, 0) + count * length
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


def length_bin(length: int) -> int:
    """Return the bin that a length falls into.

    >>> [length_bin(length) for length in (1, 2, 3, 4, 1024)]
    [0, 2, 3, 4, 20]
    """
    return math.floor(BINS_PER_DOUBLING * math.log2(length))


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
