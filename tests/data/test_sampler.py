"""Steps take the samples that transformers' Trainer takes, in its order; a rank reads only what it holds."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from helpers import LENGTHS, ScriptedPlanner, samples

from hf_hetero import Group, HeteroError, MicroBatch, Plan
from hf_hetero.data.sampler import GlobalBatches, StepDataset, StepSampler, order_of
from hf_hetero.samples.samples import Drawn, whole_rows
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


@pytest.mark.parametrize(("num_dropped", "sizes"), [(0, [4, 4, 2]), (1, [4, 4, 1]), (2, [4, 4])])
def test_last_batch(num_dropped: int, sizes: list[int]) -> None:
    """A last batch that is not full is kept, less the rows that are to be dropped."""
    batches = GlobalBatches(10, 4, seed=0, num_dropped=num_dropped)
    assert [len(batches.rows(0, index)) for index in range(len(batches))] == sizes


def test_no_shuffle_keeps_the_order() -> None:
    """Sequential sampling is the dataset's order in every epoch."""
    assert GlobalBatches(5, 3, seed=0, shuffle=False).rows(4, 1) == (3, 4)


def test_the_datasets_order_costs_nothing() -> None:
    """A step of a million rows in their own order takes no list of them all."""
    batches = GlobalBatches(1_000_000, 8, seed=0, shuffle=False)
    tracemalloc.start()
    assert batches.rows(0, 124_999) == tuple(range(999_992, 1_000_000))
    for index in range(0, len(batches), 10):
        batches.rows(0, index)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000
    assert not batches._orders


SAMPLERS: dict[str, Any] = {
    "random": lambda data: torch.utils.data.RandomSampler(data),
    "replacement": lambda data: torch.utils.data.RandomSampler(data, replacement=True, num_samples=17),
    "generator": lambda data: torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(3)),
    "sequential": lambda data: torch.utils.data.SequentialSampler(data),
    "a part": lambda _: torch.utils.data.RandomSampler(range(7)),
    "a part, often": lambda _: torch.utils.data.RandomSampler(range(7), num_samples=23),
    "the first": lambda _: torch.utils.data.SequentialSampler(range(5)),
    "weighted": lambda _: torch.utils.data.WeightedRandomSampler([1.0, 2.0, 3.0], 9),
    "subset": lambda _: torch.utils.data.SubsetRandomSampler([5, 2, 7]),
}


@pytest.mark.parametrize("is_seedable", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_orders_are_those_of_accelerates_loaders(kind: str, num_ranks: int, is_seedable: bool) -> None:
    """Whatever the sampler, epochs take the rows that a loader prepared by accelerate takes, in its order."""
    data = list(range(23))

    def theirs() -> list[list[int]]:
        torch.manual_seed(11)
        options = {"put_on_device": False, "even_batches": False, "use_seedable_sampler": is_seedable}
        found: list[list[list[int]]] = []
        for rank in range(num_ranks):
            torch.manual_seed(11)
            loader = torch.utils.data.DataLoader(data, 1, sampler=SAMPLERS[kind](data), collate_fn=list)  # type: ignore[arg-type]
            prepared = prepare_data_loader(loader, num_processes=num_ranks, process_index=rank, **options)
            epochs = []
            for epoch in range(2):
                prepared.set_epoch(epoch)
                epochs.append([row for batch in prepared for row in batch])
            found.append(epochs)
        turns = []
        for epoch in range(2):
            longest = max(len(rank[epoch]) for rank in found)
            turns.append([rank[epoch][turn] for turn in range(longest) for rank in found if turn < len(rank[epoch])])
        return turns

    def ours() -> list[list[int]]:
        torch.manual_seed(11)
        order = order_of(SAMPLERS[kind](data), data, is_seedable, num_ranks, data_seed=None)
        batches = GlobalBatches(23, 4, torch.random.initial_seed(), order.shuffle, sampler=order.sampler)
        epochs = []
        for epoch in range(2):
            torch.empty((), dtype=torch.int64).random_()  # torch's loaders seed their workers first
            batches.begin(epoch)
            epochs.append([row for index in range(len(batches)) for row in batches.rows(epoch, index)])
        return epochs

    assert ours() == theirs()


def test_a_sampler_must_give_what_it_says() -> None:
    """Rows that are not there, or another number of them, are refused with the sampler's name."""

    class Wrong(list[int]):
        def __len__(self) -> int:
            return 3

    with pytest.raises(HeteroError, match="Wrong gave 2 rows in epoch 4, but its len is 3"):
        GlobalBatches(10, 2, 0, sampler=Wrong([1, 2])).begin(4)
    with pytest.raises(HeteroError, match="list gave row 10; the dataset has 10 rows"):
        GlobalBatches(10, 2, 0, sampler=[1, 10]).begin(0)


def test_rows_keep_what_the_model_takes() -> None:
    """Keys that the model does not take go, as with transformers' RemoveColumnsCollator; what is no dict stays."""
    from transformers import BatchEncoding

    rows: list[Any] = [{"input_ids": [1], "note": "a"}, BatchEncoding({"input_ids": [2], "note": "b"})]
    plain, encoding = StepDataset(rows, names=["input_ids"]).read([0, 1])
    assert plain == {"input_ids": [1]}
    assert encoding is rows[1]
    assert StepDataset(rows).read([0]) == rows[:1]


def test_a_workers_copy_learns_of_the_epoch() -> None:
    """A copy of the dataset that nobody told of the epoch is told by the first step of it."""

    class Told:
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch: int) -> None:
            self.epochs += (epoch,)

        def __getitem__(self, row: int) -> Any:
            return {"input_ids": [row] * LENGTHS[row]}

    data = Told()
    reader = StepDataset(data)
    for epoch, index in [(1, 0), (1, 1), (2, 0)]:
        share = next(iter(StepSampler(GlobalBatches(24, 12, 0), make_step, 0, first=lambda at=(epoch, index): at)))
        reader.__getitems__(share)
    assert data.epochs == (1, 2)


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
        held = {
            group.samples[span.sample]
            for group in share.groups
            for span in share.layout(group).spans[group.ranks.index(rank)]
        }
        assert set(read.examples) == held
        assert sorted(asked[-1]) == sorted(share.step.rows[position] for position in held)
    assert set().union(*asked) == set(make_step(0, 0).rows)


