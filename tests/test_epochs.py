"""What an epoch trains on is known before its first step is planned, and not taken for known before that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import ScriptedPlanner, scripted

from hf_hetero.counting import Counted
from hf_hetero.epochs import Epochs
from hf_hetero.errors import BadSample
from hf_hetero.plan_ahead import PlanAhead
from hf_hetero.sampler import GlobalBatches, StepDataset
from hf_hetero.samples import whole_rows


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
