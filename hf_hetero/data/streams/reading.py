"""This module reads a dataset that can only be iterated: batches from any position on, and the position after each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from hf_hetero.data.contents import LEARNT_COLUMNS, checksum_of
from hf_hetero.data.lengths import tells_where_it_is
from hf_hetero.errors import BadSample
from hf_hetero.progress import each
from hf_hetero.samples.samples import Drawn, Samples

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Position:
    """A `Position` says how far a stream has been read.

    Args:
        epoch: how often it has ended.
        batches: batches taken of this epoch.
        rows: examples taken of this epoch.
        state: what the dataset says of it (`state_dict`); None: it is to be found again by reading from the start.
        contents: checksum of what is read again to find it: of the epoch's rows so far, or, with a state, of its first
            row; None: it is not known.
    """

    epoch: int = 0
    batches: int = 0
    rows: int = 0
    state: dict[str, Any] | None = None
    contents: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the position for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """A `Batch` is the samples of one step, the examples that hold them by row, and the position after it."""

    drawn: Drawn
    examples: Mapping[int, Example]
    after: Position


class Reading:
    """A `Reading` makes batches of a dataset's examples.

    Args:
        dataset: iterable; `set_epoch(epoch)` is called before each time it is started, where it has that method.
        batch_size: examples of a step, over all ranks.
        samples_of: the samples that a list of examples holds.
        names: columns to keep; None: all.
        seed: of the dataset's `generator`, where it has one, plus the epoch: as transformers seeds it.
        learnt: columns that learning depends on, by which the examples are known again.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        samples_of: Callable[[list[Example]], Samples],
        names: Sequence[str] | None = None,
        seed: int = 0,
        learnt: Sequence[str] = LEARNT_COLUMNS,
    ) -> None:
        self._dataset, self._batch_size, self._samples_of, self._seed = dataset, batch_size, samples_of, seed
        self._learnt = learnt
        self._names = None if names is None else frozenset(names)
        self._has_state = tells_where_it_is(dataset)

    def batches(self, position: Position, wanted: Callable[[], bool]) -> Iterator[Batch]:
        """Give the batches after a position, up to the end of the epoch, or until nobody wants more.

        Raises:
            BadSample: an example that cannot be planned for; or the dataset is not the one that was read before.
        """
        rows: list[Example] = []
        for example in self._open(position, wanted):
            if not wanted():
                return
            rows.append(self._with_wanted_columns(example))
            if len(rows) == self._batch_size:
                batch = self._batch(rows, position)
                position, rows = batch.after, []
                yield batch
        if rows:
            yield self._batch(rows, position)

    def _open(self, position: Position, wanted: Callable[[], bool]) -> Iterator[Example]:
        """Return the examples from a position on."""
        dataset = self._dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(position.epoch)
        if isinstance(generator := getattr(dataset, "generator", None), torch.Generator):
            generator.manual_seed(self._seed + position.epoch)
        if position.state is not None:
            if position.contents is not None:
                # a state leads back without the rows before it: only the first is read, and before the state is loaded
                self._check(position, self._checksum(map(self._with_wanted_columns, islice(iter(dataset), 1))))
            dataset.load_state_dict(position.state)
            return iter(dataset)
        examples, checksum = iter(dataset), 0
        if position.rows:
            logger.warning(
                "The stream cannot be entered in the middle: its first %d rows are read again.", position.rows
            )
        for row in each(range(position.rows), "Reading trained samples again", "rows"):
            if not wanted() or (example := next(examples, None)) is None:
                raise BadSample(f"The stream ended after {row} rows; {position.rows} were trained before. It changed.")
            checksum = self._checksum([self._with_wanted_columns(example)], checksum)
        self._check(position, checksum)
        return examples

    def _checksum(self, examples: Iterable[Example], before: int = 0) -> int:
        return checksum_of(list(examples), before, self._learnt)

    def _check(self, position: Position, checksum: int) -> None:
        """Refuse a stream of which other rows were read again than were trained on.

        Raises:
            BadSample: it is another one, with the remedy.
        """
        if position.contents not in (None, checksum):
            raise BadSample(
                f"The stream is not the one that was trained on: rows of epoch {position.epoch} that were trained are "
                "others now. Go back to that stream, with the seed of whatever shuffles it; or start the data anew "
                "with ignore_data_skip=True."
            )

    def _with_wanted_columns(self, example: Example) -> Example:
        """Return an example without the columns that nobody asked for."""
        return example if self._names is None else {n: x for n, x in example.items() if n in self._names}

    def _batch(self, examples: list[Example], position: Position) -> Batch:
        """Make a batch of the examples after a position; the dataset has been read to their end, and no further."""
        first = position.rows
        try:
            samples = self._samples_of(examples)
        except BadSample as error:
            where = f"Step {position.batches} of epoch {position.epoch}, rows counted from row {first} of the stream"
            raise BadSample(f"{where}: {error}") from error
        drawn = samples.of(range(len(examples)))
        state = self._state()
        contents = self._contents(examples, position, state)
        after = Position(position.epoch, position.batches + 1, first + len(examples), state, contents)
        rows = tuple(first + row for row in drawn.rows)
        return Batch(replace(drawn, rows=rows), dict(enumerate(examples, first)), after)

    def _contents(self, examples: list[Example], position: Position, state: dict[str, Any] | None) -> int | None:
        """Return the checksum that the position after these examples holds: see `Position.contents`."""
        if not position.rows:
            return self._checksum(examples if state is None else examples[:1])
        # one of a single row and one of all rows cannot be told apart later, so that none follows another
        if position.contents is None or (state is None) != (position.state is None):
            return None
        return self._checksum(examples, position.contents) if state is None else position.contents

    def _state(self) -> dict[str, Any] | None:
        """Return the dataset's own account of where it is, if that can be trusted and written down."""
        if not self._has_state:
            return None
        state: dict[str, Any] = self._dataset.state_dict()
        try:  # a checkpoint is JSON: a state that comes back otherwise would lead to another place
            return state if json.loads(json.dumps(state)) == state else None
        except TypeError:
            return None
