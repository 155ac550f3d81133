"""Levelling moves samples between groups, priced where they stand, until slow ranks have less to do than fast ones.

It anneals whole plans as `improve.annealing` does, but a group's kind is its block of ranks: samples change groups, and
groups change blocks, or are split and joined where blocks are, so that a slow rank may end up in a group of its own.
Moves end by count, so that the same batch gets the same plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner.draft import Draft
from hf_hetero.planner.improve.annealing import POWERS, Moves, cooled
from hf_hetero.planner.improve.energy import DraftState, GroupState, Kinds, MicroBatchState
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.uneven.placing import filled
from hf_hetero.topology import aligned_blocks

Span = tuple[int, int]
"""First rank and degree of a block."""


@dataclass(frozen=True)
class Blocks:
    """`Blocks` are the kinds of groups: what they do to hold more tokens, and the ranks they stand on.

    Args:
        activations: of each kind, as `Group.activations`.
        spans: of each kind.
        kind_of: the kind, by activations and span.
    """

    activations: Sequence[str | None]
    spans: Sequence[Span]
    kind_of: dict[tuple[str | None, Span], int]

    def halves(self, kind: int) -> list[int]:
        """List the kinds of the two halves of a block; [] where groups of half its ranks are not offered."""
        (first, degree), doing = self.spans[kind], self.activations[kind]
        halves = [(doing, (first + start, degree // 2)) for start in (0, degree // 2)]
        return [self.kind_of[half] for half in halves] if degree % 2 == 0 and halves[0] in self.kind_of else []

    def around(self, kind: int) -> int:
        """Return the kind of the block of twice the ranks that a block is a half of; -1 where there is none."""
        (first, degree), doing = self.spans[kind], self.activations[kind]
        return self.kind_of.get((doing, (first - first % (2 * degree), 2 * degree)), -1)

    def inside(self, kind: int, micro_batch: MicroBatchState) -> list[GroupState]:
        """List the groups of a micro-batch that have some of a block's ranks."""
        first, degree = self.spans[kind]
        spans = ((group, *self.spans[group.index]) for group in micro_batch.groups)
        return [group for group, start, length in spans if start < first + degree and first < start + length]


def blocks_of(problem: Problem, doing: Sequence[str | None]) -> Blocks:
    """List every block of ranks that a group may have, for each of the things that groups may do to hold more."""
    spans = [(ranks[0], degree) for degree in problem.degrees for ranks in aligned_blocks(problem.num_ranks, degree)]
    kinds = [(activations, span) for activations in doing for span in spans]
    return Blocks(
        [activations for activations, _ in kinds],
        [span for _, span in kinds],
        {kind: number for number, kind in enumerate(kinds)},
    )


def prices_of(blocks: Blocks, cost: CostModel) -> Kinds:
    """Price the groups of each kind where they stand, as if they exchanged heads."""
    prices = [
        (cost.of_group(Group(tuple(range(first, first + degree)), (), activations=doing)), degree)
        for doing, (first, degree) in zip(blocks.activations, blocks.spans, strict=True)
    ]
    return Kinds(
        names=range(len(prices)),
        degrees=[degree for _, degree in prices],
        capacity=[under.capacity_tokens * degree for under, degree in prices],
        fixed_s=[under.fixed_s(degree) for under, degree in prices],
        attention_s=[under.attention_s_per_token2 / degree for under, degree in prices],
        linear_s=[under.linear_s(degree) / degree for under, degree in prices],
    )


