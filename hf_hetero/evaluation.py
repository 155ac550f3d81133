"""Evaluation and prediction under plans: which datasets, a loader of their steps, and what a model gives for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from hf_hetero.collators import PackedCollator
from hf_hetero.loader import draws_of, read_rows
from hf_hetero.plan_ahead import PlanAhead
from hf_hetero.planning import Planning
from hf_hetero.sampler import GlobalBatches, StepDataset, StepSampler


class EvaluationLoader(DataLoader[Any]):
    """Items are planned steps of an evaluation, in the dataset's order."""

    plans: PlanAhead


def can_be_planned(dataset: Any, args: TrainingArguments) -> bool:
    """Whether an evaluation can be planned: samples of tokens, with an index, that nothing is generated from."""
    if getattr(args, "predict_with_generate", False) or isinstance(dataset, datasets.IterableDataset | IterableDataset):
        return False
    if isinstance(dataset, datasets.Dataset):
        return "input_ids" in dataset.column_names
    if not hasattr(dataset, "__len__") or not len(dataset):
        return False
    first: Any = dataset[0]
    return isinstance(first, Mapping) and "input_ids" in first


def evaluation_loader(
    dataset: Any,
    columns: Callable[[Any], Any],
    collate: Callable[..., Any],
    args: TrainingArguments,
    planning: Planning,
) -> EvaluationLoader:
    """A loader of all samples, each once, in order. Its `plans` are to be closed after use.

    Args:
        dataset: map-style.
        columns: removes the columns that the model does not need.
        collate: a step's examples -> this rank's tensors.
        args: size of a batch, workers.
        planning: where plans come from.

    Raises:
        BadSample: rows without tokens, on every rank.
    """
    num_rows, _, samples = read_rows(dataset, planning)
    batch_size = args.eval_batch_size * args.world_size
    num_dropped = num_rows % batch_size if args.dataloader_drop_last else 0
    batches = GlobalBatches(num_rows, batch_size, seed=0, shuffle=False, num_dropped=num_dropped)
    plans = PlanAhead(planning.source, draws_of(batches, samples), planning.num_ahead, planning.control)
    sampler: Any = StepSampler(batches, plans.step, args.process_index if planning.control is not None else 0)
    loader = EvaluationLoader(
        StepDataset(columns(dataset) if isinstance(dataset, datasets.Dataset) else dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    loader.plans = plans
    return loader


def has_labels(dataset: Any, packer: PackedCollator) -> bool:
    """Whether there is a loss to take; without labels there are only outputs."""
    return bool(len(dataset)) and packer.sample(dataset[0], "row 0").labels is not None


def ignored_outputs(model: Any) -> list[str]:
    """Outputs of a model that are no prediction."""
    return list(getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"]))


def outputs_of(outputs: Any, left_out: Collection[str]) -> Any:
    """A model's predictions, as `Trainer.prediction_step` picks them: one tensor, or a tuple."""
    kept = tuple(value for name, value in outputs.items() if name not in left_out)
    return kept[0] if len(kept) == 1 else kept


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
