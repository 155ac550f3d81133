"""This module says which groups are timed: samples of many lengths, alone, packed and mixed, at each degree."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hf_hetero.plan import Group, MicroBatch, Plan

LEAST_TOKENS = 32
"""Of a sample in a pack that is timed; shorter ones fill up steps."""
PACKS = (1, 4, 16)
"""Samples of the packs that are timed."""
FULL_PACKS = (1, 3)
"""Samples of those that are timed by other methods: alone, all is cut; of three, ranks hold one and parts of one."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A `Trial` is a group to be timed. All ranks hold such a group at once, as training keeps all of them busy.

    Args:
        degree: ranks of the group.
        lengths: tokens of its samples.
        activations: what it does to hold more tokens, as in `Group`.
        method: how attention crosses its ranks, as in `Group`.
    """

    degree: int
    lengths: tuple[int, ...]
    activations: str | None = None
    method: str = "ulysses"

    def num_samples(self, num_ranks: int) -> int:
        """Count the samples of all such groups together."""
        return len(self.lengths) * (num_ranks // self.degree)


def trials(
    degrees: Collection[int],
    tokens: int,
    longest: int,
    policies: Iterable[str] = (),
    methods: Collection[str] = (),
) -> list[Trial]:
    """Return the groups to be timed.

    Args:
        degrees: to be timed.
        tokens: that one rank holds at most.
        longest: tokens of the longest sample.
        policies: ways to hold more tokens, which are timed on single ranks.
        methods: beside the exchange of heads; they are timed with groups that are full.
    """
    found = [Trial(degree, lengths) for degree in degrees for lengths in _mixtures(degree * tokens, longest)]
    found += [Trial(1, lengths, policy) for policy in policies for lengths in _mixtures(tokens, longest)]
    for degree in degrees:
        if degree > 1:
            full = dict.fromkeys((min(degree * tokens // number, longest),) * number for number in FULL_PACKS)
            found += [Trial(degree, lengths, method=method) for method in methods for lengths in full]
    return found


def _mixtures(tokens: int, longest: int) -> list[tuple[int, ...]]:
    """Return lengths of samples that at most so many tokens hold: alone, in packs of equal ones, in a mixed pack.

    Most of the packs are full, as those of a plan are: where the formula cannot follow the machine everywhere, it had
    better follow it there.
    """
    found: dict[tuple[int, ...], None] = {}
    for total in (tokens, tokens // 4):
        for number in PACKS:
            if (length := min(total // number, longest)) >= LEAST_TOKENS:
                found[(length,) * number] = None
        if (short := total // 8) >= LEAST_TOKENS:
            found[(min(total // 2, longest), *(min(short, longest),) * 4)] = None
    found[(min(2 * LEAST_TOKENS, tokens, longest),)] = None
    return list(found)


# ------------------------------------------------------------------------------------------------------------- in steps


@dataclass(frozen=True, slots=True)
class TrialStep:
    """A `TrialStep` is trials that one optimizer step times, each in a micro-batch of its own.

    A last micro-batch of short samples makes all steps hold equally many. It also takes the exchange of gradients,
    which would disturb a trial.

    Args:
        num_ranks: of the run.
        trials: the groups.
        fillers: tokens of each sample of the last micro-batch; its length tells steps apart.
    """

    num_ranks: int
    trials: tuple[Trial, ...]
    fillers: tuple[int, ...]

    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each sample of the step."""
        copies = [trial.lengths * (self.num_ranks // trial.degree) for trial in self.trials]
        return (*(length for lengths in copies for length in lengths), *self.fillers)

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Return the plan that times the trials, for the same samples in any order."""
        positions: dict[int, list[int]] = {}
        for position, length in enumerate(lengths):
            positions.setdefault(length, []).append(position)
        micro_batches: list[MicroBatch] = []
        for trial in self.trials:
            starts = range(0, self.num_ranks, trial.degree)
            groups = [
                Group(
                    tuple(range(start, start + trial.degree)),
                    tuple(positions[length].pop() for length in trial.lengths),
                    trial.method,
                    activations=trial.activations,
                )
                for start in starts
            ]
            micro_batches.append(MicroBatch(tuple(groups)))
        rest = [positions[length].pop() for length in self.fillers]
        last = [Group((rank,), tuple(rest[rank :: self.num_ranks])) for rank in range(self.num_ranks)]
        return Plan(self.num_ranks, (*micro_batches, MicroBatch(tuple(last))), seconds=1.0, lower_bound_s=1.0)


def in_steps(chosen: Sequence[Trial], num_ranks: int) -> list[TrialStep]:
    """Return steps of equally many samples, which a multiple of the ranks divides, that time all of the trials."""
    room = num_ranks * math.ceil(max(trial.num_samples(num_ranks) for trial in chosen) / num_ranks)
    held: list[list[Trial]] = []
    for trial in sorted(chosen, key=lambda trial: -trial.num_samples(num_ranks)):
        number = trial.num_samples(num_ranks)
        fitting = (step for step in held if sum(t.num_samples(num_ranks) for t in step) + number <= room)
        step = next(fitting, None)
        if step is None:
            held.append([trial])
        else:
            step.append(trial)
    steps: list[TrialStep] = []
    for index, step in enumerate(held):
        missing = room + num_ranks - sum(trial.num_samples(num_ranks) for trial in step)
        steps.append(TrialStep(num_ranks, tuple(step), (2 + index,) * missing))
    return steps
