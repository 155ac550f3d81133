"""This module makes steps of a dataset that can only be read from start to end, such as a stream from the hub.

Rank 0 reads it, a bounded number of batches ahead of training, and deals each rank the examples its share needs. So the
source is read once whatever the number of ranks, and need not give every rank the same.

An epoch of `Trainer` is one reading of the stream, from its start to its end. When it ends it is started anew, with
`set_epoch`. A last batch that is not full is trained, too: `Trainer` ignores `dataloader_drop_last` for streams. But
where its rows are too few to fill all batches of an accumulation, `Trainer` takes no optimizer step after it: its
gradient is added to that of the next epoch's first step.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from torch.utils.data import IterableDataset

from hf_hetero.data.streams.reading import Batch, Position, Reading
from hf_hetero.errors import BadSample, ConfigError, HeteroError

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""Epoch, and batch within it."""

WORD_EVERY_S = 60.0
"""How often it is said that a batch is waited for."""


class Stream:
    """A `Stream` reads global batches in a thread, as far ahead as it is allowed to, and no further.

    Args:
        reading: of the dataset.
        num_ahead: batches read beyond the one that is taken next.
        num_steps: steps there may be, epochs together; None: any number.
        one_by_one: each epoch waits until it is started; else the next one is read as soon as one ends.
        min_rows: fewest examples after which an optimizer step is taken.
    """

    def __init__(
        self,
        reading: Reading,
        num_ahead: int,
        num_steps: int | None = None,
        one_by_one: bool = False,
        min_rows: int = 1,
    ) -> None:
        self._reading, self._num_ahead, self._num_steps = reading, num_ahead, num_steps
        self.one_by_one, self._min_rows = one_by_one, min_rows
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # number of the reader whose batches count: one that was closed may still wait for its dataset, and must not
        # put what it reads among the batches of the next one
        self._reader = 0
        self._first: Key = (0, 0)
        self._ready: dict[Key, Batch] = {}
        self._num_batches: dict[int, int] = {}  # of the epochs that have ended
        self._after: dict[int, Position] = {}
        self._num_read = self._num_taken = 0  # optimizer steps, epochs together
        self._end: HeteroError | bool = False

    def start(self, position: Position, step: int) -> None:
        """Begin to read at a position, which is that of a step. What was read before is forgotten."""
        self.close()
        if self._thread is not None:
            self._thread.join()  # two readers of one dataset would confuse what it says of its place
        with self._changed:
            self._first, self._end = (position.epoch, position.batches), False
            self._num_batches.clear()
            self._after[step] = position
            self._num_read = self._num_taken = step
            reader = self._reader
        self._thread = threading.Thread(target=self._run, args=(position, reader), name="read-stream", daemon=True)
        self._thread.start()

    def batch(self, epoch: int, index: int) -> Batch | None:
        """Return a batch that was not taken yet, once it is read; None: the epoch, or all, ends before it.

        Raises:
            BadSample: an example that cannot be planned for, or no example at all.
            HeteroError: reading failed, with what the dataset said.
        """
        key, waited_s = (epoch, index), 0.0
        with self._changed:
            while not self._changed.wait_for(lambda: self._is_known(key), WORD_EVERY_S):
                waited_s += WORD_EVERY_S
                logger.warning("Step %d of epoch %d still waits for the stream, after %d s.", index, epoch, waited_s)
            if key in self._ready:
                return self._ready[key]
            if isinstance(self._end, HeteroError) and not self._is_past(key):
                raise self._end
            return None

    def take(self, epoch: int, index: int, num_trained: int = 0) -> Batch | None:
        """Return a batch and make room for another. Positions of steps before `num_trained` are forgotten."""
        batch = self.batch(epoch, index)
        with self._changed:
            if batch is not None:
                self._ready.pop((epoch, index), None)
            if batch is not None and self._is_step(batch):
                self._num_taken += 1
                self._after[self._num_taken] = batch.after
            elif batch is None and epoch in self._num_batches:
                self._after[self._num_taken] = Position(epoch + 1)
            self._after = {number: position for number, position in self._after.items() if number >= num_trained}
            self._changed.notify_all()
        return batch

    def after(self, key: Key) -> Key:
        """Return what follows a batch, as far as is known without waiting: of its epoch, or the next epoch's first."""
        epoch, index = key
        with self._changed:
            return (epoch + 1, 0) if index + 1 >= self._num_batches.get(epoch, index + 2) else (epoch, index + 1)

    def position(self, num_trained: int) -> Position | None:
        """Return where to go on after so many steps; None if they were not taken from this stream."""
        with self._changed:
            return self._after.get(num_trained)

    def close(self) -> None:
        """End the reader after its current example."""
        with self._changed:
            self._reader += 1
            self._end = True
            self._ready.clear()
            self._changed.notify_all()

    @property
    def num_taken(self) -> int:
        """Return the number of optimizer steps whose batches were taken."""
        return self._num_taken

    def _is_step(self, batch: Batch) -> bool:
        """Return whether `Trainer` takes an optimizer step after a batch."""
        return len(batch.examples) >= self._min_rows

    def _is_known(self, key: Key) -> bool:
        """Return whether a batch is there, or it is certain that it will never be."""
        return key in self._ready or self._is_past(key) or self._end is not False

    def _is_past(self, key: Key) -> bool:
        """Return whether a batch is before the first one, or after its epoch's last."""
        return key < self._first or key[1] >= self._num_batches.get(key[0], key[1] + 1)

    def _run(self, position: Position, reader: int) -> None:
        """Read until the end, and keep for those who wait how it came; in the reader's thread."""
        end: HeteroError | bool = True
        try:
            self._read(position, reader)
        except HeteroError as error:
            end = error
        except BaseException as error:  # whatever a user's dataset raises; a panic of a Rust package is no Exception
            end = HeteroError(f"Reading the stream for step {self._num_read} failed: {type(error).__name__}: {error}")
            end.__cause__ = error
        with self._changed:
            if reader == self._reader:
                self._end = end
            self._changed.notify_all()

    def _read(self, position: Position, reader: int) -> None:
        """Read epoch after epoch, until one gives nothing."""
        while True:
            index = position.batches
            for batch in self._reading.batches(position, lambda: reader == self._reader):
                if not self._put((position.epoch, index), batch, reader):
                    return
                index += 1
            if reader != self._reader:
                return
            if not index and not position.epoch:
                raise BadSample("The stream has no examples.")
            with self._changed:
                self._num_batches[position.epoch] = index
                self._changed.notify_all()
            if not index:
                logger.warning("The stream gives nothing when it is started anew: training ends here.")
            if not index or self.one_by_one:
                return
            position = Position(epoch=position.epoch + 1)

    def _put(self, key: Key, batch: Batch, reader: int) -> bool:
        """Keep a batch, and wait until there is room for the next; return False if nobody wants another."""
        with self._changed:
            if reader != self._reader:
                return False
            self._ready[key] = batch
            self._num_read += self._is_step(batch)
            self._changed.notify_all()
            # the last step is read: another epoch would be started for nobody, which may take minutes
            if self._num_steps is not None and self._num_read >= self._num_steps:
                return False
            self._changed.wait_for(
                lambda: reader != self._reader or self._num_read <= self._num_taken + self._num_ahead
            )
            return reader == self._reader


def is_stream(dataset: Any) -> bool:
    """Return whether a dataset can only be iterated."""
    return not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset)


def num_rows_of(dataset: Any) -> int | None:
    """Return the examples of a stream that knows how many it has; None for others."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def check_whole(dataset: Any, num_ranks: int) -> None:
    """Refuse a stream that `datasets.distributed.split_dataset_by_node` has split: other ranks' parts would be lost.

    Raises:
        ConfigError: it was split, with the remedy.
    """
    split = getattr(dataset, "_distributed", None)
    if num_ranks > 1 and split is not None and split.world_size > 1:
        raise ConfigError(
            f"The stream was split by split_dataset_by_node(rank={split.rank}, world_size={split.world_size}). Rank 0 "
            "reads the whole stream and deals it out, so the parts of other ranks would never be trained: give every "
            "rank the dataset without the split."
        )
