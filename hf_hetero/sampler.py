"""Which samples make step t, and this rank's share of the plan for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from hf_hetero.step import Step, StepExamples, StepShare


@dataclass(frozen=True)
class GlobalBatches:
    """The samples of each step, the same on all ranks, and the same that `Trainer` would take.

    One process of `Trainer` shuffles with `randperm` seeded by seed + epoch (accelerate's `SeedableRandomSampler`) and
    cuts the permutation into batches; several processes take turns, which gives a step the same samples.

    Args:
        num_rows: of the dataset.
        batch_size: rows of an optimizer step, over all ranks.
        seed: `data_seed`, or `seed`.
        shuffle: False keeps the dataset's order.
        num_dropped: rows at the end of each epoch's order that are left out.
    """

    num_rows: int
    batch_size: int
    seed: int
    shuffle: bool = True
    num_dropped: int = 0
    _orders: dict[int, list[int]] = field(default_factory=dict[int, list[int]], repr=False, compare=False)

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-(self.num_rows - self.num_dropped) // self.batch_size)

    def to_dict(self) -> dict[str, int | bool]:
        """What decides the order, for JSON."""
        return {
            "rows": self.num_rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "dropped": self.num_dropped,
        }

    def after(self, step: tuple[int, int]) -> tuple[int, int]:
        """The step that follows one, as (epoch, index)."""
        epoch, index = step
        return (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)

    def rows(self, epoch: int, index: int) -> tuple[int, ...]:
        """Dataset rows of one step."""
        start = index * self.batch_size
        return tuple(self._order(epoch)[start : min(start + self.batch_size, self.num_rows - self.num_dropped)])

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.num_rows)
        if epoch not in self._orders:
            # plan-ahead looks from one epoch into the next, and never back
            for past in [known for known in self._orders if known < epoch - 1]:
                del self._orders[past]
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._orders[epoch] = torch.randperm(self.num_rows, generator=generator).tolist()
        return self._orders[epoch]


class StepSampler(Sampler[StepShare]):
    """Batch sampler whose items are whole optimizer steps: this rank's share of each.

    Args:
        batches: the samples of each step.
        plan_step: plans (or receives) the step of an epoch; called in order, on all ranks.
        rank: this rank.
        first: epoch and step to begin with, asked when the first iteration starts; each later one is the next epoch.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        plan_step: Callable[[int, int], Step | None],
        rank: int,
        first: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._batches, self._plan_step, self._rank, self._first = batches, plan_step, rank, first
        self._epoch: int | None = None

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[StepShare]:
        """Steps of an epoch in order."""
        epoch, start = self._first() if self._epoch is None else (self._epoch + 1, 0)
        self._epoch = epoch
        for index in range(start, len(self)):
            step = self._plan_step(epoch, index)
            assert step is not None  # only streams end early
            yield StepShare(step, self._rank)


class StepDataset(Dataset[StepExamples]):
    """Reads the samples of a share, and no others. torch hands a batch sampler's item over whole."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Samples of the dataset."""
        return len(self._dataset)

    def __getitems__(self, share: StepShare) -> StepExamples:
        """The samples of one step that this rank holds tokens of."""
        row_of = {position: share.step.rows[position] for position in share.samples()}
        rows = list(dict.fromkeys(row_of.values()))  # a row with several samples is read once
        examples: list[Mapping[str, Any]]
        if hasattr(self._dataset, "__getitems__"):
            examples = self._dataset.__getitems__(rows)
        else:
            examples = [self._dataset[row] for row in rows]
        read = dict(zip(rows, examples, strict=True))
        return StepExamples(share, {position: read[row] for position, row in row_of.items()})
