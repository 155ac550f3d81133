"""The DataLoader of a planned run: batches, plans, ranks' shares and tensors joined into one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from hf_hetero.agreement import broadcast, gather
from hf_hetero.collators import PackedCollator
from hf_hetero.counting import tokens_of
from hf_hetero.epochs import Epochs, read_rows, within_limits
from hf_hetero.epochs import draws_of as draws_of
from hf_hetero.errors import ConfigError
from hf_hetero.lengths import read_samples
from hf_hetero.plan_ahead import Draws, PlanAhead
from hf_hetero.planning import Planning
from hf_hetero.sampler import GlobalBatches, Order, StepDataset, StepSampler, order_of
from hf_hetero.samples import Drawn, Samples
from hf_hetero.stream import Dealt, Position, Stream, StreamSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a run trains on.

    Args:
        loader: its items are planned steps. It must not be prepared by accelerate, which would deal them out among the
            ranks.
        plans: where they come from.
        order: what decides which samples make which step, to be compared when a checkpoint is resumed.
        stream: what reads a dataset that can only be iterated; on rank 0 only.
    """

    loader: DataLoader[Any]
    plans: PlanAhead
    order: dict[str, Any]
    stream: Stream | None = None

    def close(self) -> None:
        """End what works in the background."""
        self.plans.close()
        if self.stream is not None:
            self.stream.close()


def training_data(
    dataset: Any,
    columns: Callable[[Any], Any],
    collate: Callable[..., Any],
    args: TrainingArguments,
    batch_size: int,
    planning: Planning,
    global_step: Callable[[], int],
    names: Sequence[str] | None = None,
    sampler: Any = None,
) -> TrainingData:
    """The planned steps of a map-style dataset.

    Args:
        dataset: map-style.
        columns: removes the columns that the model does not need from a table.
        collate: a step's examples -> this rank's tensors.
        args: seed, workers, and how the last batch is treated.
        batch_size: samples of a step, over all ranks.
        planning: where plans come from.
        global_step: optimizer steps done when the first epoch starts.
        names: keys to keep of the rows of another dataset; None: all.
        sampler: gives the order of rows (`Trainer._get_train_sampler`); None: as `args` say.

    Raises:
        BadSample: rows without tokens, on every rank.
        ConfigError: the dataset is not the same on all ranks, on every rank.
    """
    rows = rows_of(dataset, columns, names)
    batches = batches_of(dataset, sampler, args, batch_size, planning, drop_last=args.dataloader_drop_last)
    epochs = Epochs(batches, rows, lambda: read_rows(dataset, planning, rows, collate), planning.control)
    num_steps = max(len(batches), 1)
    plans = PlanAhead(planning.source, epochs.draws, planning.num_ahead, planning.control)
    # `Trainer` skips these when it resumes within an epoch
    step_sampler = StepSampler(
        batches,
        plans.step,
        args.process_index if planning.control is not None else 0,
        num_trained=lambda: 0 if args.ignore_data_skip else global_step() % num_steps,
        begin=partial(epochs.begin, forget=plans.forget),
    )
    loader = step_loader(rows, step_sampler, with_column(collate, epochs.column), args, is_training=True)
    return TrainingData(loader, plans, {**batches.to_dict(), **epochs.content})


