"""A stream is read in order, once, never further ahead than allowed; and found again where it was left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from hf_hetero import HeteroError
from hf_hetero.data.lengths import read_samples, tells_where_it_is
from hf_hetero.data.streams.reading import Position, Reading
from hf_hetero.data.streams.stream import Stream, check_whole, is_stream
from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.samples.samples import Samples

NUM_ROWS, BATCH = 10, 4


def row(number: int, epoch: int = 0) -> dict[str, Any]:
    return {"input_ids": [number + 100 * epoch] * (1 + number % 3), "text": "aside"}


class Rows(IterableDataset[Any]):
    """Counts what was read of it; tells epochs apart."""

    def __init__(self, num_rows: int = NUM_ROWS, most_epochs: int = 99) -> None:
        self.num_rows, self.most_epochs = num_rows, most_epochs
        self.num_read, self.epoch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.num_rows if self.epoch < self.most_epochs else 0):
            self.num_read += 1
            yield row(number, self.epoch)


def samples_of(examples: list[Any]) -> Samples:
    return read_samples(examples, "length")


def started(dataset: Any, num_ahead: int = 2, position: Position | None = None, step: int = 0, **more: Any) -> Stream:
    of_reading = {name: more.pop(name) for name in ("names", "seed") if name in more}
    stream = Stream(Reading(dataset, BATCH, samples_of, **of_reading), num_ahead, **more)
    stream.start(position or Position(), step)
    return stream


def tokens(batch: Any) -> list[int]:
    """The first token of each example, in order of the rows."""
    assert batch is not None
    assert list(batch.examples) == sorted(set(batch.drawn.rows))
    return [int(example["input_ids"][0]) for example in batch.examples.values()]


EPOCH = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
EPOCHS = [[100 * epoch + number for number in batch] for epoch in range(3) for batch in EPOCH]
KEYS = [(epoch, index) for epoch in range(3) for index in range(len(EPOCH))]


def place(stream: Stream, num_trained: int) -> Position:
    """Where it is, without the checksum."""
    position = stream.position(num_trained)
    assert position is not None
    return replace(position, contents=None)


def taken(stream: Stream, keys: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [tokens(stream.take(*key)) for key in keys]


def test_batches_of_epoch_after_epoch() -> None:
    """Each row once an epoch, in order; a last batch that is not full is a step of its own, and then the epoch ends."""
    stream = started(Rows())
    for epoch in range(3):
        assert taken(stream, KEYS[3 * epoch : 3 * epoch + 3]) == EPOCHS[3 * epoch : 3 * epoch + 3]
        assert stream.take(epoch, 3) is None
    stream.close()


def test_what_follows() -> None:
    """The next epoch's first batch follows the last one, as soon as it is known which is the last."""
    stream = started(Rows(), num_ahead=0)
    stream.batch(0, 0)
    assert stream.after((0, 0)) == (0, 1)
    taken(stream, KEYS[:3])
    assert stream.batch(0, 3) is None
    assert stream.after((0, 1)) == (0, 2)
    assert stream.after((0, 2)) == stream.after((0, 3)) == stream.after((0, 4)) == (1, 0)
    stream.close()


def test_no_more_than_wanted() -> None:
    """It reads as many steps as there may be, and as many epochs; nothing beyond."""
    dataset = Rows(1000)
    stream = started(dataset, num_ahead=9, num_steps=2)
    assert stream.batch(0, 2) is None
    assert dataset.num_read == 2 * BATCH
    stream.close()
    dataset = Rows()
    once = started(dataset, num_ahead=9, one_by_one=True)
    assert taken(once, KEYS[:3]) == EPOCH
    assert once.batch(0, 3) is once.batch(1, 0) is None
    assert dataset.num_read == NUM_ROWS
    once.start(Position(1), 3)
    assert tokens(once.take(1, 0)) == EPOCHS[3]
    once.close()


