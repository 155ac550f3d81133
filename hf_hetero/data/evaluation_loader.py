"""This module makes the loader of an evaluation: its items are planned steps, and each row is in one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import TrainingArguments

from hf_hetero.data.epochs import Epochs, KeptCounts, read_rows
from hf_hetero.data.lengths import gives_tokens
from hf_hetero.data.loader import batches_of, rows_of, step_loader, with_column
from hf_hetero.data.plan_ahead import PlanAhead
from hf_hetero.data.planning import Planning
from hf_hetero.data.sampler import StepSampler
from hf_hetero.data.streams.stream import Stream


class EvaluationLoader(DataLoader[Any]):
    """An `EvaluationLoader` gives the planned steps of an evaluation, in the dataset's order."""

    plans: PlanAhead
    stream: Stream | None = None

    def close(self) -> None:
        """End what works in the background."""
        self.plans.close()
        if self.stream is not None:
            self.stream.close()


def can_be_planned(dataset: Any, args: TrainingArguments, makes_tokens: bool = False) -> bool:
    """Return whether an evaluation can be planned: it has samples of tokens, and generates nothing from them.

    Args:
        dataset: map-style, or one that can only be iterated.
        args: of the trainer.
        makes_tokens: a collator makes them of rows that have none.
    """
    if getattr(args, "predict_with_generate", False):
        return False
    if makes_tokens:
        return True
    if isinstance(dataset, IterableDataset):
        return _gives_tokens(dataset)
    return gives_tokens(dataset)


def _gives_tokens(stream: Any) -> bool:
    """Return whether the examples of a stream have `input_ids`, as far as can be told without using them up."""
    if (names := getattr(stream, "column_names", None)) is not None:
        return "input_ids" in names
    examples = iter(stream)
    if examples is iter(stream):  # it can be read once only, so it is not tried
        return True
    first: Any = next(examples, None)
    return isinstance(first, Mapping) and "input_ids" in first


def evaluation_loader(
    dataset: Any,
    columns: Callable[[Any], Any],
    collate: Callable[..., Any],
    args: TrainingArguments,
    planning: Planning,
    names: Sequence[str] | None = None,
    sampler: Any = None,
    counts: KeptCounts | None = None,
) -> EvaluationLoader:
    """Return a loader of all samples, each once, in order. It is to be closed after use.

    Args:
        dataset: map-style.
        columns: removes the columns that the model does not need from a table.
        collate: a step's examples -> this rank's tensors.
        args: size of a batch, workers.
        planning: where plans come from.
        names: keys to keep of the rows of a dataset that is no table; None: all.
        sampler: gives other rows, or another order (`Trainer._get_eval_sampler`); None: all, in order.
        counts: what is known of datasets that were evaluated before.

    Raises:
        BadSample: rows without tokens, on every rank.
    """
    rows, size = rows_of(dataset, columns, names), args.eval_batch_size * args.world_size
    sampler = SequentialSampler(dataset) if sampler is None else sampler
    batches = batches_of(dataset, sampler, args, size, planning, at_once=size)
    read = read_rows if counts is None else counts.read
    epochs = Epochs(batches, rows, lambda: read(dataset, planning, rows, collate), planning.control)
    plans = PlanAhead(planning.source, epochs.draws, planning.num_ahead, planning.control)
    rank = args.process_index if planning.control is not None else 0
    begin = partial(epochs.begin, forget=plans.forget)
    steps: Any = StepSampler(batches, plans.step, rank, begin=begin)
    collate = with_column(collate, epochs.column)
    loader = step_loader(rows, steps, collate, args, is_training=False, kind=EvaluationLoader)
    loader.plans = plans
    return loader
