"""This module tells from measured groups how fast each rank computes, by what the cost model says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from hf_hetero.callbacks.refitting import is_priced
from hf_hetero.costs import CostModel
from hf_hetero.costs.places import LEAST_SPEED
from hf_hetero.plan import StepReport

FEWEST_TIMED = 3
"""Times that a group must have been measured: one step may be disturbed on any rank."""
DIGITS = 2
"""Digits of a speed: more would be noise, and have plans made by many places where there are few."""
TINY = 1e-3
"""Least slowness: a measurement may say less than none."""
NOTE = "; speeds of ranks from measured steps"

Block = tuple[int, int]
"""First rank and degree of a group."""


class Timed(NamedTuple):
    """A `Timed` group is one that was measured, in seconds.

    Args:
        measured_s: of its slowest rank.
        planned_s: what the cost model charges.
        computed_s: what it charges for computing at full speed.
        rest_s: what it charges for all else.
    """

    measured_s: float
    planned_s: float
    computed_s: float
    rest_s: float


def timed_groups(cost: CostModel, reports: Sequence[StepReport]) -> dict[Block, list[Timed]]:
    """Collect the groups that were measured, each by itself, and that the cost model knows a price of."""
    timed: dict[Block, list[Timed]] = {}
    for report in reports:
        if report.is_lockstep:  # all ranks waited for the slowest in each layer
            continue
        for number, (micro_batch, busy_s) in enumerate(zip(report.plan.micro_batches, report.busy_s, strict=True)):
            if number in report.forward_only:
                continue
            for group in micro_batch.groups:
                measured_s = max(busy_s[rank] for rank in group.ranks)
                if group.samples and measured_s > 0 and is_priced(cost, group, report.planned_lengths):
                    attention_s, linear_s, exchange_s, fixed_s = cost.charges(group, report.planned_lengths)
                    there_s, rest_s = attention_s + linear_s, exchange_s + fixed_s
                    full_s = there_s * cost.places.of(group.ranks).rank_speed
                    entry = Timed(measured_s, there_s + rest_s, full_s, rest_s)
                    timed.setdefault((group.ranks[0], group.degree), []).append(entry)
    return timed


def rank_speeds(timed: Mapping[Block, Sequence[Timed]], num_ranks: int) -> list[float] | None:
    """Return how fast each rank computes, as a share of the fastest; None where some rank was not measured enough.

    A group takes as long as its slowest rank, so that each rank is at most as slow as any of the groups it was in: the
    least of those is what is known of it. What a cost model is off by for all ranks alike is taken out first.

    Args:
        timed: groups that were measured, by their ranks.
        num_ranks: of the run.
    """
    enough = {block: groups for block, groups in timed.items() if len(groups) >= FEWEST_TIMED}
    ratios = [group.measured_s / group.planned_s for groups in enough.values() for group in groups]
    if not ratios:
        return None
    off, slowness = median(ratios), [math.inf] * num_ranks
    for (first, degree), groups in enough.items():
        of_block = [(g.measured_s / off - g.rest_s) / g.computed_s for g in groups if g.computed_s > 0]
        for rank in range(first, first + degree):
            slowness[rank] = min(slowness[rank], max(TINY, median(of_block)) if of_block else math.inf)
    fastest = min(slowness)
    return [fastest / slow for slow in slowness] if max(slowness) < math.inf else None


def with_speeds(cost: CostModel, speeds: Sequence[float], least_change: float) -> CostModel:
    """Return the cost model with the speeds that ranks have shown: itself where none differs enough from what it says.

    Times stay: what they are off by for all ranks is for a refit to correct.

    Args:
        cost: that the ranks were compared with.
        speeds: of each rank, as a share of the fastest.
        least_change: ranks whose speed is off by less, as a share, keep the one they have.
    """
    known = {rank: cost.rank_speeds.get(rank, 1.0) for rank in range(len(speeds))}
    changed = {rank: speed for rank, speed in enumerate(speeds) if abs(speed / known[rank] - 1) >= least_change}
    if not changed:
        return cost
    shown = {rank: max(LEAST_SPEED, round(speed, DIGITS)) for rank, speed in (known | changed).items()}
    slower = {rank: speed for rank, speed in shown.items() if speed <= 1 - least_change / 2}
    source = cost.source if cost.source.endswith(NOTE) else f"{cost.source}{NOTE}"
    return replace(cost, rank_speeds=slower, source=source, provenance="refitted")
