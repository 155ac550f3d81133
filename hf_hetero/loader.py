"""The DataLoader of a planned run: batches, plans, ranks' shares and tensors joined into one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_hetero.agreement import broadcast
from hf_hetero.lengths import read_samples
from hf_hetero.plan_ahead import PlanAhead, PlanSource
from hf_hetero.sampler import GlobalBatches, StepDataset, StepSampler
from hf_hetero.samples import Samples, limited

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planning:
    """How a run plans its steps.

    Args:
        source: where plans come from.
        num_ahead: plans kept ready.
        length_column: column with each row's tokens.
        most_tokens: of a sample; None: any number.
        longer: what to do with longer ones: "error", "truncate" or "split".
        control: group that carries the plans; None for a single process.
    """

    source: PlanSource
    num_ahead: int
    length_column: str
    control: dist.ProcessGroup | None
    most_tokens: int | None = None
    longer: str = "error"


def step_loader(
    dataset: Any,
    columns: Callable[[Any], Any],
    collate: Callable[..., Any],
    args: TrainingArguments,
    batch_size: int,
    planning: Planning,
    global_step: Callable[[], int],
) -> tuple[DataLoader[Any], PlanAhead]:
    """A loader whose items are planned steps, and the source of its plans, to be closed after use.

    It must not be prepared by accelerate, which would deal its items out among the ranks.

    Args:
        dataset: map-style.
        columns: removes the columns that the model does not need.
        collate: a step's examples -> this rank's tensors.
        args: seed, workers, and how the last batch is treated.
        batch_size: samples of a step, over all ranks.
        planning: where plans come from.
        global_step: optimizer steps done when the first epoch starts.

    Raises:
        BadSample: rows without tokens, on every rank.
    """
    num_rows, samples = read_rows(dataset, planning)
    batches = GlobalBatches(
        num_rows=num_rows,
        batch_size=batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy == "random",
        drop_last=args.dataloader_drop_last,
    )
    num_steps = max(len(batches), 1)
    plans = PlanAhead(
        planning.source,
        batches.rows,
        samples,
        num_steps,
        planning.num_ahead,
        planning.control,
    )
    # `Trainer` skips these when it resumes within an epoch
    sampler: Any = StepSampler(
        batches,
        plans.step,
        args.process_index if planning.control is not None else 0,
        num_trained=lambda: 0 if args.ignore_data_skip else global_step() % num_steps,
    )
    loader: DataLoader[Any] = DataLoader(
        StepDataset(columns(dataset) if isinstance(dataset, datasets.Dataset) else dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return loader, plans


def read_rows(dataset: Any, planning: Planning) -> tuple[int, Samples | None]:
    """Number of rows, on every rank, and what samples they hold on rank 0, which alone needs it to plan.

    Raises:
        BadSample: rows without tokens, or samples that are too long, on every rank.
    """
    read: list[Samples] = []

    def count() -> int:
        samples = read_samples(dataset, planning.length_column)
        if planning.most_tokens is not None:
            samples, done = limited(samples, planning.most_tokens, planning.longer)
            if done:
                logger.warning("%s", done)
        read.append(samples)
        return len(samples)

    num_rows = broadcast(count, planning.control)
    return num_rows, read[0] if read else None
