"""What a rank does in a step, and what it is told, grows with the ranks and with the samples, never with both at once.

Where there are four times as many ranks, and four times as many samples, whatever is in proportion to either is four
times as much, and what is in proportion to their product sixteen times. Nothing here is timed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import datasets
import pytest
from planner.reference import small_cost
from work import Work, counted, peak_bytes

from benchmarks.scale.ranks_as_threads import World
from benchmarks.scale.run_of_many_ranks import Seen, Setup, rank_of_a_run
from hf_hetero import Group, MicroBatch, Plan, Planner
from hf_hetero.data.plan_sources import PlansOfThisProcess
from hf_hetero.layout import Layout, Span, equal_splits, layout_of
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import Step, StepShare, samples_by_rank

SIZES = (64, 256)
"""Ranks."""
SAMPLES_A_RANK = 4
LINEAR, QUADRATIC = 5.5, 9.0
"""Growth from one size to the other: at most of what is in proportion; at least of what is not."""


def growth(values: Sequence[int], least: int = 0) -> float:
    """Growth from the first to the last; what is less than `least` may change for any reason."""
    return (least + values[-1]) / (least + values[0])


def lengths_of(num_samples: int, num_long: int = 0) -> list[int]:
    return [20_000] * num_long + [1 + (37 * sample) % 251 for sample in range(num_samples - num_long)]


def a_step(groups: Sequence[Group], lengths: Sequence[int]) -> Step:
    num_ranks, num = sum(group.degree for group in groups), len(lengths)
    drawn = Drawn(tuple(range(num)), (0,) * num, tuple(lengths), tuple(lengths))
    return Step(0, 0, drawn, Plan(num_ranks, (MicroBatch(tuple(groups)),)))


def together(num_ranks: int, method: str = "ulysses", num_long: int = 0) -> Step:
    """All ranks share all samples."""
    num_samples = SAMPLES_A_RANK * num_ranks
    return a_step(
        [Group(tuple(range(num_ranks)), tuple(range(num_samples)), method)], lengths_of(num_samples, num_long)
    )


def alone(num_ranks: int) -> Step:
    """Each rank has its own samples."""
    groups = [Group((rank,), tuple(range(4 * rank, 4 * rank + 4))) for rank in range(num_ranks)]
    return a_step(groups, lengths_of(SAMPLES_A_RANK * num_ranks))


STEPS: dict[str, Callable[[int], Step]] = {
    "together": together,
    "in a ring": lambda num_ranks: together(num_ranks, "ring", num_long=3),
    "alone": alone,
}
READS: dict[str, Callable[[Step], Any]] = {
    "samples": lambda step: StepShare(step, step.plan.num_ranks // 2).samples(),
    "layout": lambda step: StepShare(step, 0).layout(StepShare(step, 0).groups[0]),
    "shared rows": lambda step: step.shared_rows(),
    "digest": lambda step: step.digest(),
    "samples of all": samples_by_rank,
    "message": lambda step: pickle.loads(pickle.dumps(step)),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("read", READS)
def test_a_step_is_read_in_proportion(kind: str, read: str) -> None:
    """Instructions and memory of what each rank looks up in a step, where all ranks share it, or none do."""
    instructions: list[int] = []
    held: list[int] = []
    for num_ranks in SIZES:
        step = STEPS[kind](num_ranks)
        with counted() as work:
            READS[read](step)
        instructions.append(work.instructions)
        held.append(peak_bytes(partial(READS[read], step)))
    assert growth(instructions, least=1000) < LINEAR, instructions
    assert growth(held, least=10_000) < LINEAR, held


def sliced_by_rank(lengths: Sequence[int], degree: int) -> Layout:
    """Contiguous slices as anybody would define them: of each rank, what each sample has in its bounds."""
    starts = (0, *accumulate(lengths))
    spans = tuple(
        tuple(
            Span(sample, max(low - start, 0), min(high - start, length))
            for sample, (start, length) in enumerate(zip(starts, lengths, strict=False))
            if max(low, start) < min(high, start + length)
        )
        for low, high in pairwise((0, *accumulate(equal_splits(sum(lengths), degree))))
    )
    return Layout(tuple(lengths), spans)


def readers_by_row(step: Step) -> tuple[int, ...]:
    """Shared rows by their definition: those that a set of more than one rank may read."""
    readers: dict[int, set[int]] = {}
    for group in step.plan.groups:
        for sample in group.samples:
            readers.setdefault(step.rows[sample], set()).update(group.ranks)
    return tuple(sorted(row for row, ranks in readers.items() if len(ranks) > 1))


def test_what_is_quadratic_would_be_noticed() -> None:
    """The definitions, which look at each rank and each sample, are refused by the same measure; and give the same."""
    instructions: list[int] = []
    held: list[int] = []
    for num_ranks in SIZES:
        step = together(num_ranks)
        with counted() as work:
            sliced = sliced_by_rank(step.lengths, num_ranks)
        instructions.append(work.instructions)
        assert sliced == layout_of(next(iter(step.plan.groups)), step.lengths)
        held.append(peak_bytes(partial(readers_by_row, step)))
    assert growth(instructions) > QUADRATIC
    assert growth(held) > QUADRATIC
    for kind in STEPS.values():
        assert readers_by_row(kind(64)) == kind(64).shared_rows()


# -------------------------------------------------------------------------------------------------------------- the run


def a_run(num_ranks: int, num_steps: int, **options: Any) -> Setup:
    """Short samples, and some that only many ranks hold together."""
    cost = small_cost(400, (2, 4, 8, 16, 32, 64))
    lengths = [4000 if row % 97 == 5 else 1 + (37 * row) % 251 for row in range(SAMPLES_A_RANK * num_ranks * num_steps)]
    table = {"input_ids": [[row % 100] * length for row, length in enumerate(lengths)], "length": lengths}
    source = PlansOfThisProcess(lambda: Planner(cost, num_ranks, solver="fast"))
    batch_size = SAMPLES_A_RANK * num_ranks
    return Setup(datasets.Dataset.from_dict(table), cost, num_ranks, batch_size, num_steps, source, **options)


def ran(world: World, setup: Setup) -> dict[int, Seen]:
    return world.run(lambda rank: rank_of_a_run(setup, rank))


def check_run(setup: Setup, found: dict[int, Seen], num_ranks: int) -> None:
    """All ranks have trained on the same steps, and all tokens of them, once."""
    assert len(found) == num_ranks
    assert len({tuple(seen.digests) for seen in found.values()}) == 1
    assert sum(sum(seen.tokens) for seen in found.values()) == sum(setup.dataset["length"])


def test_a_run_of_64_ranks() -> None:
    """Sampler, plan-ahead, agreement, loader, report and callbacks of 64 ranks: the same steps on all, each token once.

    Ranks that are not there, for which others speak, change nothing of what a rank is told.
    """
    setup, world, fewer = a_run(64, 3), World(64), World(64, [0, 40])
    check_run(setup, ran(world, setup), 64)
    ran(fewer, setup)
    for rank in (0, 40):
        assert fewer.num_messages[rank] == world.num_messages[rank]
        assert dict(fewer.received_bytes[rank]) == pytest.approx(dict(world.received_bytes[rank]), rel=0.01)


def test_a_rank_that_fails_ends_the_run() -> None:
    """The stand-in for a network loses no rank in silence: what one raises is raised, and none is left waiting."""

    def failing(rank: int) -> Seen:
        if rank == 3:
            raise KeyError("row 7")
        return rank_of_a_run(setup, rank)

    setup = a_run(8, 1)
    with pytest.raises(KeyError, match="row 7"):
        World(8, patience_s=20).run(failing)


def test_a_step_of_more_ranks() -> None:
    """What a rank is told, and what it has to do for a step, is in proportion to ranks and samples."""
    told: dict[int, list[int]] = {0: [], 1: []}
    done: dict[int, list[int]] = {0: [], 1: []}
    for num_ranks in SIZES:
        works: dict[tuple[int, int], Work] = {}

        @contextmanager
        def around(rank: int, step: int, works: dict[tuple[int, int], Work] = works) -> Iterator[None]:
            with counted() as works[rank, step]:
                yield

        world = World(num_ranks, [0, num_ranks // 2])
        ran(world, a_run(num_ranks, 2, around=around))
        for place, rank in enumerate(world.present):
            told[place].append(sum(world.received_bytes[rank].values()))
            done[place].append(works[rank, 2].instructions)
    for place in (0, 1):
        assert growth(told[place]) < LINEAR, told
        assert growth(done[place]) < LINEAR, done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_of_1024_ranks() -> None:
    """The same with 1,024 ranks, each of them there."""
    setup, world = a_run(1024, 2), World(1024)
    check_run(setup, ran(world, setup), 1024)
    # of all exchanges of a step and at the start, less than 3 KiB for each rank, and 100 bytes for each sample
    received = {rank: sum(counts.values()) for rank, counts in world.received_bytes.items()}
    assert max(received.values()) < 2 * 1024 * (3 * 1024 + 100 * SAMPLES_A_RANK)
