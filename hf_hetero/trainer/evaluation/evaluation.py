"""Evaluation and prediction go by planned steps here, from a dataset to its metrics, or else are Trainer's own.

`is_planned` decides which; `evaluate` is the loop over planned steps, of which `predictions.Results` makes metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_hetero.checks import overrides
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.data.evaluation_loader import EvaluationLoader, can_be_planned, evaluation_loader
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.streams.loaders import streamed_evaluation_loader
from hf_hetero.data.streams.stream import is_stream
from hf_hetero.errors import BadSample, ConfigError, UnsupportedModel
from hf_hetero.model.classes.labelled import SEQUENCES, labelled_of
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.samples.rows import PACKED_COLUMN
from hf_hetero.step import RankMicroBatch
from hf_hetero.trainer import routers
from hf_hetero.trainer.classes.planned import LABELS, classes_of, outputs_by_token
from hf_hetero.trainer.evaluation.predictions import Piece, Results
from hf_hetero.trainer.fitting import half_evaluation_dtype
from hf_hetero.trainer.packing import columns_kept, makes_tokens, packer_of
from hf_hetero.trainer.run import BetweenRuns, PlannedRun, begin_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A `Request` is what an evaluation is asked for.

    Args:
        dataset: map-style, or one that can only be iterated.
        loss_only: no outputs.
        is_prediction: outputs are returned, not only metrics of them.
        ignore_keys: outputs that are no prediction; None: those that the model's config names.
    """

    dataset: Any
    loss_only: bool
    is_prediction: bool
    ignore_keys: list[str] | None


# ----------------------------------------------------------------------------------------------------- planned or not


def is_planned(
    trainer: Trainer, hetero: HeteroConfig, dataset: Any, control: Callable[[], dist.ProcessGroup | None]
) -> bool:
    """Return whether an evaluation is planned, the same on all ranks; else it is Trainer's own.

    Args:
        trainer, hetero: settings, and methods of a subclass.
        dataset: to evaluate; None: not known.
        control: group of all ranks, asked for only where one of them has to look at a stream for all.
    """
    if not hetero.plan_evaluation or dataset is None:
        return False
    for name, owner in overrides.own(trainer, overrides.EVALUATION).items():
        logger.info("Evaluation is not planned: %s.%s is its own.", owner, name)
        return False
    # TRL leaves out the names where a loss comes without labels
    known: list[str] = [] if getattr(trainer, "learns_scores", False) else ["labels"]
    if trainer.label_names != known or _gives_attentions(trainer.model):
        logger.info("Evaluation is not planned: other labels, or attention weights, are asked for.")
        return False
    if labelled_of(base_model(trainer.model)) == SEQUENCES and _wants_tokens(trainer):
        logger.info("Evaluation is not planned: beside scores of sequences, values of tokens are asked for.")
        return False
    makes = makes_tokens(trainer, packer_of(trainer.data_collator, trainer.processing_class))
    look = partial(can_be_planned, dataset, trainer.args, makes)
    # all ranks can look at a dataset's rows; at a stream one looks for all, since ranks may be given different parts
    return broadcast(look, control()) if is_stream(dataset) else look()


def _gives_attentions(model: Any) -> bool:
    """Return whether the weights of attention are among a model's outputs: no rank has those of a sample it shares."""
    return bool(getattr(model.config, "output_attentions", False))


def _wants_tokens(trainer: Any) -> bool:
    """Return whether an evaluation is to give what each token has, where a model gives one score a sequence."""
    return "inputs" in trainer.args.include_for_metrics or bool(trainer.model.config.output_hidden_states)


def refuse_attentions(model: Any) -> None:
    """Refuse to give weights of attention while training, when attention is this package's, which keeps none.

    Raises:
        UnsupportedModel: they are asked for.
    """
    if _gives_attentions(model):
        raise UnsupportedModel(
            "config.output_attentions=True asks an evaluation for the weights of attention, which are not kept while "
            "training. Set it to False, or evaluate after training."
        )


def refuse_packed_rows(dataset: Any) -> None:
    """Refuse packed rows in an evaluation without plans, in which the documents of a row would see each other.

    Raises:
        ConfigError: its rows are packed.
    """
    if (names := getattr(dataset, "column_names", None)) is None and not isinstance(dataset, IterableDataset):
        has_rows = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)
        first: Any = dataset[0] if has_rows else None
        names = list(first) if isinstance(first, Mapping) else []
    _refuse_packed(names or ())


