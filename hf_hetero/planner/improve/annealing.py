"""Whole plans annealed: samples and groups change places at random, for the worse now and then, ever more rarely.

The fast search decides how long micro-batches last, and one rule puts the samples into them. What the rule leaves is
mended here: groups of a full micro-batch that end at different times, and samples of different lengths that would do
better in one group (simulated annealing, Kirkpatrick, Gelatt and Vecchi, Science 220, 1983). `energy` says what a move
gains. Moves end by count, so that the plan does not depend on the clock while there is time for all of them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

from hf_hetero.planner.draft import Draft, draft_seconds
from hf_hetero.planner.improve.energy import DraftState, GroupState
from hf_hetero.planner.problem import Problem

POWERS = (32.0, 64.0, 128.0, 256.0)
"""Of the power mean, each for as many moves: the higher, the more the slowest group counts. Half: ±0.0 %;
double: ±0.0 % (improved)."""
WARMEST = 2e-5
"""Temperature at the beginning, as a share of the step's seconds. Half: ±0.0 %; double: ±0.0 % (improved)."""
COLDEST = 2e-6
"""Temperature at the end, as a share of the step's seconds. Half: ±0.0 %; double: ±0.0 % (improved)."""
MOVES_A_TEMPERATURE = 200
"""Moves tried before the next temperature; the best draft so far is kept between two of them. Half: ±0.0 %;
double: ±0.0 % (improved)."""
NEAR = 0.8
"""Samples that change places because they are about as long are drawn at most the number of samples, to this power,
apart in order of length, short distances most often. Half: ±0.0 %; double: ±0.0 % (improved)."""


def annealed(problem: Problem, draft: Draft, num_moves: int, time_limit_s: float = math.inf, seed: int = 0) -> Draft:
    """The draft, or the fastest one met on a walk of so many moves; the same for the same arguments.

    Args:
        num_moves: moves to try; at least one temperature's.
        time_limit_s: wall seconds for them. Where a busy machine would not try them all, it cools down by the clock: a
            walk that ends warm has found little.
        seed: of the random numbers.
    """
    state, chance = DraftState(problem, draft, POWERS[0]), random.Random(seed).random
    best = cooled(state, Moves(state, chance).often(), chance, num_moves, time_limit_s)
    return best if best and draft_seconds(problem, best) < draft_seconds(problem, draft) else draft


def cooled(
    state: DraftState,
    moves: Sequence[Callable[[], None]],
    chance: Callable[[], float],
    num_moves: int,
    time_limit_s: float = math.inf,
) -> Draft | None:
    """The fastest draft met, or None where none is faster than the one to begin with.

    Args:
        state: where to begin; its power is the first of `POWERS`.
        moves: what is tried, each as likely.
        chance: gives random numbers from 0 to 1.
        num_moves, time_limit_s: as `annealed` takes them.
    """
    started = time.perf_counter()
    step_s = best_s = state.step_seconds()
    best, num_tried, past, log = None, 0, 0.0, math.log
    while past < 1:
        if (power := POWERS[int(past * len(POWERS))]) != state.power:
            state.sharpen(power)
        temperature = step_s * WARMEST * (COLDEST / WARMEST) ** past
        for _ in range(MOVES_A_TEMPERATURE):
            state.allowed = -temperature * log(1.0 - chance())
            moves[int(chance() * len(moves))]()
        if state.step_seconds() < best_s * (1 - 1e-9):
            best_s, best = state.step_seconds(), state.draft()
        num_tried += MOVES_A_TEMPERATURE
        past = max(num_tried / num_moves, (time.perf_counter() - started) / time_limit_s)
    return best