def streamed_data(
    dataset: Any,
    names: Sequence[str] | None,
    collate: Callable[..., Any],
    args: TrainingArguments,
    batch_size: int,
    planning: Planning,
    global_step: Callable[[], int],
    kept: Position | None = None,
) -> TrainingData:
    """The planned steps of a dataset that can only be iterated.

    Args:
        dataset: iterable.
        names: columns to keep; None: all.
        collate, args, batch_size, planning, global_step: as for `training_data`.
        kept: where a checkpoint says to go on.
    """
    num_steps, said = args.max_steps, list[str]()
    count = partial(tokens_of, collate)

    def samples_of(examples: Sequence[Any]) -> Samples:
        samples, done = within_limits(read_samples(examples, planning.length_column, count), planning)
        if done:  # in every step, maybe
            logger.log(logging.INFO if said else logging.WARNING, "A step of the stream: %s", done)
            said.append(done)
        return samples

    def draw(_: int, index: int) -> Drawn | None:
        assert stream is not None
        batch = stream.batch(index)
        return None if batch is None else batch.drawn

    stream: Stream | None = None
    if planning.control is None or args.process_index == 0:
        stream = Stream(
            dataset,
            batch_size,
            samples_of,
            num_ahead=planning.num_ahead,
            names=names,
            drop_last=args.dataloader_drop_last,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
    draws = Draws(draw, after=lambda step: (0, step[1] + 1) if step[1] + 1 < num_steps else None)
    plans = PlanAhead(planning.source, draws, planning.num_ahead, planning.control)
    sampler = StreamSampler(
        stream, plans.step, planning.control, num_steps, global_step, kept, skips=not args.ignore_data_skip
    )
    return TrainingData(
        step_loader(Dealt(), sampler, collate, args, is_training=True), plans, {"batch_size": batch_size}, stream
    )


def rows_of(dataset: Any, columns: Callable[[Any], Any], names: Sequence[str] | None) -> StepDataset:
    """A dataset as `Trainer` reads it: columns of a table go before, keys of other rows after they are read.

    Args:
        dataset: map-style.
        columns: removes those columns of a table that the model does not need.
        names: keys to keep of the rows of another dataset; None: all.
    """
    if isinstance(dataset, datasets.Dataset):
        return StepDataset(columns(dataset))
    return StepDataset(dataset, names)


def step_loader(
    dataset: Any,
    sampler: Any,
    collate: Callable[..., Any],
    args: TrainingArguments,
    is_training: bool,
    kind: type[DataLoader[Any]] = DataLoader,
) -> Any:
    """A DataLoader of steps, with the workers that were asked for.

    Among several ranks, and where several items make one step, items keep their order also with
    `dataloader_in_order=False`, which allows for another but asks for none.
    """
    has_free_order = args.world_size == 1 and args.gradient_accumulation_steps == 1
    seeding = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    return kind(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers and is_training,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order or not has_free_order,
        worker_init_fn=seeding if is_training else None,
    )


def with_column(collate: Callable[..., Any], column: str | None) -> Callable[..., Any]:
    """The collator, told which column steps are planned by."""
    if column is None or not isinstance(collate, PackedCollator):
        return collate
    told = copy.copy(collate)
    told.length_column = column
    return told


def _order_seed(args: TrainingArguments) -> int:
    """What accelerate seeds its sampler with: by then `Trainer` has seeded torch, and the user may have again."""
    return torch.random.initial_seed() if args.data_seed is None else args.data_seed


def batches_of(
    dataset: Any, sampler: Any, args: TrainingArguments, batch_size: int, planning: Planning, drop_last: bool
) -> GlobalBatches:
    """The rows of each step, in the order in which accelerate's loaders would draw them.

    Args:
        dataset: map-style.
        sampler: of its rows; None: as `args` say for training.
        args: seeds, and whether accelerate's own sampler shuffles.
        batch_size: rows of a step, over all ranks.
        planning: the control group.
        drop_last: leave out a last batch that is not full.

    Raises:
        ConfigError: a sampler that draws another number of rows on another rank, on every rank.
    """
    is_seedable = bool(args.accelerator_config.use_seedable_sampler)  # pyright: ignore
    order = Order(shuffle=args.train_sampling_strategy == "random")
    if sampler is not None or (order.shuffle and not is_seedable):
        sampler = RandomSampler(dataset) if sampler is None else sampler
        order = order_of(sampler, dataset, is_seedable, args.world_size, args.data_seed)
    if order.sampler is not None:
        name, sizes = type(order.sampler).__name__, gather([len(order.sampler)], planning.control)
        for rank, size in enumerate(sizes):
            if size != sizes[0]:
                raise ConfigError(
                    f"The sampler {name} draws {size[0]} rows on rank {rank}, {sizes[0][0]} on rank 0. Let it draw "
                    "from the whole dataset on every rank; HeteroTrainer deals the rows out itself."
                )
    seed = broadcast(lambda: _order_seed(args), planning.control)
    return GlobalBatches(len(dataset), batch_size, seed, order.shuffle, drop_last, order.sampler)