def watched(dataset: Any) -> Any:
    """Return a stream that refuses packed rows when they are read, if its columns are unknown; else the dataset."""
    if isinstance(dataset, IterableDataset) and getattr(dataset, "column_names", None) is None:
        return _Watched(dataset)
    return dataset


class _Watched(IterableDataset[Any]):
    """A `_Watched` is a stream, each of whose rows is looked at before `Trainer` removes its columns."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for row in self._dataset:
            _refuse_packed(row if isinstance(row, Mapping) else ())
            yield row

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is copied into a worker
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _refuse_packed(names: Collection[str]) -> None:
    """Refuse rows with these columns, if one of them says that they are packed."""
    if PACKED_COLUMN in names:
        raise ConfigError(
            f"The rows to evaluate are packed ({PACKED_COLUMN}), and without plans their documents would see each "
            "other. Leave HeteroConfig.plan_evaluation on and predict_with_generate off, or give rows of one document."
        )


# ----------------------------------------------------------------------------------------------------------- the loop


def evaluate(
    trainer: Trainer, run: PlannedRun, between: BetweenRuns, request: Request, source: PlanSource, prefix: str
) -> EvalLoopOutput:
    """Evaluate, or predict, by planned steps.

    Args:
        trainer: whose loss, metrics and callbacks count.
        run: of planned steps.
        between: what is known of the dataset, and of logged means.
        request: what is asked for.
        source: of plans.
        prefix: of the names of metrics.

    Raises:
        HeteroError: a bad sample, on every rank; or `preprocess_logits_for_metrics` does not keep a value a token.
    """
    packer, has_labels = _packer_and_labels(run, request)
    results = Results(
        trainer.args,
        trainer.preprocess_logits_for_metrics,
        trainer.compute_metrics,
        not request.loss_only,
        run.control,
        has_labels=has_labels,
        keeps_batches=request.is_prediction,
        classes=classes_of(trainer),
    )
    model = _prepared_model(trainer)
    loader = planned_steps(trainer, run, packer, between, request.dataset, source)
    forward = _forward_of(trainer, run, request, model, has_labels)
    number, steps = trainer.state.global_step + 1, iter(loader)
    try:
        coming = run.confirmed(steps, number)
        while (batch := coming.batch) is not None:
            num_targets = coming.num_targets
            # asked for before this one is computed, because `add` must know which step is the last, and a stream does
            # not know its last step before it has ended
            coming = run.confirmed(steps, number)
            loss, pieces = 0.0, list[Piece]()
            begin_step(trainer, model, batch, learns=False)
            for index, micro_batch in enumerate(batch.micro_batches):
                part, outputs = forward(micro_batch, index, num_targets)
                loss += part
                if results.keeps_outputs:
                    pieces += results.pieces(batch, micro_batch, outputs)
            loss += routers.evaluation_loss(trainer, run, len(batch.micro_batches)) if has_labels else 0.0
            results.add(batch, loss, num_targets, pieces, is_last=coming.batch is None)
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    except BadSample:  # rows may have changed since they were counted
        between.counts.forget(request.dataset)
        raise
    finally:
        loader.close()
    if has_labels:
        between.means.add("eval", results.micro_batch_targets)
    output = results.output(prefix)
    if hasattr(trainer, "model_preparation_time"):  # as in stock, where evaluation comes before training
        metrics = cast("dict[str, Any]", output.metrics)
        metrics[f"{prefix}_model_preparation_time"] = trainer.model_preparation_time
    return output


def _packer_and_labels(run: PlannedRun, request: Request) -> tuple[PackedCollator, bool]:
    """Return what packs the rows, and whether there is a loss to take."""
    if is_stream(request.dataset) or _has_labels(request.dataset, run.packer):
        return run.packer, True
    if request.is_prediction:
        return run.packer, False
    # what training learns where rows have no labels is what they are evaluated by; outputs need none
    return run.unlabelled_packer, _has_labels(request.dataset, run.unlabelled_packer)


def _has_labels(dataset: Any, packer: PackedCollator) -> bool:
    """Return whether there is a loss to take; without labels there are only outputs."""
    return bool(len(dataset)) and packer.sample(dataset[0], "row 0").labels is not None


def planned_steps(
    trainer: Trainer, run: PlannedRun, packer: PackedCollator, between: BetweenRuns, dataset: Any, source: PlanSource
) -> EvaluationLoader:
    """Load planned steps of all rows, each once, in the dataset's order."""
    planning, names = run.planning(source), columns_kept(trainer)
    if is_stream(dataset):
        labelled = replace(packer, needs_labels=True)  # a stream does not show its first row
        return streamed_evaluation_loader(dataset, names, labelled, trainer.args, planning)
    columns = partial(trainer._remove_unused_columns, description="evaluation")  # pyright: ignore[reportPrivateUsage]
    return evaluation_loader(dataset, columns, packer, trainer.args, planning, names, counts=between.counts)


