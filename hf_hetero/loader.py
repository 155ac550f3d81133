"""The DataLoader of a planned run: batches, plans, ranks' shares and tensors joined into one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_hetero.agreement import broadcast
from hf_hetero.contents import contents_of
from hf_hetero.dealing import DealtDataset, StreamSampler
from hf_hetero.lengths import read_samples
from hf_hetero.plan_ahead import Draws, PlanAhead
from hf_hetero.planning import Planning
from hf_hetero.reading import Position, Reading
from hf_hetero.sampler import GlobalBatches, StepDataset, StepSampler
from hf_hetero.samples import Drawn, Samples, limited
from hf_hetero.stream import Stream, check_whole, num_rows_of

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
        entered: where a stream goes on, on all ranks; None: at its start, or a checkpoint does not say.
    """

    loader: DataLoader[Any]
    plans: PlanAhead
    order: dict[str, Any]
    stream: Stream | None = None
    entered: Position | None = None

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
) -> TrainingData:
    """The planned steps of a map-style dataset.

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
    num_rows, content, samples = read_rows(dataset, planning)
    batches = GlobalBatches(
        num_rows=num_rows,
        batch_size=batch_size,
        seed=_data_seed(args),
        shuffle=args.train_sampling_strategy == "random",
        drop_last=args.dataloader_drop_last,
    )
    num_steps = max(len(batches), 1)
    plans = PlanAhead(planning.source, draws_of(batches, samples), planning.num_ahead, planning.control)
    # `Trainer` skips these when it resumes within an epoch
    sampler = StepSampler(
        batches,
        plans.step,
        args.process_index if planning.control is not None else 0,
        num_trained=lambda: 0 if args.ignore_data_skip else global_step() % num_steps,
    )
    rows = StepDataset(columns(dataset) if isinstance(dataset, datasets.Dataset) else dataset)
    contents = broadcast(lambda: contents_of(dataset, num_rows), planning.control)
    order = {**batches.to_dict(), "lengths": content, "contents": contents}
    return TrainingData(_loader(rows, sampler, collate, args), plans, order)


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

    Raises:
        ConfigError: the dataset is one rank's part of a stream; raised on every rank.
    """
    num_rows = broadcast(lambda: (check_whole(dataset, args.world_size), num_rows_of(dataset))[1], planning.control)
    stream: Stream | None = None
    if planning.control is None or args.process_index == 0:
        accumulation = args.gradient_accumulation_steps
        stream = Stream(
            Reading(dataset, batch_size, samples_of(planning), names, _data_seed(args)),
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
    )
    loader = _loader(DealtDataset(num_rows), sampler, collate, args)
    return TrainingData(loader, plans, {"batch_size": batch_size}, stream, kept)


def draws_of_stream(stream: Stream | None) -> Draws:
    """The samples of each step. `stream` is needed on rank 0 only."""

    def draw(epoch: int, index: int) -> Drawn | None:
        assert stream is not None
        batch = stream.batch(epoch, index)
        return None if batch is None else batch.drawn

    return Draws(draw, after=lambda key: key if stream is None else stream.after(key))


def samples_of(planning: Planning) -> Callable[[Sequence[Any]], Samples]:
    """Examples of a stream -> the samples they hold, under the user's limits."""
    said = list[str]()

    def read(examples: Sequence[Any]) -> Samples:
        samples, done = _within_limits(read_samples(examples, planning.length_column), planning)
        if done:  # in every step, maybe
            logger.log(logging.INFO if said else logging.WARNING, "A step of the stream: %s", done)
            said.append(done)
        return samples

    return read


def draws_of(batches: GlobalBatches, samples: Samples | None) -> Draws:
    """The samples of each step. `samples` is needed on rank 0 only."""

    def draw(epoch: int, index: int) -> Drawn:
        assert samples is not None
        return samples.of(batches.rows(epoch, index))

    return Draws(draw, batches.after)


def _loader(dataset: Any, sampler: Any, collate: Callable[..., Any], args: TrainingArguments) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _data_seed(args: TrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def read_rows(dataset: Any, planning: Planning) -> tuple[int, str, Samples | None]:
    """Number of rows and a fingerprint of their lengths; and what samples they hold on rank 0, which alone plans.

    Raises:
        BadSample: rows without tokens, or samples that are too long, on every rank.
    """
    read: list[Samples] = []

    def count() -> tuple[int, str]:
        samples, done = _within_limits(read_samples(dataset, planning.length_column), planning)
        if done:
            logger.warning("%s", done)
        read.append(samples)
        return len(samples), samples.fingerprint()

    num_rows, content = broadcast(count, planning.control)
    return num_rows, content, read[0] if read else None


def _within_limits(samples: Samples, planning: Planning) -> tuple[Samples, str]:
    if planning.most_tokens is None:
        return samples, ""
    return limited(samples, planning.most_tokens, planning.longer)
