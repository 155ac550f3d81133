"""This module says which samples make step t, and reads this rank's share of the plan for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from numpy.typing import NDArray
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from hf_hetero.errors import HeteroError
from hf_hetero.step import Step, StepExamples, StepShare

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBatches:
    """`GlobalBatches` are the samples of each step, the same on all ranks, and the same that `Trainer` would take.

    One process of `Trainer` shuffles with `randperm` seeded by seed + epoch (accelerate's `SeedableRandomSampler`) and
    cuts the permutation into batches; several processes take turns, which gives a step the same samples. Any other
    sampler is asked for the rows of an epoch when the epoch begins, and not before.

    Args:
        num_rows: of the dataset.
        batch_size: rows of an optimizer step, over all ranks.
        seed: of the permutations.
        shuffle: False keeps the dataset's order.
        num_dropped: rows at the end of each epoch's order that are left out.
        sampler: gives the rows of an epoch, in order; asked on every rank, so that generators move on alike.
    """

    num_rows: int
    batch_size: int
    seed: int
    shuffle: bool = True
    num_dropped: int = 0
    sampler: Any = None
    _orders: dict[int, Rows] = field(default_factory=dict[int, Rows], repr=False, compare=False)

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return -(-self.rows_of_epoch // self.batch_size)

    @property
    def rows_of_epoch(self) -> int:
        """Return how many rows an epoch takes: the dataset's, or the sampler's, less those that are left out."""
        return (self.num_rows if self.sampler is None else len(self.sampler)) - self.num_dropped

    @property
    def is_known_ahead(self) -> bool:
        """Return whether the rows of an epoch are known before it begins."""
        return self.sampler is None

    def to_dict(self) -> dict[str, int | bool | str]:
        """Return what decides the order, for JSON."""
        return {
            "rows": self.num_rows,
            "batch_size": self.batch_size,
            **({"seed": self.seed} if self.sampler is None else {"sampler": type(self.sampler).__name__}),
            "shuffle": self.shuffle,
            "dropped": self.num_dropped,
        }

    def after(self, step: tuple[int, int]) -> tuple[int, int]:
        """Return the step that follows one, as (epoch, index)."""
        epoch, index = step
        return (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)

    def begin(self, epoch: int) -> None:
        """Ask the sampler for the rows of an epoch; there is nothing to do without one.

        Raises:
            HeteroError: it gives another number of rows than it says, or rows that the dataset does not have.
        """
        if self.sampler is None:
            return
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        name, num_rows = type(self.sampler).__name__, len(self.sampler)
        rows = np.fromiter(self.sampler, dtype=np.int64)
        if len(rows) != num_rows:
            raise HeteroError(f"The sampler {name} gave {len(rows)} rows in epoch {epoch}, but its len is {num_rows}.")
        for row in rows[(rows < -self.num_rows) | (rows >= self.num_rows)][:1]:
            raise HeteroError(f"The sampler {name} gave row {row}; the dataset has {self.num_rows} rows.")
        self._orders.clear()  # what a sampler gave before is not asked for again
        self._orders[epoch] = np.where(rows < 0, rows + self.num_rows, rows)

    def rows(self, epoch: int, index: int) -> tuple[int, ...]:
        """Return the dataset's rows of one step; those of a sampler's epoch once it has begun."""
        start = index * self.batch_size
        end = min(start + self.batch_size, self.rows_of_epoch)
        if self.sampler is None and not self.shuffle:
            return tuple(range(start, end))
        return tuple(self._order(epoch)[start:end].tolist())

    def _order(self, epoch: int) -> Rows:
        """Return the rows of an epoch in order; a permutation is made when it is first needed."""
        if epoch not in self._orders and self.sampler is None:
            # plan-ahead looks from one epoch into the next, and never back
            for past in [known for known in self._orders if known < epoch - 1]:
                del self._orders[past]
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._orders[epoch] = torch.randperm(self.num_rows, generator=generator).numpy()
        return self._orders[epoch]


@dataclass(frozen=True, slots=True)
class Order:
    """An `Order` says in which order rows are drawn.

    Args:
        shuffle: by permutations that the seed and the epoch decide; False: the dataset's own order.
        sampler: decides instead, where neither is what it does.
    """

    shuffle: bool
    sampler: Any = None


def order_of(sampler: Any, dataset: Any, is_seedable: bool, num_ranks: int, data_seed: int | None) -> Order:
    """Return the order in which accelerate's loaders draw the rows of a sampler.

    accelerate puts a `SeedableRandomSampler` in the place of any `RandomSampler`, unless told not to
    (`use_seedable_sampler=False`); then, among several ranks, it gives a sampler without a generator one that is seeded
    by torch's, once, when the loader is made (`accelerate.data_loader.prepare_data_loader`).

    Args:
        sampler: of torch's kind: can be iterated, has a length.
        dataset: that it draws from.
        is_seedable: whether accelerate's own may take its place.
        num_ranks: of the run.
        data_seed: that was asked for; None: torch's.
    """
    if type(sampler) is SequentialSampler and len(sampler) == len(dataset):
        return Order(shuffle=False)
    if isinstance(sampler, RandomSampler) and is_seedable:
        if not sampler.replacement and len(sampler) == len(sampler.data_source) == len(dataset):
            return Order(shuffle=True)
        generator = sampler.generator
        options: dict[str, Any] = {"replacement": sampler.replacement, "num_samples": len(sampler)}
        return Order(
            shuffle=True,
            sampler=SeedableRandomSampler(sampler.data_source, **options, generator=generator, data_seed=data_seed),
        )
    if num_ranks > 1 and not is_seedable and getattr(sampler, "generator", 0) is None:
        own: Any = sampler
        own.generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    return Order(shuffle=True, sampler=sampler)


class StepSampler(Sampler[StepShare]):
    """A `StepSampler` is a batch sampler whose items are whole optimizer steps: this rank's share of each.

    Args:
        batches: the samples of each step.
        plan_step: plans (or receives) the step of an epoch; called in order, on all ranks.
        rank: this rank.
        first: epoch and step to begin with, asked when the first iteration starts; each later one is the next epoch.
        begin: called with an epoch before its first step, on all ranks.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        plan_step: Callable[[int, int], Step | None],
        rank: int,
        first: Callable[[], tuple[int, int]] = lambda: (0, 0),
        begin: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._batches, self._plan_step, self._rank, self._first = batches, plan_step, rank, first
        self._begin = begin
        self._epoch: int | None = None

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[StepShare]:
        """Give the steps of an epoch in order."""
        epoch, start = self._first() if self._epoch is None else (self._epoch + 1, 0)
        self._epoch = epoch
        self._begin(epoch)
        for index in range(start, len(self)):
            step = self._plan_step(epoch, index)
            assert step is not None  # only streams end early
            yield StepShare(step, self._rank)


class StepDataset(Dataset[StepExamples]):
    """A `StepDataset` reads the samples of a share, and no others. torch hands it a batch sampler's item whole.

    Args:
        dataset: map-style.
        names: keys of an example to keep, as transformers' `RemoveColumnsCollator` does, which leaves alone what is no
            dict; None: all.
    """

    def __init__(self, dataset: Any, names: Sequence[str] | None = None) -> None:
        self._dataset, self._names = dataset, None if names is None else frozenset(names)
        self._epoch: int | None = None

    def __len__(self) -> int:
        """Return the rows of the dataset."""
        return len(self._dataset)

    @property
    def changes_with_epochs(self) -> bool:
        """Return whether the dataset wants to be told of each epoch."""
        return hasattr(self._dataset, "set_epoch")

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset that an epoch begins, as accelerate's loaders do."""
        if self.changes_with_epochs:
            self._dataset.set_epoch(epoch)
            self._epoch = epoch

    def read(self, rows: Sequence[int]) -> list[Any]:
        """Return some examples, with the keys that are wanted.

        Raises:
            HeteroError: a row cannot be read.
        """
        return [self._with_wanted_keys(example) for example in self._read(rows)]

    def _with_wanted_keys(self, example: Any) -> Any:
        """Return an example without the keys that nobody asked for."""
        if self._names is None or not isinstance(example, dict):
            return example
        values = cast("dict[str, Any]", example)
        return {name: value for name, value in values.items() if name in self._names}

    def __getitems__(self, share: StepShare) -> StepExamples:
        """Return the samples of one step that this rank holds tokens of."""
        if share.step.epoch != self._epoch:  # a worker's copy, which nobody else tells
            self.set_epoch(share.step.epoch)
        row_of = {position: share.step.rows[position] for position in share.samples()}
        rows = list(dict.fromkeys(row_of.values()))  # a row with several samples is read once
        examples = dict(zip(rows, self.read(rows), strict=True))
        return StepExamples(share, {position: examples[row] for position, row in row_of.items()})

    def _read(self, rows: Sequence[int]) -> list[Any]:
        """Read rows with the dataset's own method for several, where it has one."""
        if not rows:  # a rank without tokens: a transform may not know what to make of no rows
            return []
        if hasattr(self._dataset, "__getitems__"):
            with _naming(f"rows {', '.join(map(str, rows))}"):
                return list(self._dataset.__getitems__(rows))
        examples: list[Any] = []
        for row in rows:
            with _naming(f"row {row}"):
                examples.append(self._dataset[row])
        return examples


@contextmanager
def _naming(rows: str) -> Iterator[None]:
    """Raise whatever a user's dataset raises as a `HeteroError` that names the row."""
    try:
        yield
    # a StopIteration would end the loader as if the data had ended, and a class of the user's own may not survive
    # the way from a worker, or to another rank
    except Exception as error:
        raise HeteroError(f"Reading {rows} failed: {type(error).__name__}: {error}") from error