def _prepared_model(trainer: Trainer) -> torch.nn.Module:
    """Return the model in evaluation mode; where nothing was trained yet, accelerate prepares it first, as in stock."""
    model: Any = trainer.model
    if not trainer.accelerator._models:  # pyright: ignore[reportPrivateUsage]
        start = time.time()
        sharded = trainer.is_fsdp_enabled and not trainer.args.torch_compile
        accelerator: Any = trainer.accelerator
        model = accelerator.prepare(model) if sharded else accelerator.prepare_model(model, evaluation_mode=True)
        trainer.model_preparation_time = round(time.time() - start, 4)  # Trainer's own attribute: it takes it off
        trainer.model_wrapped = model
        if trainer.is_fsdp_enabled:
            trainer.model = model
    if (half := half_evaluation_dtype(trainer)) is not None:
        model = model.to(dtype=half, device=trainer.args.device)
    parts: tuple[Any, Any] = (model, trainer.optimizer)
    for part in parts:
        if callable(getattr(part, "eval", None)):  # some optimizers have an average to evaluate with
            part.eval()
    return model


def _forward_of(
    trainer: Trainer, run: PlannedRun, request: Request, model: torch.nn.Module, has_labels: bool
) -> Callable[[RankMicroBatch, int, int], tuple[float, Any]]:
    """Make what computes a micro-batch: it, its number, targets of its step -> its part of the mean loss, outputs."""
    ignored = _ignored_outputs(trainer.model) if request.ignore_keys is None else request.ignore_keys
    # of routers: these are no tokens' predictions
    left_out, classes = {"loss", "aux_loss", "router_logits", "reached", *ignored}, classes_of(trainer)

    def forward(micro_batch: RankMicroBatch, index: int, num_targets: int) -> tuple[float, Any]:
        with torch.no_grad():  # by which the context knows that there is no backward pass to keep anything for
            context = run.context(micro_batch, index, trainer.state.global_step + 1)
        planned: dict[str, Any] = {**micro_batch.inputs, "hetero": context}
        inputs: Any = trainer._prepare_inputs(planned)  # pyright: ignore[reportPrivateUsage]
        planned_layers = run.fitted.state_layers.planned(context)
        with torch.no_grad(), trainer.compute_loss_context_manager(), planned_layers:
            if not has_labels:
                inputs = {name: value for name, value in inputs.items() if name not in LABELS}
                outputs: Any = model(**inputs) if classes is None else outputs_by_token(model, inputs, classes)
                return 0.0, _outputs_of(outputs, left_out)
            # a step may have no target: its loss is 0 then, and counts for nothing (`Results.add`)
            total = torch.tensor(max(num_targets, 1), device=trainer.args.device)
            with routers.evaluated(run, model, context.num_tokens):
                result: Any = trainer.compute_loss(model, inputs, not request.loss_only, total)
        loss, outputs = (result, None) if request.loss_only else result
        # compute_loss allows for an average over ranks
        loss_part = loss.item() / trainer.args.world_size
        run.groups.check()  # all that was computed for it is there, unless it was broken off
        return loss_part, None if outputs is None else _outputs_of(outputs, left_out)

    return forward


def _ignored_outputs(model: Any) -> list[str]:
    """Return the names of a model's outputs that are no prediction."""
    return list(getattr(model.config, "keys_to_ignore_at_inference", ["past_key_values"]))


def _outputs_of(outputs: Any, left_out: Collection[str]) -> Any:
    """Return a model's predictions, as `Trainer.prediction_step` picks them: one tensor, or a tuple."""
    predictions = tuple(value for name, value in outputs.items() if name not in left_out)
    return predictions[0] if len(predictions) == 1 else predictions
