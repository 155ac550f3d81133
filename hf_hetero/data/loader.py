"""This module makes the DataLoader of a planned run: it joins batches, plans, ranks' shares and tensors into one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from hf_hetero.collators import PackedCollator
from hf_hetero.collators.row_counts import count_row
from hf_hetero.data.contents import contents_of, learnt_columns
from hf_hetero.data.epochs import Epochs, read_rows, within_limits
from hf_hetero.data.epochs import draws_of as draws_of
from hf_hetero.data.lengths import is_table, read_samples
from hf_hetero.data.plan_ahead import Draws, PlanAhead
from hf_hetero.data.planning import Planning
from hf_hetero.data.sampler import GlobalBatches, Order, StepDataset, StepSampler, order_of
from hf_hetero.data.streams.dealing import DealtDataset, StreamSampler
from hf_hetero.data.streams.reading import Position, Reading
from hf_hetero.data.streams.stream import Stream, check_whole, num_rows_of
from hf_hetero.data.training_steps import TrainingData
from hf_hetero.data.workers import end_with_this_process
from hf_hetero.errors import ConfigError
from hf_hetero.ranks.agreement import broadcast, gather
from hf_hetero.samples.samples import Drawn, Samples
from hf_hetero.step import Step, StepBatch, StepShare

logger = logging.getLogger(__name__)

LOOKED_AT = 16
"""Rows among which two of different lengths are sought."""


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
    """Return the planned steps of a map-style dataset.

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
    at_once = batch_size // args.gradient_accumulation_steps
    batches = batches_of(dataset, sampler, args, batch_size, planning, at_once)
    epochs = Epochs(batches, rows, lambda: read_rows(dataset, planning, rows, collate), planning.control)
    num_steps = max(len(batches), 1)
    plans = PlanAhead(planning.source, epochs.draws, planning.num_ahead, planning.control)
    # `first` counts as `Trainer` does when it resumes
    rank = args.process_index if planning.control is not None else 0
    step_sampler = StepSampler(
        batches,
        plans.step,
        rank,
        first=lambda: (global_step() // num_steps, 0 if args.ignore_data_skip else global_step() % num_steps),
        begin=partial(epochs.begin, forget=plans.forget),
    )
    informed = with_column(collate, epochs.column)
    loader = step_loader(rows, step_sampler, informed, args, is_training=True)
    order: dict[str, Any] = {**batches.to_dict(), **epochs.content}
    if not rows.changes_with_epochs:
        learnt = learnt_columns(planning.weight_column)
        order["contents"] = broadcast(lambda: contents_of(dataset, len(rows), learnt), planning.control)

    def read(step: Step) -> StepBatch:
        return informed(rows.__getitems__(StepShare(step, rank)))

    return TrainingData(loader, plans, order, read)


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
    """Return the planned steps of a dataset that can only be iterated.

    Args:
        dataset: iterable.
        names: columns to keep; None: all.
        collate, args, batch_size, planning, global_step: as for `training_data`.
        kept: where a checkpoint says to go on.

    Raises:
        ConfigError: the dataset is one rank's part of a stream; raised on every rank.
    """
    num_rows = broadcast(lambda: (check_whole(dataset, args.world_size), num_rows_of(dataset))[1], planning.control)
    stream: Stream | None = None
    if planning.control is None or args.process_index == 0:
        accumulation, seed = args.gradient_accumulation_steps, args.seed if args.data_seed is None else args.data_seed
        stream = Stream(
            Reading(
                dataset,
                batch_size,
                watching_padding(samples_of(planning, collate), collate),
                names,
                seed,
                learnt_columns(planning.weight_column),
            ),
            planning.num_ahead,
            num_steps=args.max_steps if args.max_steps > 0 else None,
            min_rows=1 if num_rows is not None else batch_size - batch_size // accumulation + 1,
        )
    plans = PlanAhead(planning.source, draws_of_stream(stream), planning.num_ahead, planning.control)
    if kept is not None and num_rows is not None and kept.batches * batch_size >= num_rows:
        kept = Position(kept.epoch + 1)  # `Trainer` does not ask for more than it knows of
    sampler = StreamSampler(
        stream,
        plans.step,
        planning.control,
        args.dataloader_num_workers > 0,
        global_step,
        kept,
        skips=not args.ignore_data_skip,
        num_rows=num_rows,
        batch_size=batch_size,
        num_kept=1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2),  # torch's own factor is 2
    )
    dealt = DealtDataset(num_rows)

    def read(step: Step) -> StepBatch:
        return collate(dealt.__getitems__(sampler.deal_again(step)))

    loader = step_loader(dealt, sampler, collate, args, is_training=True)
    return TrainingData(loader, plans, {"batch_size": batch_size}, read, stream, kept)