def test_rows_too_few_for_a_step() -> None:
    """They are a batch, but no optimizer step: positions are counted by steps, and go on in the next epoch."""
    stream = started(Rows(), min_rows=3)
    assert taken(stream, KEYS[:3]) == EPOCH
    assert place(stream, 2) == Position(0, 2, 8)
    assert stream.position(3) is None
    assert stream.take(0, 3) is None
    assert stream.position(2) == Position(1)
    assert tokens(stream.take(1, 0)) == EPOCHS[3]
    assert place(stream, 3) == Position(1, 1, 4)
    stream.close()


def test_an_epoch_may_be_left_early() -> None:
    """Started elsewhere it gives what comes there; who still waits for the epoch that was left gets None."""
    stream = started(Rows(1000), num_ahead=2)
    stream.take(0, 0)
    left: list[Any] = []
    waiting = threading.Thread(target=lambda: left.append(stream.batch(0, 99)))
    waiting.start()
    stream.start(Position(1), 1)
    assert taken(stream, [(1, 0), (1, 1)]) == [[100, 101, 102, 103], [104, 105, 106, 107]]
    waiting.join(timeout=10)
    assert left == [None]
    assert place(stream, 2) == Position(1, 1, 4)
    stream.close()


def test_lengths_and_columns() -> None:
    """A batch says how long its samples are, and keeps the columns it is told to."""
    stream = started(Rows(), names=["input_ids", "labels"])
    batch = stream.take(0, 0)
    assert batch is not None
    assert batch.drawn.lengths == (1, 2, 3, 1)
    assert batch.drawn.rows == (0, 1, 2, 3)
    assert all(list(example) == ["input_ids"] for example in batch.examples.values())
    second = stream.take(0, 1)
    assert second is not None
    assert second.drawn.rows == (4, 5, 6, 7)
    stream.close()


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
def test_reads_no_further_than_allowed(num_ahead: int) -> None:
    """However long it is left alone, it holds the next batch and those allowed ahead of it."""
    dataset = Rows(1000)
    stream = started(dataset, num_ahead)
    for step in range(3):
        stream.batch(0, step + num_ahead)  # everything allowed is there
        time.sleep(0.05)
        assert dataset.num_read == (step + num_ahead + 1) * BATCH
        stream.take(0, step)
    stream.close()


def test_a_batch_may_be_looked_at_before_it_is_taken() -> None:
    """Planning looks ahead; taking comes later and finds the same."""
    stream = started(Rows())
    ahead = [tokens(stream.batch(0, index)) for index in (2, 1, 0)]
    assert ahead == [EPOCHS[2], EPOCHS[1], EPOCHS[0]]
    assert taken(stream, KEYS[:3]) == EPOCHS[:3]
    stream.close()


