"""Which samples make step t, and this rank's share of the plan for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from hf_hetero.errors import HeteroError
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
        drop_last: leave out a last batch that is not full.
    """

    num_rows: int
    batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    _orders: dict[int, list[int]] = field(default_factory=dict[int, list[int]], repr=False, compare=False)

    def __len__(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(self.num_rows, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def to_dict(self) -> dict[str, int | bool]:
        """What decides the order, for JSON."""
        return {
            "rows": self.num_rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def after(self, step: tuple[int, int]) -> tuple[int, int]:
        """The step that follows one, as (epoch, index)."""
        epoch, index = step
        return (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)

    def rows(self, epoch: int, index: int) -> tuple[int, ...]:
        """Dataset rows of one step."""
        start = index * self.batch_size
        return tuple(self._order(epoch)[start : start + self.batch_size])

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_rows))
        if epoch not in self._orders:
            # plan-ahead looks from one epoch into the next, and never back
            for past in [known for known in self._orders if known < epoch - 1]:
                del self._orders[past]
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._orders[epoch] = torch.randperm(self.num_rows, generator=generator).tolist()
        return self._orders[epoch]


class StepSampler(Sampler["StepShare | None"]):
    """Batch sampler whose items are whole optimizer steps: this rank's share of each.

    Args:
        batches: the samples of each step.
        plan_step: plans (or receives) the step of an epoch; called in order, on all ranks.
        rank: this rank.
        num_trained: steps of the first epoch that are already trained, asked when it starts. `Trainer` skips as many
            items when it resumes, so they are not planned.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        plan_step: Callable[[int, int], Step | None],
        rank: int,
        num_trained: Callable[[], int] = lambda: 0,
    ) -> None:
        self._batches, self._plan_step, self._rank, self._num_trained = batches, plan_step, rank, num_trained
        self._epoch, self._is_first_epoch = 0, True

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[StepShare | None]:
        """Steps of the epoch in order; None for those already trained."""
        start = self._num_trained() if self._is_first_epoch else 0
        self._is_first_epoch = False
        epoch = self._epoch
        for index in range(len(self)):
            step = self._plan_step(epoch, index) if index >= start else None
            yield None if step is None else StepShare(step, self._rank)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch from the next iteration on."""
        self._epoch = epoch

    @property
    def batch_sampler(self) -> StepSampler:
        """Itself: `Trainer` looks for `set_epoch` at `loader.batch_sampler.batch_sampler`."""
        return self


class StepDataset(Dataset[StepExamples]):
    """Reads the samples of a share, and no others. torch hands a batch sampler's item over whole."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        """Samples of the dataset."""
        return len(self._dataset)

    def __getitems__(self, share: StepShare | None) -> StepExamples:
        """The samples of one step that this rank holds tokens of.

        Raises:
            HeteroError: the step was taken for one that is already trained.
        """
        if share is None:
            raise HeteroError(
                "A step counted as already trained was asked for. Resume with train(resume_from_checkpoint=...) "
                "and a transformers version within the supported range."
            )
        row_of = {position: share.step.rows[position] for position in share.samples()}
        rows = list(dict.fromkeys(row_of.values()))  # a row with several samples is read once
        read = dict(zip(rows, self._read(rows), strict=True))
        return StepExamples(share, {position: read[row] for position, row in row_of.items()})

    def _read(self, rows: list[int]) -> list[Mapping[str, Any]]:
        try:
            if hasattr(self._dataset, "__getitems__"):
                return self._dataset.__getitems__(rows)
            return [self._dataset[row] for row in rows]
        except StopIteration as error:  # the loader would take it for the end of the epoch
            raise HeteroError(f"The dataset raised StopIteration for one of the rows {rows}: {error}") from error
