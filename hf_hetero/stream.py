"""Steps from a dataset that can only be read from its start to its end, such as a stream from the hub.

Rank 0 reads it, a bounded number of batches ahead of training, and deals each rank the examples its share needs. So the
source is read once whatever the number of ranks, and need not give every rank the same.

A stream counts as one epoch of `Trainer`, which knows no other number of steps for it than `max_steps`. When it ends it
is started anew, with `set_epoch`; steps are numbered on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, Sampler
from tqdm.auto import tqdm

from hf_hetero.agreement import scatter
from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.lengths import tells_where_it_is
from hf_hetero.samples import Drawn, Samples
from hf_hetero.step import Step, StepExamples, StepShare, samples_by_rank

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream has been read.

    Args:
        epoch: how often it has ended.
        batches: batches taken of this epoch.
        rows: examples taken of this epoch.
        state: what the dataset says of it (`state_dict`); None: it is to be found again by reading from the start.
    """

    epoch: int = 0
    batches: int = 0
    rows: int = 0
    state: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one step, the examples that hold them by row, and the position after it."""

    drawn: Drawn
    examples: Mapping[int, Example]
    after: Position


class Stream:
    """Reads global batches in a thread, as far ahead as it is allowed to, and no further.

    Args:
        dataset: iterable; `set_epoch(epoch)` is called before each time it is started, where it has that method.
        batch_size: examples of a step, over all ranks.
        samples_of: the samples that a list of examples holds.
        num_ahead: batches read beyond the one that is taken next.
        names: columns to keep; None: all.
        drop_last: leave out a last batch that is not full.
        seed: of the dataset's `generator`, where it has one, plus the epoch: as transformers seeds it.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        samples_of: Callable[[list[Example]], Samples],
        num_ahead: int,
        names: Sequence[str] | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self._dataset, self._batch_size, self._samples_of = dataset, batch_size, samples_of
        self._num_ahead, self._drop_last, self._seed = num_ahead, drop_last, seed
        self._names = None if names is None else frozenset(names)
        self._has_state = tells_where_it_is(dataset)
        self._changed = threading.Condition()
        self._ready: dict[int, Batch] = {}
        self._after: dict[int, Position] = {}
        self._next = self._taken = 0
        self._end: Exception | bool = False
        self._closed = False

    def start(self, position: Position, step: int) -> None:
        """Begin to read, with the batch of this step."""
        self._after[step] = position
        self._next = self._taken = step
        threading.Thread(target=self._run, args=(position,), name="read-stream", daemon=True).start()

    def batch(self, step: int) -> Batch | None:
        """A batch that was not taken yet. Waits until it is read; None: the stream is over before it.

        Raises:
            BadSample: an example that cannot be planned for, or no example at all.
            HeteroError: reading failed, with what the dataset said.
        """
        with self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._end or self._closed)
            if step in self._ready:
                return self._ready[step]
            if isinstance(self._end, Exception):
                raise self._end
            return None

    def take(self, step: int, num_trained: int = 0) -> Batch | None:
        """The same, and room for another. Positions of steps before `num_trained` are forgotten."""
        batch = self.batch(step)
        with self._changed:
            self._ready.pop(step, None)
            self._taken = step + 1
            if batch is not None:
                self._after[step + 1] = batch.after
            self._after = {number: position for number, position in self._after.items() if number >= num_trained}
            self._changed.notify_all()
        return batch

    def position(self, num_trained: int) -> Position | None:
        """Where to go on after so many steps; None if they were not taken from this stream."""
        with self._changed:
            return self._after.get(num_trained)

    def close(self) -> None:
        """End the reader after its current example."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()

    def _run(self, position: Position) -> None:
        end: Exception | bool = True
        try:
            self._read(position)
        except HeteroError as error:
            end = error
        except Exception as error:  # whatever a user's dataset raises
            end = HeteroError(f"Reading the stream for step {self._next} failed: {type(error).__name__}: {error}")
            end.__cause__ = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _read(self, position: Position) -> None:
        """Epoch after epoch, until one gives nothing."""
        while not self._closed:
            found = position.batches > 0
            for batch in self._batches(self._open(position), position):
                found = True
                if not self._put(batch):
                    return
            if not found and not position.epoch:
                raise BadSample("The stream has no examples, or not enough for one batch.")
            if not found:
                logger.warning("The stream gives nothing when it is started anew: training ends here.")
                return
            position = Position(epoch=position.epoch + 1)

    def _put(self, batch: Batch) -> bool:
        """Keep it as soon as there is room; False if nobody wants it any more."""
        with self._changed:
            self._ready[self._next] = batch
            self._next += 1
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._closed or self._next <= self._taken + self._num_ahead) and (
                not self._closed
            )

    def _open(self, position: Position) -> Iterator[Example]:
        """The examples from a position on."""
        dataset = self._dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(position.epoch)
        if isinstance(generator := getattr(dataset, "generator", None), torch.Generator):
            generator.manual_seed(self._seed + position.epoch)
        if position.state is not None:
            dataset.load_state_dict(position.state)
            return iter(dataset)
        examples = iter(dataset)
        if position.rows:
            logger.warning(
                "The stream cannot be entered in the middle: its first %d rows are read again.", position.rows
            )
        for row in tqdm(range(position.rows), desc="Reading trained samples again", leave=False, delay=1):
            if self._closed or next(examples, None) is None:
                raise BadSample(f"The stream ended after {row} rows; {position.rows} were trained before. It changed.")
        return examples

    def _batches(self, examples: Iterator[Example], position: Position) -> Iterator[Batch]:
        rows: list[Example] = []
        for example in examples:
            if self._closed:
                return
            rows.append(example if self._names is None else {n: x for n, x in example.items() if n in self._names})
            if len(rows) == self._batch_size:
                batch = self._batch(rows, position)
                position, rows = batch.after, []
                yield batch
        if rows and not self._drop_last:
            yield replace(self._batch(rows, position), after=Position(epoch=position.epoch + 1))

    def _batch(self, examples: list[Example], position: Position) -> Batch:
        first = position.rows
        try:
            samples = self._samples_of(examples)
        except BadSample as error:
            raise BadSample(
                f"Step {self._next}, rows counted from row {first} of epoch {position.epoch} of the stream: {error}"
            ) from error
        drawn = samples.of(range(len(examples)))
        after = Position(position.epoch, position.batches + 1, first + len(examples), self._state())
        rows = tuple(first + row for row in drawn.rows)
        return Batch(replace(drawn, rows=rows), dict(enumerate(examples, first)), after)

    def _state(self) -> dict[str, Any] | None:
        """The dataset's own account of where it is, if that can be trusted and written down."""
        if not self._has_state:
            return None
        state: dict[str, Any] = self._dataset.state_dict()
        try:
            return state if json.loads(json.dumps(state)) == state else None
        except TypeError:
            return None


