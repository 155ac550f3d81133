"""This module makes the loaders of a stream: planned steps for training, and those of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import TrainingArguments

from hf_hetero.collators import PackedCollator
from hf_hetero.collators.row_counts import count_row
from hf_hetero.data.contents import learnt_columns
from hf_hetero.data.epochs import within_limits
from hf_hetero.data.evaluation_loader import EvaluationLoader
from hf_hetero.data.lengths import read_samples
from hf_hetero.data.loader import LOOKED_AT, step_loader
from hf_hetero.data.plan_ahead import Draws, PlanAhead
from hf_hetero.data.planning import Planning
from hf_hetero.data.streams.dealing import DealtDataset, StreamSampler
from hf_hetero.data.streams.reading import Position, Reading
from hf_hetero.data.streams.stream import Stream, check_whole, num_rows_of
from hf_hetero.data.training_steps import TrainingData
from hf_hetero.data.workers import end_with_this_process
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.samples.samples import Drawn, Samples
from hf_hetero.step import Step, StepBatch

logger = logging.getLogger(__name__)


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
    num_rows = broadcast(lambda: _num_rows(dataset, args.world_size), planning.control)
    stream: Stream | None = None
    if planning.control is None or args.process_index == 0:
        reading = Reading(
            dataset,
            batch_size,
            _watching_padding(_samples_read(planning, collate), collate),
            names,
            seed=args.seed if args.data_seed is None else args.data_seed,
            learnt=learnt_columns(planning.weight_column),
        )
        stream = Stream(
            reading,
            planning.num_ahead,
            num_steps=args.max_steps if args.max_steps > 0 else None,
            min_rows=1 if num_rows is not None else batch_size - batch_size // args.gradient_accumulation_steps + 1,
        )
    plans = PlanAhead(planning.source, _draws_of(stream), planning.num_ahead, planning.control)
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


def streamed_evaluation_loader(
    dataset: Any,
    names: Sequence[str] | None,
    collate: Callable[..., Any],
    args: TrainingArguments,
    planning: Planning,
) -> EvaluationLoader:
    """Return a loader of a dataset that can only be iterated: rank 0 reads it once. It is to be closed after use.

    Args:
        dataset: iterable.
        names: columns to keep; None: all.
        collate, args, planning: as for `evaluation_loader`.

    Raises:
        ConfigError: the dataset is one rank's part of a stream; raised on every rank.
    """
    batch_size = args.eval_batch_size * args.world_size
    num_rows = broadcast(lambda: _num_rows(dataset, args.world_size), planning.control)
    stream: Stream | None = None
    if planning.control is None or args.process_index == 0:
        reading = Reading(dataset, batch_size, _samples_read(planning, collate), names)
        stream = Stream(reading, planning.num_ahead, one_by_one=True)
    plans = PlanAhead(planning.source, _draws_of(stream), planning.num_ahead, planning.control)
    sampler: Any = StreamSampler(
        stream,
        plans.step,
        planning.control,
        args.dataloader_num_workers > 0,
        # an evaluation trains no steps: those that were taken count, so that their positions are forgotten
        num_trained=lambda: 0 if stream is None else stream.num_taken,
        skips=False,
        num_rows=num_rows,
        batch_size=batch_size,
    )
    loader = EvaluationLoader(
        DealtDataset(num_rows),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    loader.plans, loader.stream = plans, stream
    end_with_this_process(loader)
    return loader


def _num_rows(dataset: Any, num_ranks: int) -> int | None:
    """Return the examples of a stream that all ranks share, if it knows how many it has.

    Raises:
        ConfigError: it is one rank's part.
    """
    check_whole(dataset, num_ranks)
    return num_rows_of(dataset)


def _draws_of(stream: Stream | None) -> Draws:
    """Return what draws the samples of each step of a stream, which is needed on rank 0 only."""

    def draw(epoch: int, index: int) -> Drawn | None:
        assert stream is not None
        batch = stream.batch(epoch, index)
        return None if batch is None else batch.drawn

    # the other ranks plan nothing, so what follows does not matter there
    return Draws(draw, after=lambda key: key if stream is None else stream.after(key))


def _samples_read(planning: Planning, collate: Callable[..., Any]) -> Callable[[Sequence[Any]], Samples]:
    """Return a function that says which samples some examples of a stream hold, under the user's limits."""
    changes = list[str]()
    count = partial(count_row, collate)

    def read(examples: Sequence[Any]) -> Samples:
        samples, change = within_limits(read_samples(examples, planning.length_column, count), planning)
        if change:  # in every step, maybe: so it is a warning only once
            logger.log(logging.INFO if changes else logging.WARNING, "A step of the stream: %s", change)
            changes.append(change)
        return samples

    return read


def _watching_padding(
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
