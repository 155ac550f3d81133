"""Dynamic context parallelism as Megatron-Core's development branch releases it: its scheduler, with nothing tuned.

Written from what its sources and pull requests say (Megatron-LM, `default_dynamic_cp`, PRs 2282 and 5154, read
2026-11): one micro-batch after the other is filled, longest sample first. The work of a sample is s^2 / degree for each
rank of its group, linear layers and exchanges left out. A sample may join a group of any size that its tokens need, or
a larger one, or open one on free ranks: it goes where the busiest rank of the micro-batch is then least busy, to the
smaller size and the older group where that is equal; it waits for the next micro-batch where some rank would have more
than the work of a full rank of the longest sample. Ranks left free are given to the smallest groups, one size up; where
that cannot use them all, the whole run becomes one group, with as many samples as fit.

Its one setting is the tokens of a rank (`max_seqlen_per_dp_cp_rank`), which is its limit of memory, too. A size is a
power of two that divides the ranks, or all of them; here it must also be one that the cost model offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from hf_hetero.plan import Plan
from hf_hetero.what_if.groups import Open, named

MORE_WORK = 1.05
"""A rank may have so many times the work of one that is full of the longest sample: the release's constant."""


@dataclass(slots=True)
class _Ring:
    """A group in the making.

    Args:
        size: its ranks.
        tokens: that they hold together.
        work: s^2 / size, summed.
        samples: what it holds.
    """

    size: int
    tokens: int = 0
    work: float = 0.0
    samples: list[int] = field(default_factory=list[int])

    def add(self, sample: int, length: int) -> None:
        self.samples.append(sample)
        self.tokens += length
        self.work += length * length / self.size


def megatron(lengths: Sequence[int], num_ranks: int, degrees: Sequence[int], limit_tokens: int) -> Plan:
    """Plan a batch as the release does.

    Args:
        lengths: tokens of each sample of the global batch.
        num_ranks: ranks of the run.
        degrees: that the machine offers, ascending.
        limit_tokens: tokens of a rank; as many times the largest size hold each sample.
    """
    sizes = sizes_of(num_ranks, degrees)
    waiting = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    micro_batches: list[Open] = []
    while waiting:
        groups, left = _filled(waiting, lengths, num_ranks, sizes, limit_tokens)
        expanded = _expanded(groups, num_ranks, sizes)
        if sum(degree for degree, _ in expanded) < num_ranks and sizes[-1] == num_ranks:
            whole, left = _whole(waiting, lengths, num_ranks, limit_tokens)
            expanded = [(num_ranks, whole)]
        micro_batches.append(expanded)
        waiting = left
    return Plan(num_ranks, tuple(named(groups, num_ranks) for groups in micro_batches))


def sizes_of(num_ranks: int, degrees: Sequence[int]) -> list[int]:
    """List the sizes of groups: powers of two that divide the ranks, and all ranks, as far as they are offered."""
    return [d for d in degrees if d == num_ranks or (d & (d - 1) == 0 and num_ranks % d == 0)]


def _filled(
    waiting: Sequence[int], lengths: Sequence[int], num_ranks: int, sizes: Sequence[int], limit_tokens: int
) -> tuple[Open, list[int]]:
    """Fill one micro-batch; return its groups, oldest first, and the samples left for the next, longest first."""
    longest = lengths[waiting[0]]
    most_work = longest * limit_tokens * MORE_WORK
    rings = [_Ring(_needed(longest, sizes, limit_tokens))]
    rings[0].add(waiting[0], longest)
    busiest, free = rings[0].work, num_ranks - rings[0].size
    left: list[int] = []
    for sample in waiting[1:]:
        length = lengths[sample]
        needed = _needed(length, sizes, limit_tokens)
        best: tuple[float, _Ring] | None = None
        for size in (size for size in sizes if size >= needed):
            work, most_tokens = length * length / size, size * limit_tokens - length
            opened = [_Ring(size)] if size <= free else []
            for ring in chain((ring for ring in rings if ring.size == size and ring.tokens <= most_tokens), opened):
                then = max(busiest, ring.work + work)
                if then <= most_work and (best is None or then < best[0]):
                    best = then, ring
                    if then == busiest:
                        break  # no place makes the busiest rank less busy
            if best is not None and best[0] == busiest:
                break
        if best is None:
            left.append(sample)
            continue
        busiest, chosen = best
        if not chosen.samples:
            rings.append(chosen)
            free -= chosen.size
        chosen.add(sample, length)
    return [(ring.size, ring.samples) for ring in rings], left


def _needed(length: int, sizes: Sequence[int], limit_tokens: int) -> int:
    """Return the smallest size that holds a sample."""
    return next((size for size in sizes if size * limit_tokens >= length), sizes[-1])


def _expanded(groups: Open, num_ranks: int, sizes: Sequence[int]) -> Open:
    """Give free ranks to the oldest of the smallest groups, one size up, as long as there are enough."""
    groups, free = list(groups), num_ranks - sum(degree for degree, _ in groups)
    while free:
        smallest = min(degree for degree, _ in groups)
        larger = next((size for size in sizes if size > smallest), None)
        if larger is None or larger - smallest > free:
            break
        number = next(i for i, (degree, _) in enumerate(groups) if degree == smallest)
        groups[number] = (larger, groups[number][1])
        free -= larger - smallest
    return groups


def _whole(
    waiting: Sequence[int], lengths: Sequence[int], num_ranks: int, limit_tokens: int
) -> tuple[list[int], list[int]]:
    """Choose what one group of all ranks holds, longest first, and what is left for the next micro-batch."""
    held: list[int] = []
    left: list[int] = []
    room = num_ranks * limit_tokens
    for sample in waiting:
        fits = lengths[sample] <= room
        (held if fits else left).append(sample)
        room -= lengths[sample] if fits else 0
    return held, left
