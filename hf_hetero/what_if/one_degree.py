"""One degree for the whole run, as others share a batch among its groups; nothing is chosen by what is fastest.

Each function plans a batch for groups of one degree; ranks that do not make up a group stay idle. No sample is put off
to a later step, as WLB-LLM does with the longest: a step learns the samples that it would learn anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from hf_hetero.costs import CostModel
from hf_hetero.plan import Plan
from hf_hetero.what_if.differencing import split
from hf_hetero.what_if.groups import named

LINEAR_TOKENS = 24_576
"""Where a sample is so long, attention counts as much as all else in verl's estimate of work, for a hidden size of
4096."""


def verl(lengths: Sequence[int], cost: CostModel, num_ranks: int, degree: int) -> Plan:
    """Plan as verl does with balanced data and dynamic batches: samples are split by differencing, twice.

    First among the groups, as many to each; then each group's own among its micro-batches, whose number is the same for
    all groups, the fewest that memory asks any of them for. Work is estimated as s^2 + 24,576 s. The heaviest
    micro-batches of all groups run together. Written from `verl/utils/seqlen_balancing.py`, read 2026-11. Where a
    micro-batch of such a split exceeds the memory, as it may there, this plan has one more.

    Args:
        lengths: tokens of each sample of the global batch.
        cost: how many tokens a rank holds.
        num_ranks: ranks of the run.
        degree: of all groups; it holds each sample.
    """
    room = degree * cost.capacity_tokens
    work = [length * (length + LINEAR_TOKENS) for length in lengths]
    shares = split(work, num_ranks // degree, equal_counts=True)
    num_micro_batches = max(-(-sum(lengths[sample] for sample in share) // room) for share in shares)
    while True:
        groups: list[list[list[int]]] = []
        for share in shares:
            parts = split([work[sample] for sample in share], num_micro_batches)
            groups.append([[share[i] for i in part] for part in parts])
        if all(sum(lengths[sample] for sample in held) <= room for parts in groups for held in parts):
            return _plan(list(zip(*groups, strict=True)), num_ranks, degree)
        num_micro_batches += 1


def wlb_llm(lengths: Sequence[int], cost: CostModel, num_ranks: int, degree: int) -> Plan:
    """Plan as WLB-LLM packs: longest first, into the pack with the least work that has room (arXiv:2503.17924).

    Packs are as many as the groups of as few micro-batches as hold the samples this way; the heaviest run together.
    Work is the cost model's, as it is profiled there.

    Args:
        lengths, cost, num_ranks, degree: as `verl` takes them.
    """
    room, width = degree * cost.capacity_tokens, num_ranks // degree
    num_micro_batches = max(1, -(-sum(lengths) // (room * width)))
    while (packs := _packed(lengths, cost, degree, num_micro_batches * width)) is None:
        num_micro_batches += 1
    packs.sort(key=lambda pack: -cost.seconds((lengths[sample] for sample in pack), degree))
    return _plan([packs[i : i + width] for i in range(0, len(packs), width)], num_ranks, degree)


def first_come(lengths: Sequence[int], cost: CostModel, num_ranks: int, degree: int) -> Plan:
    """Plan as packing without any sorting does: in the order of the batch, a pack until the next sample has no room.

    Packs are dealt to the groups in turn, as a sampler deals rows.

    Args:
        lengths, cost, num_ranks, degree: as `verl` takes them.
    """
    room, width = degree * cost.capacity_tokens, num_ranks // degree
    packs: list[list[int]] = []
    tokens = room
    for sample, length in enumerate(lengths):
        if tokens + length > room:
            packs.append([])
            tokens = 0
        packs[-1].append(sample)
        tokens += length
    return _plan([packs[i : i + width] for i in range(0, len(packs), width)], num_ranks, degree)


def in_rows(
    lengths: Sequence[int], cost: CostModel, num_ranks: int, degree: int, context_tokens: int
) -> tuple[Plan, list[int]]:
    """Plan as batches of rows do: in the order of the batch, each group as many rows as would fit if all were longest.

    Args:
        lengths, cost, num_ranks, degree: as `verl` takes them.
        context_tokens: the longest sample that may come, which the number of rows was set for.

    Returns:
        The plan, and the tokens of each sample padded to the longest of its group.
    """
    rows, width = max(1, degree * cost.capacity_tokens // context_tokens), num_ranks // degree
    groups = [list(range(i, min(i + rows, len(lengths)))) for i in range(0, len(lengths), rows)]
    padded = [max(lengths[sample] for sample in group) for group in groups for _ in group]
    return _plan([groups[i : i + width] for i in range(0, len(groups), width)], num_ranks, degree), padded


def _packed(lengths: Sequence[int], cost: CostModel, degree: int, num_packs: int) -> list[list[int]] | None:
    """Put samples, longest first, into the pack with the least work that has room; None where one finds none."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    least: list[tuple[float, int, int]] = [(0.0, number, degree * cost.capacity_tokens) for number in range(num_packs)]
    for sample in sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample)):
        passed: list[tuple[float, int, int]] = []
        while least and least[0][2] < lengths[sample]:
            passed.append(heappop(least))
        if not least:
            return None
        work, number, room = heappop(least)
        packs[number].append(sample)
        for pack in (*passed, (work + cost.work(lengths[sample], degree), number, room - lengths[sample])):
            heappush(least, pack)
    return packs


def _plan(micro_batches: Sequence[Sequence[list[int]]], num_ranks: int, degree: int) -> Plan:
    """Give the samples of each group (inner) of each micro-batch (outer) ranks; leave out micro-batches without any."""
    filled = [groups for groups in micro_batches if any(groups)]
    return Plan(num_ranks, tuple(named([(degree, held) for held in groups], num_ranks) for groups in filled))