class BlockMoves(Moves):
    """What may be tried with a draft whose kinds are blocks.

    Args:
        state: the draft.
        chance: gives random numbers from 0 to 1.
        blocks: the kinds.
    """

    def __init__(self, state: DraftState, chance: Callable[[], float], blocks: Blocks) -> None:
        super().__init__(state, chance)
        self._blocks = blocks

    def often(self) -> Sequence[Callable[[], None]]:
        """The moves, each as often as it is to be tried."""
        reshaping = [(self.open_block, 3), (self.halve, 3), (self.shrink, 1), (self.grow, 2)]
        return [*self.in_place(), *(move for move, times in reshaping for _ in range(times))]

    def open_block(self) -> None:
        """A sample leaves its group for a free block of any micro-batch."""
        state, giver = self._state, self._giver()
        micro_batch = state.micro_batches[int(self._chance() * len(state.micro_batches))]
        kind, sample = int(self._chance() * len(self._blocks.spans)), self._sample(giver)
        if micro_batch.num_free >= state.degrees[kind] and not self._blocks.inside(kind, micro_batch):
            others = [other for other in giver.samples if other != sample]
            left = (state.group(giver.micro_batch, giver.index, others),) if others else ()
            state.attempt((giver,), (*left, state.group(micro_batch, kind, [sample])))

    def halve(self) -> None:
        """A group becomes two, each on one half of its block; samples, longest first, go where fewer tokens are."""
        state, group = self._state, self._any()
        held: list[list[int]] = [[], []]
        tokens = [0, 0]
        for sample in sorted(group.samples):
            shorter = tokens[1] < tokens[0]
            held[shorter].append(sample)
            tokens[shorter] += state.lengths[sample]
        if self._chance() < 0.5:
            held.reverse()
        if halves := self._blocks.halves(group.index):
            parts = [(kind, part) for kind, part in zip(halves, held, strict=True) if part]
            state.attempt((group,), tuple(state.group(group.micro_batch, kind, part) for kind, part in parts))

    def shrink(self) -> None:
        """A group goes on with one half of its block."""
        group = self._any()
        if halves := self._blocks.halves(group.index):
            kind = halves[self._chance() < 0.5]
            self._state.attempt((group,), (self._state.like(group, group.micro_batch, kind),))

    def grow(self) -> None:
        """A group gets the block around its own, and the samples of the groups there."""
        group = self._any()
        if (kind := self._blocks.around(group.index)) >= 0:
            old = self._blocks.inside(kind, group.micro_batch)
            samples = [sample for other in old for sample in other.samples]
            self._state.attempt(tuple(old), (self._state.group(group.micro_batch, kind, samples),))


def levelled(
    problem: Problem,
    plan: Plan,
    cost: CostModel,
    squares: Sequence[float],
    num_moves: int,
    time_limit_s: float = math.inf,
) -> Plan | None:
    """Return a plan in which samples and groups changed places, or None where none was faster; methods are left open.

    Args:
        problem: the batch.
        plan: where to begin; its groups fit the memory.
        cost: what moves are priced by, as if all groups exchanged heads.
        squares: of the tokens of each sample, in the caller's order.
        num_moves, time_limit_s: how long to try.
    """
    doing = sorted({group.activations for group in plan.groups if group.samples}, key=str)
    blocks, position = blocks_of(problem, doing), {sample: place for place, sample in enumerate(problem.order)}
    draft: Draft = [
        [
            (blocks.kind_of[g.activations, (g.ranks[0], g.degree)], [position[sample] for sample in g.samples])
            for g in micro_batch.groups
            if g.samples
        ]
        for micro_batch in plan.micro_batches
    ]
    chance = random.Random(0).random
    by_position = [squares[sample] for sample in problem.order]
    state = DraftState(problem, draft, POWERS[0], prices_of(blocks, cost), by_position)
    best = cooled(state, BlockMoves(state, chance, blocks).often(), chance, num_moves, time_limit_s)
    return None if best is None else _named(problem, plan, best, blocks)


def _named(problem: Problem, plan: Plan, draft: Draft, blocks: Blocks) -> Plan:
    """Give groups the ranks of their blocks, and samples their place in the caller's batch."""
    micro_batches: list[MicroBatch] = []
    for kinds in draft:
        groups: list[Group] = []
        for kind, samples in kinds:
            first, degree = blocks.spans[kind]
            held, ranks = tuple(problem.order[place] for place in samples), tuple(range(first, first + degree))
            groups.append(Group(ranks, held, activations=blocks.activations[kind]))
        micro_batches.append(filled(groups, problem.num_ranks))
    return replace(plan, micro_batches=tuple(micro_batches))
