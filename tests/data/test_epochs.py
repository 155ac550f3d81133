"""What an epoch trains on is known before its first step is planned, and not taken for known before that."""

from __future__ import annotations

import weakref
from typing import Any

import datasets
import numpy as np
import pytest
import torch.distributed as dist
from helpers import ScriptedPlanner, run_ranks, scripted

from hf_hetero.collators import PackedCollator
from hf_hetero.data.counting import COMPARED, Counted
from hf_hetero.data.epochs import Epochs, KeptCounts
from hf_hetero.data.plan_ahead import PlanAhead
from hf_hetero.data.planning import Planning
from hf_hetero.data.sampler import GlobalBatches, StepDataset
from hf_hetero.errors import BadSample
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.samples.samples import whole_rows


class Told:
    """Rows get longer with each epoch."""

    def __init__(self) -> None:
        self.epoch = -1

    def __len__(self) -> int:
        return 4

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": [1] * (1 + row + 10 * self.epoch)}


def epochs_of(dataset: Any, batches: GlobalBatches) -> tuple[Epochs, list[int]]:
    counts: list[int] = []

    def read() -> tuple[Counted, str]:
        counts.append(1)
        lengths = [len(dataset[row]["input_ids"]) for row in range(len(dataset))]
        return Counted(len(lengths), whole_rows(np.asarray(lengths)), None), f"{lengths}"

    return Epochs(batches, StepDataset(dataset), read, None), counts


def nothing() -> None:
    pass


def test_most_datasets_are_counted_once() -> None:
    """Then plans go on across the border of epochs."""
    epochs, counts = epochs_of([{"input_ids": [1]}] * 4, GlobalBatches(4, 2, 0))
    for epoch in range(3):
        epochs.begin(epoch, nothing)
    assert len(counts) == 1
    assert epochs.draws.after((0, 1)) == (1, 0)
    assert list(epochs.content) == ["lengths"]


def test_a_dataset_that_is_told_of_epochs() -> None:
    """It is told before it is read, counted in each epoch, and planned up to the border only."""
    epochs, counts = epochs_of(Told(), GlobalBatches(4, 2, 0, shuffle=False))
    assert not counts
    for epoch in (0, 1, 5):
        epochs.begin(epoch, nothing)
        drawn = epochs.draws.draw(epoch, 1)
        assert drawn is not None
        assert drawn.lengths == (3 + 10 * epoch, 4 + 10 * epoch)
    assert epochs.draws.after((5, 0)) == (5, 1)
    assert epochs.draws.after((5, 1)) is None
    assert (len(counts), epochs.content) == (3, {})


def test_an_order_that_is_drawn() -> None:
    """A sampler is asked when an epoch begins, and its plans of an epoch that was cut short are forgotten."""
    orders = {0: [3, 2, 1, 0], 1: [0, 2]}

    class Sampler:
        def __init__(self) -> None:
            self.turn = -1

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            self.turn += 1
            return iter(orders[self.turn][:2])

    rows = [{"input_ids": [1] * n} for n in (1, 2, 3, 4)]
    epochs, counts = epochs_of(rows, GlobalBatches(4, 1, 0, sampler=Sampler()))
    plans = PlanAhead(scripted(ScriptedPlanner(1)), epochs.draws, num_ahead=3)
    for first in (3, 0):
        epochs.begin(0, plans.forget)
        step = plans.step(0, 0)
        assert step is not None
        assert step.rows == (first,)
        plans.step(0, 1) if first == 0 else None
    assert len(counts) == 1
    plans.close()


def test_another_number_of_rows_in_another_epoch() -> None:
    """The number of steps was fixed by the first one: refused in words."""
    data = [{"input_ids": [1]}] * 4
    with pytest.raises(BadSample, match="has 4 rows now, and had 5 when training started"):
        epochs_of(data, GlobalBatches(5, 2, 0))


