"""The release's scheduler is followed: what it is known to do, and a slow telling of its rule."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero.plan import Plan
from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.what_if.megatron import megatron, sizes_of

POWERS = [1, 2, 4, 8, 16]


def groups(plan: Plan) -> list[list[tuple[int, list[int]]]]:
    """Degree and samples of the groups that hold samples."""
    return [[(g.degree, list(g.samples)) for g in m.groups if g.samples] for m in plan.micro_batches]


def test_a_short_sample_joins_a_larger_group() -> None:
    """6144 tokens need two ranks of 4096; 2048 would fit one, but are put beside them: there is no other rank."""
    assert groups(megatron([6144, 2048], 2, POWERS, 4096)) == [[(2, [0, 1])]]


def test_ranks_that_no_power_of_two_fills() -> None:
    """On 14 ranks, sizes are 1, 2 and 14; two short samples cannot fill the ranks, so all ranks share both."""
    assert sizes_of(14, [*POWERS[:4], 14]) == [1, 2, 14]
    assert groups(megatron([50, 50], 14, [*POWERS[:4], 14], 100)) == [[(14, [0, 1])]]


def test_free_ranks_double_the_smallest_groups() -> None:
    """Three equal samples on four ranks: the oldest group doubles."""
    assert describe_degrees(megatron([90, 90, 90], 4, POWERS[:3], 100)) == "[2 1x2]"


def test_the_work_of_a_rank_is_bounded() -> None:
    """A rank takes short samples up to the work of one that is full of the longest, then the next micro-batch does.

    The longest has 80 of 100 tokens, so that a rank may have 1.05 * 80 * 100 of work: 6400 of it, and 1600 of 40 more
    tokens, are within that; memory is not.
    """
    assert groups(megatron([80, 40], 1, [1], 100)) == [[(1, [0])], [(1, [1])]]
    assert groups(megatron([80, 20], 1, [1], 100)) == [[(1, [0, 1])]]
    assert groups(megatron([100, 100, 95], 2, [1, 2], 100)) == [[(1, [0]), (1, [1])], [(2, [2])]]


def slowly(lengths: list[int], num_ranks: int, sizes: list[int], limit: int) -> list[list[tuple[int, list[int]]]]:
    """The rule, candidate by candidate, with the work of every rank written out; expanding is left to the plan."""
    waiting = sorted(range(len(lengths)), key=lambda s: (-lengths[s], s))
    told: list[list[tuple[int, list[int]]]] = []
    while waiting:
        cap = lengths[waiting[0]] * limit * 1.05
        held: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for sample in waiting:
            candidates: list[tuple[float, int, int]] = []
            for size in sizes:
                if size * limit < lengths[sample] or (not held and candidates):
                    continue
                for number in range(len(held) + 1):
                    after = [(d, [*s]) for d, s in held]
                    if number == len(held):
                        after.append((size, [sample]))
                    elif held[number][0] == size:
                        after[number][1].append(sample)
                    else:
                        continue
                    fits = sum(d for d, _ in after) <= num_ranks
                    fits &= all(sum(lengths[x] for x in s) <= d * limit for d, s in after)
                    busiest = max(sum(lengths[x] ** 2 / d for x in s) for d, s in after)
                    if fits and (busiest <= cap or not held):
                        candidates.append((busiest, size, number))
            if not candidates:
                left.append(sample)
                continue
            _, size, number = min(candidates)
            if number == len(held):
                held.append((size, [sample]))
            else:
                held[number][1].append(sample)
        told.append(held)
        waiting = left
    return told


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=25), st.sampled_from([1, 4, 8]))
def test_the_rule(lengths: list[int], num_ranks: int) -> None:
    """Samples are together as the rule says, in the same micro-batches; only degrees may be larger, to fill ranks."""
    limit = -(-400 // num_ranks) if num_ranks < 4 else 100
    sizes = [d for d in POWERS if d <= num_ranks]
    planned = groups(megatron(lengths, num_ranks, sizes, limit))
    told = slowly(lengths, num_ranks, sizes, limit)
    assert [sorted(sorted(s) for _, s in m) for m in planned] == [sorted(sorted(s) for _, s in m) for m in told]
    for micro_batch, before in zip(planned, told, strict=True):
        assert sum(degree for degree, _ in micro_batch) == num_ranks
        degree_of = {min(samples): degree for degree, samples in micro_batch}
        assert all(degree_of[min(samples)] >= degree for degree, samples in before)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.sampled_from([4, 6, 8, 14]))
def test_a_valid_plan(lengths: list[int], num_ranks: int) -> None:
    """Each sample once, and no rank above its limit of tokens."""
    degrees = sorted({*(d for d in POWERS if d <= num_ranks), num_ranks})
    plan = megatron(lengths, num_ranks, degrees, 100)
    assert plan.num_samples == len(lengths)
    for group in plan.groups:
        assert sum(lengths[sample] for sample in group.samples) <= group.degree * 100
        assert not group.samples or group.degree in sizes_of(num_ranks, degrees)