def test_trained_steps_are_not_planned() -> None:
    """When a run resumes, it begins in the middle of its epoch; the next one begins at its start."""
    planned: list[tuple[int, int]] = []

    def plan_step(epoch: int, index: int) -> Step:
        planned.append((epoch, index))
        return make_step(epoch, index)

    sampler = StepSampler(GlobalBatches(36, 12, 0), plan_step, 0, first=lambda: (3, 2))
    assert len(list(sampler)) == 1
    assert len(list(sampler)) == 3
    assert planned == [(3, 2), (4, 0), (4, 1), (4, 2)]


class Raises:
    """A dataset whose row 11 cannot be read."""

    def __init__(self, error: BaseException, at_once: bool) -> None:
        self.error = error
        if at_once:
            self.__getitems__ = lambda rows: [self[row] for row in rows]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        if row == 11:
            raise self.error
        return {"input_ids": [1]}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("error", [KeyError("tokens"), MemoryError(), StopIteration()], ids=lambda e: type(e).__name__)
def test_a_row_that_cannot_be_read_is_named(error: Exception, at_once: bool) -> None:
    """Whatever the dataset raises: its kind and the row; not the end of the data, nor a class that others lack."""
    plan = Plan(1, (MicroBatch((Group((0,), (0, 1, 2)),)),))
    step = Step(0, 0, Drawn((10, 11, 12), (0, 0, 0), (1, 1, 1), (1, 1, 1)), plan)
    where = "rows 10, 11, 12" if at_once else "row 11"
    with pytest.raises(HeteroError, match=f"Reading {where} failed: {type(error).__name__}"):
        StepDataset(Raises(error, at_once)).__getitems__(StepShare(step, 0))


def test_no_rows_are_not_read() -> None:
    """A rank that holds no tokens asks its dataset for nothing: a transform need not know what to make of no rows."""

    class Transformed:
        def __len__(self) -> int:
            return 4

        def __getitems__(self, rows: list[int]) -> list[dict[str, list[int]]]:
            return [{"input_ids": [max(rows)]} for _ in rows or [1 / 0]]

    groups = (Group((0,), (0, 1, 2, 3)), Group((1,), ()))
    step = Step(0, 0, whole_rows([1, 1, 1, 1]).of([0, 1, 2, 3]), Plan(2, (MicroBatch(groups),)))
    assert StepDataset(Transformed()).__getitems__(StepShare(step, 1)).examples == {}