class Rows:
    """Rows of some tokens each; counts how many were read."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.num_read = lengths, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.num_read += 1
        return {"input_ids": [1] * self.lengths[row]}


class ToldRows(Rows):
    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


LENGTHS = [3, 5] * 1000


def reading(kept: KeptCounts, dataset: Any, most_tokens: int | None = None, **collator: Any) -> tuple[list[int], int]:
    """Tokens of each row, and how many rows were read to know them."""
    planner = ScriptedPlanner(1)
    planning = Planning(scripted(planner), 0, "length", None, most_tokens, "truncate")
    before = getattr(dataset, "num_read", 0)
    found, _ = kept.read(dataset, planning, StepDataset(dataset), PackedCollator(**collator))
    assert found.samples is not None
    return found.samples.lengths.tolist(), getattr(dataset, "num_read", 0) - before


def test_a_dataset_is_not_counted_twice() -> None:
    """The second time only some rows are read, however large it is."""
    kept, rows = KeptCounts(), Rows(LENGTHS)
    assert reading(kept, rows)[1] > len(rows)
    assert reading(kept, rows) == (LENGTHS, COMPARED)


def test_a_dataset_that_is_not_the_same_is_counted_again() -> None:
    """Other rows, more rows, another limit or collator, an error meanwhile, or epochs that it is told of."""
    kept, rows = KeptCounts(), Rows(LENGTHS)
    reading(kept, rows)
    rows.lengths = [length + 1 for length in LENGTHS]
    assert reading(kept, rows)[0] == rows.lengths
    rows.lengths = [*rows.lengths, 7]
    assert reading(kept, rows)[0] == rows.lengths
    assert reading(kept, rows, most_tokens=5)[0] == [min(length, 5) for length in rows.lengths]
    assert reading(kept, rows, most_tokens=5, example_collator=doubling)[1] > len(rows)
    assert reading(kept, rows, most_tokens=5, example_collator=doubling)[1] == COMPARED
    kept.forget(rows)
    assert reading(kept, rows, most_tokens=5, example_collator=doubling)[1] > len(rows)
    told = ToldRows(LENGTHS)
    reading(kept, told)
    assert reading(kept, told)[1] > len(told)


def doubling(examples: list[Any]) -> dict[str, Any]:
    return {"input_ids": [example["input_ids"] * 2 for example in examples]}


def test_counts_end_with_their_dataset() -> None:
    """A dataset is not kept alive, and another one in its place is not taken for it; a list is counted each time."""
    kept, rows = KeptCounts(), Rows(LENGTHS)
    reading(kept, rows)
    gone = weakref.ref(rows)
    del rows
    assert gone() is None
    listed = [{"input_ids": [1] * length} for length in LENGTHS]
    assert reading(kept, listed)[0] == LENGTHS
    listed[7] = {"input_ids": [1] * 9}
    assert reading(kept, listed)[0][7] == 9


def test_a_tables_counts_hold_as_long_as_its_fingerprint() -> None:
    """A transform makes other rows of the same table."""
    kept, table = KeptCounts(), datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 600})
    assert reading(kept, table)[0] == [3] * 600
    table.set_transform(lambda batch: {"input_ids": [[*ids, 4] for ids in batch["input_ids"]]})
    assert reading(kept, table)[0] == [4] * 600


def known_by_one() -> list[int]:
    """Rows read by this rank where only rank 0 has forgotten what it knew, and then where both know."""
    control = GroupPool((), 60, 60).control
    planning = Planning(scripted(ScriptedPlanner(2)), 0, "length", control)
    kept, rows, found = KeptCounts(), Rows(LENGTHS), list[int]()
    for _ in range(3):
        before = rows.num_read
        kept.read(rows, planning, StepDataset(rows), PackedCollator())
        found.append(rows.num_read - before)
        if len(found) == 1 and dist.get_rank() == 0:
            kept.forget(rows)
    return found


def test_ranks_know_or_count_together() -> None:
    """What one of them does not know, all count."""
    first, second = run_ranks(known_by_one, 2)
    assert min(first[1], second[1]) > len(LENGTHS) // 2
    assert (first[2], second[2]) == (COMPARED, 0)
