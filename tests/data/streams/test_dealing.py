"""A stream's steps come epoch by epoch, each with the examples its rank needs, however an epoch is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ScriptedPlanner
from torch.utils.data import IterableDataset

from hf_hetero import HeteroError, Plan
from hf_hetero.data.lengths import read_samples
from hf_hetero.data.streams.dealing import DealtDataset, StreamSampler, pickled_parts
from hf_hetero.data.streams.reading import Position, Reading
from hf_hetero.data.streams.stream import Stream
from hf_hetero.step import Step

NUM_ROWS, BATCH = 10, 4


class Rows(IterableDataset[Any]):
    """Tells epochs apart."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter([{"input_ids": [100 * self.epoch + n]} for n in range(NUM_ROWS)])


def sampler_of(num_rows: int | None = None, **options: Any) -> tuple[StreamSampler, Stream]:
    """Of one process, which plans as it reads."""
    reading = Reading(Rows(), BATCH, lambda examples: read_samples(examples, "length"))
    stream = Stream(reading, num_ahead=1, one_by_one=options.pop("one_by_one", False))

    def plan_step(epoch: int, index: int) -> Step | None:
        if (batch := stream.batch(epoch, index)) is None:
            return None
        plan: Plan = ScriptedPlanner(1).plan(batch.drawn.lengths)
        return Step(epoch, index, batch.drawn, plan)

    common: dict[str, Any] = {"has_workers": False, "num_trained": lambda: 0, "num_rows": num_rows}
    return StreamSampler(stream, plan_step, None, batch_size=BATCH, **{**common, **options}), stream


def opened(dealt: Any) -> list[int] | None:
    """The token of each example; None for a step that was trained."""
    if dealt is None:
        return None
    examples = DealtDataset().__getitems__(dealt).examples
    return [examples[position]["input_ids"][0] for position in sorted(examples)]


EPOCH = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def of_epoch(epoch: int) -> list[list[int]]:
    return [[100 * epoch + n for n in batch] for batch in EPOCH]


@pytest.mark.parametrize("num_rows", [None, NUM_ROWS])
@pytest.mark.parametrize("options", [{}, {"has_workers": True}, {"one_by_one": True}])
def test_epoch_after_epoch(num_rows: int | None, options: dict[str, Any]) -> None:
    """Each iteration is an epoch; a stream of known length need not be asked for its end."""
    sampler, stream = sampler_of(num_rows, **options)
    for epoch in range(3):
        steps = iter(sampler)
        assert [opened(next(steps)) for _ in range(3)] == of_epoch(epoch)
        if num_rows is None:
            assert next(steps, None) is None
    stream.close()


@pytest.mark.parametrize("num_rows", [None, NUM_ROWS, 4])
def test_an_epoch_left_early(num_rows: int | None) -> None:
    """The next one starts at the stream's start, also where the stream is longer than it says."""
    sampler, stream = sampler_of(num_rows)
    for epoch in range(3):
        assert opened(next(iter(sampler))) == of_epoch(epoch)[0]
    stream.close()


def test_trained_steps_are_left_out() -> None:
    """As many as Trainer skips, from where a checkpoint says, or else counted from the start."""
    for options in ({"kept": Position(1, 2, 8)}, {"num_trained": lambda: 5}):
        sampler, stream = sampler_of(**options)
        steps = list(sampler)
        assert [opened(step) for step in steps if step is not None] == of_epoch(1)[2:]
        assert [opened(step) for step in sampler] == of_epoch(2)
        stream.close()
    anew, stream = sampler_of(num_trained=lambda: 5, skips=False)
    assert [opened(step) for step in anew] == of_epoch(0)
    stream.close()


def test_length() -> None:
    """Steps of an epoch, where the stream knows; else what has no length says so as Python does."""
    assert len(sampler_of(NUM_ROWS)[0]) == 3
    assert len(DealtDataset(NUM_ROWS)) == NUM_ROWS
    for without in (sampler_of()[0], DealtDataset()):
        with pytest.raises(TypeError, match="no length"):
            len(without)


def test_what_cannot_be_pickled() -> None:
    """Every rank gets the same error, with the row; examples that can are each in one piece."""
    drawn = read_samples([{"input_ids": [1, 2]}] * 3, "length").of(range(3))
    step = Step(0, 0, drawn, ScriptedPlanner(2).plan(drawn.lengths))
    examples: dict[int, Any] = {n: {"input_ids": [1, 2]} for n in range(3)}
    assert all(isinstance(part, bytes) for part in pickled_parts(step, examples))
    examples[1]["handle"] = (n for n in range(3))
    for part in pickled_parts(step, examples):
        assert isinstance(part, HeteroError)
        assert "Row 1 of the stream, with ['handle', 'input_ids'], cannot be handed" in str(part)