@pytest.mark.parametrize("generator_seeds", [True, False])
def test_shuffles_anew_each_epoch(generator_seeds: bool) -> None:
    """`datasets` reshuffles by `set_epoch`; a dataset with a torch generator gets seed + epoch, as in transformers."""
    if generator_seeds:

        class Shuffled(IterableDataset[Any]):
            generator = torch.Generator()

            def __iter__(self) -> Iterator[Any]:
                yield from (row(n) for n in torch.randperm(8, generator=self.generator).tolist())

        orders = [torch.randperm(8, generator=torch.Generator().manual_seed(3 + epoch)).tolist() for epoch in range(2)]
        dataset: Any = Shuffled()
    else:
        table = datasets.Dataset.from_list([row(n) for n in range(8)])
        dataset = table.to_iterable_dataset().shuffle(seed=5, buffer_size=4)
        orders = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            orders.append([example["input_ids"][0] for example in dataset])
    assert orders[0] != orders[1]
    stream = started(dataset, seed=3)
    found = taken(stream, [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert [found[0] + found[1], found[2] + found[3]] == orders
    stream.close()


class Panic(BaseException):
    """As a panic of a Rust package arrives in Python."""


@pytest.mark.parametrize("kind", [OSError, StopIteration, Panic, KeyboardInterrupt, SystemExit])
def test_errors_of_the_dataset_reach_the_step(kind: type[BaseException]) -> None:
    """Whatever a dataset raises is raised where the batch is asked for, after the batches before it."""

    class Broken(Rows):
        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            self.num_read += 1
            if self.num_read == 6:
                raise kind("the connection is gone")
            return row(self.num_read - 1)

    stream = started(Broken())
    assert tokens(stream.take(0, 0)) == EPOCHS[0]
    if kind is StopIteration:  # how an iterator ends
        assert tokens(stream.take(0, 1)) == [4]
    else:
        with pytest.raises(HeteroError, match=rf"step 1 failed: {kind.__name__}: the connection is gone"):
            stream.take(0, 1)
    stream.close()


def test_waiting_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that gives nothing is waited for, with a word."""
    monkeypatch.setattr("hf_hetero.data.streams.stream.WORD_EVERY_S", 0.05)

    class Slow(Rows):
        def __iter__(self) -> Iterator[Any]:
            time.sleep(0.3)
            yield from super().__iter__()

    stream = started(Slow())
    assert tokens(stream.take(0, 0)) == EPOCHS[0]
    assert "Step 0 of epoch 0 still waits for the stream" in caplog.text
    stream.close()


def test_bad_samples_are_named() -> None:
    """A sample without tokens is named by step and by the row its batch starts with."""
    stream = started([row(0)] * 5 + [{"input_ids": []}] + [row(0)] * 9)
    stream.take(0, 0)
    with pytest.raises(BadSample, match=r"Step 1 of epoch 0, rows counted from row 4 .*: Row 1 has 0 tokens"):
        stream.take(0, 1)
    stream.close()


def test_nothing_to_train_on() -> None:
    """A stream without an example is an error, not an endless loop of epochs."""
    stream = started(Rows(0))
    with pytest.raises(BadSample, match="no examples"):
        stream.batch(0, 0)


def test_a_stream_that_cannot_be_started_anew_ends(caplog: pytest.LogCaptureFixture) -> None:
    """After its only epoch it gives None, and says why."""
    stream = started(Rows(most_epochs=1))
    assert taken(stream, KEYS[:3]) == EPOCHS[:3]
    assert stream.take(0, 3) is stream.take(1, 0) is stream.take(2, 0) is None
    assert "nothing when it is started anew" in caplog.text


def resumable(kind: str, num_rows: int = NUM_ROWS) -> Any:
    if kind == "torch":
        return Rows(num_rows)
    table = datasets.Dataset.from_list([row(n) for n in range(num_rows)])
    dataset = table.to_iterable_dataset(num_shards=2 if kind == "shards" else 1)
    if kind == "mapped":
        dataset = dataset.filter(lambda example: example["input_ids"][0] != 3).map(
            lambda batch: {"input_ids": [[*ids, 7] for ids in batch["input_ids"]]}, batched=True, batch_size=3
        )
    return dataset.shuffle(seed=1, buffer_size=3) if kind == "buffer" else dataset


def rest(stream: Stream, key: tuple[int, int]) -> list[Any]:
    """What it gives from a batch on, up to the end of the second epoch; None where an epoch ends."""
    found: list[Any] = []
    while key[0] < 2:
        batch = stream.take(*key)
        found.append(None if batch is None else tokens(batch))
        key = (key[0] + 1, 0) if batch is None else (key[0], key[1] + 1)
    return found


@pytest.mark.parametrize("kind", ["torch", "table", "shards", "mapped", "buffer"])
@pytest.mark.parametrize("num_rows", [8, 9, 10])
def test_goes_on_where_it_was(kind: str, num_rows: int) -> None:
    """From the position after any step, in any epoch and at its end, a new stream gives what the old one would have."""
    whole = started(resumable(kind, num_rows))
    expected = rest(whole, (0, 0))
    whole.close()
    for at in range(len(expected) - 1):
        stream = started(resumable(kind, num_rows))
        key, num_trained = (0, 0), 0
        for batch in expected[:at]:
            assert (stream.take(*key) is None) == (batch is None)
            key = (key[0] + 1, 0) if batch is None else (key[0], key[1] + 1)
            num_trained += batch is not None
        position = stream.position(num_trained)
        stream.close()
        assert position is not None
        assert (position.epoch, position.batches) == key
        again = started(resumable(kind, num_rows), position=Position(**position.to_dict()), step=num_trained)
        assert rest(again, key) == expected[at:]
        again.close()


def test_enters_in_the_middle_where_it_can() -> None:
    """With a state nothing is read again; a shuffle buffer's content is not in it, so it is read again."""
    assert tells_where_it_is(resumable("mapped"))
    assert not tells_where_it_is(resumable("buffer"))
    assert not tells_where_it_is(resumable("torch"))
    stream = started(resumable("table"))
    stream.take(0, 0)
    position = stream.position(1)
    stream.close()
    assert position is not None
    assert position.state is not None
    dataset = Rows()
    again = started(dataset, num_ahead=0, position=Position(batches=1, rows=4), step=1)
    again.batch(0, 1)
    assert dataset.num_read == 8
    again.close()


def test_a_stream_that_changed_is_refused() -> None:
    """If it ends before the place where it was left, it is another stream."""
    stream = started(Rows(3), position=Position(batches=1, rows=4), step=1)
    with pytest.raises(BadSample, match="ended after 3 rows; 4 were trained"):
        stream.batch(0, 1)


@pytest.mark.parametrize("kind", ["torch", "table"])
def test_other_rows_are_refused(kind: str) -> None:
    """What is read again on the way must be what was trained; where the place is found at once, its first row."""
    stream = started(resumable(kind))
    stream.take(0, 0)
    stream.take(0, 1)
    position = stream.position(2)
    stream.close()
    assert position is not None
    other: Any = Rows()
    other.set_epoch = lambda epoch: setattr(other, "epoch", epoch + 1)
    if kind == "table":
        other = datasets.Dataset.from_list([row(n, 1) for n in range(NUM_ROWS)]).to_iterable_dataset()
    again = started(other, position=Position(**position.to_dict()), step=2)
    with pytest.raises(BadSample, match=r"not the one that was trained on.*ignore_data_skip=True"):
        again.batch(0, 2)
    unknown = started(other, position=replace(position, contents=None), step=2)  # of an older version
    assert unknown.batch(0, 2) is not None
    unknown.close()


def test_positions_of_trained_steps_are_forgotten() -> None:
    """Positions are kept from the last trained step on."""
    stream = started(Rows())
    for step in range(5):
        stream.take(*KEYS[step], num_trained=step)
        if KEYS[step][1] == 2:
            stream.take(0, 3, num_trained=step)
    assert stream.position(3) is None
    assert stream.position(5) is not None
    stream.close()


def test_closing_ends_the_reader() -> None:
    """No thread is left, whatever it was waiting for."""
    before = threading.active_count()
    stream = started(Rows(), num_ahead=1)
    stream.batch(0, 1)
    stream.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert stream.batch(0, 7) is None


def test_a_part_of_a_stream_is_refused() -> None:
    """Rank 0 reads for all, so a stream split by rank would lose the others' parts; a single process may read one."""
    dataset = datasets.Dataset.from_list([row(n) for n in range(8)]).to_iterable_dataset(num_shards=2)
    part = split_dataset_by_node(dataset, rank=1, world_size=2)
    for split in (part, part.map(lambda example: example), part.shuffle(seed=1)):
        with pytest.raises(ConfigError, match="split_dataset_by_node"):
            check_whole(split, 2)
        check_whole(split, 1)
    check_whole(dataset, 2)
    check_whole(split_dataset_by_node(dataset, rank=0, world_size=1), 2)


def test_what_is_a_stream() -> None:
    """Whatever has no index."""
    table = datasets.Dataset.from_list([row(0)])
    assert is_stream(Rows())
    assert is_stream(table.to_iterable_dataset())
    assert not is_stream(table)
    assert not is_stream([row(0)])
