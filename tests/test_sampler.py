"""Steps take the samples that transformers' Trainer takes, in its order; a rank reads only what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from helpers import LENGTHS, ScriptedPlanner, samples

from hf_hetero import HeteroError
from hf_hetero.sampler import GlobalBatches, StepDataset, StepSampler
from hf_hetero.samples import whole_rows
from hf_hetero.step import Step, StepShare


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_order_is_accelerates(epoch: int) -> None:
    """The permutation of an epoch is that of accelerate's SeedableRandomSampler, seeded alike."""
    torch.manual_seed(7)
    theirs = SeedableRandomSampler(range(23), generator=torch.Generator(), data_seed=11)
    theirs.set_epoch(epoch)
    batches = GlobalBatches(23, batch_size=4, seed=11)
    ours = [row for index in range(len(batches)) for row in batches.rows(epoch, index)]
    assert ours == list(theirs)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_last_batch(drop_last: bool, sizes: list[int]) -> None:
    """A last batch that is not full is kept, unless it is to be dropped."""
    batches = GlobalBatches(10, 4, seed=0, drop_last=drop_last)
    assert [len(batches.rows(0, index)) for index in range(len(batches))] == sizes


def test_no_shuffle_keeps_the_order() -> None:
    """Sequential sampling is the dataset's order in every epoch."""
    assert GlobalBatches(5, 3, seed=0, shuffle=False).rows(4, 1) == (3, 4)


def make_step(epoch: int, index: int) -> Step:
    rows = GlobalBatches(len(LENGTHS), 12, seed=0).rows(epoch, index)
    lengths = tuple(LENGTHS[row] for row in rows)
    return Step(epoch, index, whole_rows(LENGTHS).of(rows), ScriptedPlanner(4).plan(lengths))


def test_ranks_read_what_they_hold() -> None:
    """Each rank reads the samples of its spans; a sample that ranks share is read by those that hold tokens of it."""
    asked: list[list[int]] = []

    class Recording:
        def __getitems__(self, rows: list[int]) -> list[Any]:
            asked.append(rows)
            return [samples(LENGTHS)[row] for row in rows]

    for rank in range(4):
        share = next(iter(StepSampler(GlobalBatches(24, 12, 0), make_step, rank)))
        read = StepDataset(Recording()).__getitems__(share)
        assert share is not None
        held = {
            group.samples[span.sample]
            for group in share.groups
            for span in share.layout(group).spans[group.ranks.index(rank)]
        }
        assert set(read.examples) == held
        assert sorted(asked[-1]) == sorted(share.step.rows[position] for position in held)
    assert set().union(*asked) == set(make_step(0, 0).rows)


def test_trained_steps_are_not_planned() -> None:
    """When a run resumes, the steps it skips cost no plan, in the first epoch only."""
    planned: list[tuple[int, int]] = []

    def plan_step(epoch: int, index: int) -> Step:
        planned.append((epoch, index))
        return make_step(epoch, index)

    sampler = StepSampler(GlobalBatches(36, 12, 0), plan_step, 0, num_trained=lambda: 2)
    assert [item is None for item in sampler] == [True, True, False]
    sampler.batch_sampler.set_epoch(1)
    assert [item is None for item in sampler] == [False] * 3
    assert planned == [(0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_trained_step_is_never_read() -> None:
    """If a loader asks for one all the same, that is an error and not an empty step."""
    with pytest.raises(HeteroError, match="already trained"):
        StepDataset([]).__getitems__(None)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_row_that_stops_iteration_is_an_error(at_once: bool) -> None:
    """The loader would take StopIteration for the end of the epoch, and its samples would be lost without a word."""

    class Stops:
        def __getitem__(self, row: int) -> Any:
            return next(iter(()))

    class StopsAtOnce(Stops):
        def __getitems__(self, rows: list[int]) -> Any:
            return [self[row] for row in rows]

    share = StepShare(make_step(0, 0), 0)
    with pytest.raises(HeteroError, match="raised StopIteration for one of the rows"):
        StepDataset(StopsAtOnce() if at_once else Stops()).__getitems__(share)