def draws_of_stream(stream: Stream | None) -> Draws:
    """Return what draws the samples of each step of a stream, which is needed on rank 0 only."""

    def draw(epoch: int, index: int) -> Drawn | None:
        assert stream is not None
        batch = stream.batch(epoch, index)
        return None if batch is None else batch.drawn

    # the other ranks plan nothing, so what follows does not matter there
    return Draws(draw, after=lambda key: key if stream is None else stream.after(key))


def samples_of(planning: Planning, collate: Callable[..., Any]) -> Callable[[Sequence[Any]], Samples]:
    """Return a function that says which samples the examples of a stream hold, under the user's limits."""
    changes = list[str]()
    count = partial(count_row, collate)

    def read(examples: Sequence[Any]) -> Samples:
        samples, change = within_limits(read_samples(examples, planning.length_column, count), planning)
        if change:  # in every step, maybe: so it is a warning only once
            logger.log(logging.INFO if changes else logging.WARNING, "A step of the stream: %s", change)
            changes.append(change)
        return samples

    return read


def watching_padding(
    read: Callable[[Sequence[Any]], Samples], collate: Callable[..., Any]
) -> Callable[[Sequence[Any]], Samples]:
    """Return the same function, which also refuses a collator that pads the first examples of a stream.

    A step may hold a single example, and it takes two to see padding, so they are looked at together.
    """
    watched = list[Any]()

    def read_watching(examples: Sequence[Any]) -> Samples:
        samples = read(examples)  # what is wrong with a row of its own comes first
        if isinstance(collate, PackedCollator) and len(watched) < LOOKED_AT:
            watched.extend(examples[: LOOKED_AT - len(watched)])
            collate.check_padding(watched)
        return samples

    return read_watching


def sampler_of(loader: Any) -> Any:
    """Return what draws the rows of a map-style dataset, below all that accelerate has put around it."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches.sampler


def rows_of(dataset: Any, columns: Callable[[Any], Any], names: Sequence[str] | None) -> StepDataset:
    """Return a dataset as `Trainer` reads it: columns of a table go before, keys of other rows after they are read.

    Args:
        dataset: map-style.
        columns: removes those columns of a table that the model does not need.
        names: keys to keep of the rows of another dataset; None: all.
    """
    if is_table(dataset):
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
    """Return a DataLoader of steps, with the workers that were asked for.

    Among several ranks, and where several items make one step, items keep their order also with
    `dataloader_in_order=False`, which allows for another but asks for none.
    """
    # ranks would take items of different steps, and meet in collectives of different plans
    has_free_order = args.world_size == 1 and args.gradient_accumulation_steps == 1
    seeding = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    loader = kind(
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
    end_with_this_process(loader)
    return loader


def with_column(collate: Callable[..., Any], column: str | None) -> Callable[..., Any]:
    """Return a copy of the collator that knows which column steps are planned by."""
    if column is None or not isinstance(collate, PackedCollator):
        return collate
    informed = copy.copy(collate)
    informed.length_column = column
    return informed


def _order_seed(args: TrainingArguments) -> int:
    """Return what accelerate seeds its sampler with: `Trainer` has seeded torch, and the user may have since."""
    return torch.random.initial_seed() if args.data_seed is None else args.data_seed


def batches_of(
    dataset: Any, sampler: Any, args: TrainingArguments, batch_size: int, planning: Planning, at_once: int
) -> GlobalBatches:
    """Return the rows of each step, in the order in which accelerate's loaders would draw them.

    Args:
        dataset: map-style.
        sampler: of its rows; None: as `args` say for training.
        args: seeds, and whether accelerate's own sampler shuffles.
        batch_size: rows of a step, over all ranks.
        planning: the control group.
        at_once: rows of one batch of each rank, all ranks together: `dataloader_drop_last` leaves out fewer.

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
    # rank 0's, because a user may have seeded torch otherwise on each rank
    seed = broadcast(lambda: _order_seed(args), planning.control)
    num_rows = len(dataset) if order.sampler is None else len(order.sampler)
    num_dropped = num_rows % at_once if args.dataloader_drop_last else 0
    return GlobalBatches(len(dataset), batch_size, seed, order.shuffle, num_dropped, order.sampler)
