"""Evaluation and prediction under plans: which datasets, and a loader of their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from hf_hetero.epochs import Epochs, read_rows
from hf_hetero.lengths import gives_tokens
from hf_hetero.loader import batches_of, rows_of, step_loader, with_column
from hf_hetero.plan_ahead import PlanAhead
from hf_hetero.planning import Planning
from hf_hetero.sampler import StepSampler


class EvaluationLoader(DataLoader[Any]):
    """Items are planned steps of an evaluation, in the dataset's order."""

    plans: PlanAhead


def can_be_planned(dataset: Any, args: TrainingArguments) -> bool:
    """Whether an evaluation can be planned: samples of tokens, with an index, that nothing is generated from."""
    if getattr(args, "predict_with_generate", False) or isinstance(dataset, datasets.IterableDataset | IterableDataset):
        return False
    return gives_tokens(dataset)


def evaluation_loader(
    dataset: Any,
    columns: Callable[[Any], Any],
    collate: Callable[..., Any],
    args: TrainingArguments,
    planning: Planning,
    names: Sequence[str] | None = None,
    sampler: Any = None,
) -> EvaluationLoader:
    """A loader of all samples, each once, in order. Its `plans` are to be closed after use.

    Args:
        dataset: map-style.
        columns: removes the columns that the model does not need from a table.
        collate: a step's examples -> this rank's tensors.
        args: size of a batch, workers.
        planning: where plans come from.
        names: keys to keep of the rows of a dataset that is no table; None: all.
        sampler: gives other rows, or another order (`Trainer._get_eval_sampler`); None: all, in order.

    Raises:
        BadSample: rows without tokens, on every rank.
    """
    rows, size = rows_of(dataset, columns, names), args.eval_batch_size * args.world_size
    sampler = SequentialSampler(dataset) if sampler is None else sampler
    batches = batches_of(dataset, sampler, args, size, planning, drop_last=False)
    epochs = Epochs(batches, rows, lambda: read_rows(dataset, planning, rows, collate), planning.control)
    plans = PlanAhead(planning.source, epochs.draws, planning.num_ahead, planning.control)
    rank = args.process_index if planning.control is not None else 0
    begin = partial(epochs.begin, forget=plans.forget)
    steps: Any = StepSampler(batches, plans.step, rank, begin=begin)
    collate = with_column(collate, epochs.column)
    loader = step_loader(rows, steps, collate, args, is_training=False, kind=EvaluationLoader)
    loader.plans = plans
    return loader


def prepared_model(trainer: Trainer) -> torch.nn.Module:
    """The model in evaluation mode; where nothing was trained yet, accelerate prepares it first, as in stock."""
    model: Any = trainer.model
    if not trainer.accelerator._models:  # pyright: ignore[reportPrivateUsage]
        sharded = trainer.is_fsdp_enabled and not trainer.args.torch_compile
        accelerator: Any = trainer.accelerator
        model = accelerator.prepare(model) if sharded else accelerator.prepare_model(model, evaluation_mode=True)
        trainer.model_wrapped = model
        if trainer.is_fsdp_enabled:
            trainer.model = model
    if not trainer.is_in_train and (trainer.args.fp16_full_eval or trainer.args.bf16_full_eval):
        half = torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16
        model = model.to(dtype=half, device=trainer.args.device)
    parts: tuple[Any, Any] = (model, trainer.optimizer)
    for part in parts:
        if callable(getattr(part, "eval", None)):  # some optimizers have an average to evaluate with
            part.eval()
    return model