class StreamSampler(Sampler[StepExamples]):
    """Batch sampler whose items are whole optimizer steps: this rank's share of each, with its examples.

    Args:
        stream: on rank 0; None elsewhere.
        plan_step: plans (or receives) a step; None ends the run. Called in order, on all ranks.
        control: group that deals out the examples; None for a single process.
        num_steps: most there may be.
        num_trained: optimizer steps done.
        kept: where a checkpoint says to go on; None: it does not say.
        skips: whether steps that were trained are passed over.
    """

    def __init__(
        self,
        stream: Stream | None,
        plan_step: Callable[[int, int], Step | None],
        control: dist.ProcessGroup | None,
        num_steps: int,
        num_trained: Callable[[], int],
        kept: Position | None = None,
        skips: bool = True,
    ) -> None:
        self._stream, self._plan_step, self._control = stream, plan_step, control
        self._num_steps, self._num_trained, self._kept, self._skips = num_steps, num_trained, kept, skips
        self._next: int | None = None

    def __iter__(self) -> Iterator[StepExamples]:
        """Steps in order."""
        if self._next is None:
            self._next = self._num_trained()
            self._enter(self._next)
        while self._next < self._num_steps:
            step = self._plan_step(0, self._next)
            self._next = self._next + 1 if step is not None else self._num_steps
            if step is not None:
                yield self._deal(step)

    def _enter(self, step: int) -> None:
        """Begin to read with the batch of a step."""
        if self._stream is None:
            return
        if self._kept is not None or not self._skips:
            self._stream.start(self._kept or Position(), step)
            return
        self._stream.start(Position(), 0)
        for past in tqdm(range(step), desc="Reading trained steps again", leave=False, delay=1):
            self._stream.take(past)

    def _deal(self, step: Step) -> StepExamples:
        """This rank's examples, from rank 0."""
        parts: list[dict[int, Example]] | None = None
        if self._stream is not None:
            batch = self._stream.take(step.index, self._num_trained())
            assert batch is not None
            rows = step.rows
            parts = [
                {position: batch.examples[rows[position]] for position in sorted(held)}
                for held in samples_by_rank(step)
            ]
        rank = dist.get_rank() if self._control is not None else 0
        return StepExamples(StepShare(step, rank), scatter(parts, self._control))


class Dealt(Dataset[StepExamples]):
    """Hands a batch sampler's item on: its examples have been read already."""

    def __getitems__(self, examples: StepExamples) -> StepExamples:
        """The same."""
        return examples


def is_stream(dataset: Any) -> bool:
    """Whether it can only be iterated."""
    return not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset)