class Moves:
    """What may be tried with a draft; the draft's state decides whether it is done.

    Args:
        state: the draft.
        chance: gives random numbers from 0 to 1.
    """

    def __init__(self, state: DraftState, chance: Callable[[], float]) -> None:
        self._state, self._chance = state, chance

    def often(self) -> Sequence[Callable[[], None]]:
        """The moves, each as often as it is to be tried."""
        reshaping: list[tuple[Callable[[], None], int]] = [
            (self.open_group, 3),
            (self.change_degree, 3),
            (self.merge, 1),
            (self.split, 1),
        ]
        return [*self.in_place(), *(move for move, times in reshaping for _ in range(times))]

    def in_place(self) -> Sequence[Callable[[], None]]:
        """The moves after which a micro-batch has groups of the kinds it had, or fewer."""
        often: list[tuple[Callable[[], None], int]] = [
            (self.swap_near, 45),
            (self.give, 20),
            (self.swap_for_two, 20),
            (self.swap_groups, 6),
            (self.swap, 5),
        ]
        return [move for move, times in often for _ in range(times)]

    def give(self) -> None:
        """A sample goes to another group."""
        giver, taker = self._giver(), self._any()
        self._state.exchange(giver, taker, self._sample(giver), ())

    def swap(self) -> None:
        """Two samples change places."""
        giver, taker = self._giver(), self._any()
        self._state.exchange(giver, taker, self._sample(giver), (self._sample(taker),))

    def swap_near(self) -> None:
        """Two samples of about one length change places."""
        giver, holders, chance = self._giver(), self._state.holders, self._chance
        sample = self._sample(giver)
        apart = 1 + int(len(holders) ** (NEAR * chance()))
        other = sample + apart if chance() < 0.5 else sample - apart
        if 0 <= other < len(holders):
            self._state.exchange(giver, holders[other], sample, (other,))

    def swap_for_two(self) -> None:
        """A sample changes places with two."""
        giver, taker = self._giver(), self._any()
        first, second = self._sample(taker), self._sample(taker)
        if first != second:
            self._state.exchange(giver, taker, self._sample(giver), (first, second))

    def swap_groups(self) -> None:
        """Two groups take each other's samples; where they have as many ranks, that is to say their places."""
        one, other, like = self._giver(), self._any(), self._state.like
        if one.micro_batch is not other.micro_batch or one.index != other.index:
            new = like(other, one.micro_batch, one.index), like(one, other.micro_batch, other.index)
            self._state.attempt((one, other), new)

    def open_group(self) -> None:
        """A sample leaves its group for one of its own, on free ranks of any micro-batch."""
        state, giver = self._state, self._giver()
        micro_batch = state.micro_batches[int(self._chance() * len(state.micro_batches))]
        index, sample = int(self._chance() * len(state.degrees)), self._sample(giver)
        if micro_batch.num_free and state.degrees[index] <= micro_batch.num_free:
            others = [other for other in giver.samples if other != sample]
            left = (state.group(giver.micro_batch, giver.index, others),) if others else ()
            state.attempt((giver,), (*left, state.group(micro_batch, index, [sample])))

    def change_degree(self) -> None:
        """A group gets more ranks, or fewer."""
        state, group = self._state, self._any()
        index = group.index + (1 if self._chance() < 0.5 else -1)
        if 0 <= index < len(state.degrees):
            state.attempt((group,), (state.like(group, group.micro_batch, index),))

    def merge(self) -> None:
        """Two groups of one micro-batch become one that has the ranks of both."""
        state, group = self._state, self._any()
        beside = group.micro_batch.groups
        other = beside[int(self._chance() * len(beside))]
        degree = state.degrees[group.index] + state.degrees[other.index]
        if other is not group and degree in state.degrees:
            both = state.group(group.micro_batch, state.degrees.index(degree), group.samples + other.samples)
            state.attempt((group, other), (both,))

    def split(self) -> None:
        """A group becomes two of half its ranks; the samples, longest first, go where fewer tokens are."""
        state, group = self._state, self._any()
        degree = state.degrees[group.index]
        if degree % 2 or degree // 2 not in state.degrees:
            return
        index = state.degrees.index(degree // 2)
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for sample in sorted(group.samples):
            shorter = tokens[1] < tokens[0]
            halves[shorter].append(sample)
            tokens[shorter] += state.lengths[sample]
        state.attempt((group,), tuple(state.group(group.micro_batch, index, half) for half in halves if half))

    def _giver(self) -> GroupState:
        """The slowest group of a micro-batch half of the time, else any group."""
        chance, micro_batches = self._chance(), self._state.micro_batches
        if chance < 0.5:
            slowest = micro_batches[int(2 * chance * len(micro_batches))].slowest
            if slowest is not None:
                return slowest
        return self._any()

    def _any(self) -> GroupState:
        groups = self._state.groups
        return groups[int(self._chance() * len(groups))]

    def _sample(self, group: GroupState) -> int:
        return group.samples[int(self._chance() * len(group.samples))]
