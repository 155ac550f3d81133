"""Training goes by planned steps: what `train` has open, its data, forward and backward of a step, its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_hetero.attention.context import AttentionContext
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.costs import CostModel
from hf_hetero.data.loader import LOOKED_AT, TrainingData, sampler_of, streamed_data, training_data
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.data.streams.stream import is_stream
from hf_hetero.errors import BadSample, ConfigError, UnsupportedModel
from hf_hetero.model.logged_means import LoggedMeans
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.model.timing import StepClock
from hf_hetero.plan import StepReport
from hf_hetero.ranks import sharding
from hf_hetero.ranks.agreement import broadcast, gather
from hf_hetero.ranks.groups import limit_of, named
from hf_hetero.step import StepPart
from hf_hetero.trainer.checkpoint import Resumed, Run, Saving, keep_cost_model
from hf_hetero.trainer.fitting import Fitted
from hf_hetero.trainer.run import BetweenRuns, ConfirmedStep, PlannedRun, columns_kept
from hf_hetero.trainer.safekeeping import claim

REMEDIES = {
    "batch_size": "per_device_train_batch_size x gradient_accumulation_steps x ranks must stay the same",
    "rows": "go back to the dataset it was trained on",
    "lengths": "go back to the dataset, and to the tokenizer, it was trained on",
}

ForwardBackward = Callable[[dict[str, Any]], torch.Tensor]
"""Inputs of the model -> this rank's part of the loss, once its gradients are there."""


@dataclass(slots=True)
class Training:
    """`Training` is what one call of `train` has open beside its run, and the step underway.

    Args:
        opened: closes it all when `train` ends, however it does.
        resumed: the checkpoint that training goes on from; None: it starts anew.
        data: the planned steps, from the moment Trainer asks for its loader.
        clock: times micro-batches, from the first step on.
        saving: how a checkpoint is written, while one is.
        step: which all ranks hold; its micro-batches are being trained on.
        step_s: seconds that they took so far.
    """

    opened: ExitStack
    resumed: Resumed | None = None
    data: TrainingData | None = None
    clock: StepClock | None = None
    saving: Saving | None = None
    step: ConfirmedStep | None = None
    step_s: float = 0.0

    @property
    def checkpoint(self) -> str | None:
        """Return the folder of the checkpoint that training goes on from; None: it starts anew."""
        return None if self.resumed is None else str(self.resumed.folder)


# ------------------------------------------------------------------------------------------------------------ the data


def _claim_folder(trainer: Trainer, run: PlannedRun, training: Training) -> None:
    """Notice another run in the output folder; those of a search have their own."""
    args = trainer.args

    def claim_on_rank_0() -> None:
        mine = claim(Path(args.output_dir or "."), saves=args.save_strategy != SaveStrategy.NO)
        if mine is not None:
            training.opened.callback(mine.close)

    broadcast(claim_on_rank_0 if trainer.hp_search_backend is None else lambda: None, run.control)


def open_data(
    trainer: Trainer, run: PlannedRun, training: Training, source: PlanSource, loader: DataLoader[Any]
) -> None:
    """Open the planned steps of a run, whose folder is this run's alone.

    Args:
        trainer: with the dataset.
        run, training: the run.
        source: of plans.
        loader: Trainer's own; its sampler gives the order of rows.

    Raises:
        BadSample: the dataset has no tokens, or an empty sample; raised on every rank.
        ConfigError: the checkpoint's data were others, or another run has the folder; raised on every rank.
    """
    training.opened.callback(run.groups.relax)
    _claim_folder(trainer, run, training)
    packer, args = run.labelled_packer, trainer.args
    before = training.resumed.run if training.resumed is not None and not args.ignore_data_skip else None
    common: dict[str, Any] = {
        "collate": packer,
        "args": args,
        "batch_size": trainer.get_total_train_batch_size(args),
        "planning": run.planning(source),
        "global_step": lambda: trainer.state.global_step,
        "names": columns_kept(trainer),
    }
    dataset: Any = trainer.train_dataset
    if is_stream(dataset):
        data = streamed_data(dataset, kept=before.stream if before is not None else None, **common)
    else:
        packer.check_padding(dataset[row] for row in range(min(len(dataset), LOOKED_AT)))
        columns = partial(trainer._remove_unused_columns, description="training")  # pyright: ignore[reportPrivateUsage]
        data = training_data(dataset, columns, sampler=sampler_of(loader), **common)
    training.opened.callback(data.close)  # before it may be refused: it plans ahead already
    check_order(data.order, before.order if before is not None else {})
    training.data = data


def check_order(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse to go on with other data: what is left of an epoch would not be what was not trained yet.

    Raises:
        ConfigError: what differs, and what to do.
    """
    for name in saved:
        if name in current and name != "contents" and current[name] != saved[name]:
            remedy = REMEDIES.get(name, f"set it to {saved[name]}")
            raise ConfigError(
                f"The data's {name} was {saved[name]} when the checkpoint was written and is {current[name]} now, so "
                f"steps would draw other samples: {remedy}; or start the data anew with ignore_data_skip=True."
            )
    rows: dict[str, int] = saved.get("contents", {})
    if changed := sorted(int(row) for row in rows if current.get("contents", {}).get(row, rows[row]) != rows[row]):
        raise ConfigError(
            f"Row {changed[0]} of the data holds other tokens or labels than when the checkpoint was written "
            f"({len(changed)} of {len(rows)} rows that were looked at do): {REMEDIES['lengths']}; or start the data "
            "anew with ignore_data_skip=True."
        )


# ------------------------------------------------------------------------------------------------------------ the step


def check_targets(step: ConfirmedStep, number: int) -> None:
    """Refuse to begin with a step from which nothing is learned.

    Raises:
        BadSample: no label of the step is a target.
    """
    assert step.batch is not None
    if not step.num_targets:
        raise BadSample(
            f"Step {number} has no target token: each label of its {len(step.batch.share.step.rows)} samples is "
            f"{IGNORE_INDEX}, so there is nothing to learn. Look at how labels are made."
        )


def step_part(inputs: Any, trainer_name: str) -> StepPart:
    """Return what `training_step` is handed, if it is what `get_batch_samples` gave.

    Raises:
        UnsupportedModel: a subclass hands on a batch of its own.
    """
    if not isinstance(inputs, StepPart):
        raise UnsupportedModel(
            f"{trainer_name}.training_step handed on a batch of its own ({type(inputs).__name__}), which no plan "
            "knows. Hand on the batch it is given; change tensors in data_collator or _prepare_inputs."
        )
    return inputs


def train_part(
    trainer: Trainer,
    run: PlannedRun,
    training: Training,
    model: torch.nn.Module,
    part: StepPart,
    forward_backward: ForwardBackward,
) -> torch.Tensor:
    """Run forward and backward of some micro-batches of a step, whose last one synchronises gradients.

    All ranks take part in each micro-batch, so all have as many, and come to the exchange of gradients together.

    Returns:
        This rank's part of the step's loss, times the number of ranks.
    """
    clock = training.clock or _start_clock(trainer, run, training, model)
    run.groups.hurry()  # what takes its time once, before the first step, is over
    start = time.perf_counter()
    total = torch.zeros((), device=trainer.args.device)
    number = trainer.state.global_step + 1
    last = len(part.batch.micro_batches) - 1
    with named("The exchange of gradients", f"step {number}", limit=limit_of):
        for index, micro_batch in zip(part.numbers, part.micro_batches, strict=True):
            context = run.context(micro_batch, index, number)
            syncs = sharding.synchronising(trainer, model, run.fitted.sharding.syncs_each or index == last)
            with run.fitted.as_planned(micro_batch, context), syncs, clock.micro_batch():
                total += forward_backward({**micro_batch.inputs, "hetero": context})
            _check_reached(run.fitted, context)
    training.step_s += time.perf_counter() - start
    return total


def _start_clock(trainer: Trainer, run: PlannedRun, training: Training, model: torch.nn.Module) -> StepClock:
    """Start the clock, and adopt the wrapper's groups, in the first step: by now accelerate has wrapped the model."""
    sharding.check_wrapper(model, trainer.args)
    run.groups.include(sharding.groups_of(model))
    # transformers' own count of memory needs the peak of the run
    clock = StepClock(trainer.model, trainer.args.device, trainer.args.skip_memory_metrics)  # pyright: ignore[reportArgumentType]
    training.opened.callback(clock.close)
    training.clock = clock
    return clock


def _check_reached(fitted: Fitted, context: AttentionContext) -> None:
    if not context.reached:
        raise UnsupportedModel(
            f"{type(fitted.model).__name__} never called its attention through transformers' interface, so samples "
            "cannot be shared among ranks. Use plain Trainer."
        )


# ---------------------------------------------------------------------------------------------------------- the report


def report(trainer: Trainer, run: PlannedRun, training: Training, between: BetweenRuns) -> None:
    """Tell the callbacks how a step went; they may know a better cost model for plans to come. A collective."""
    step = _report_of(run, training, between.means, trainer.state.global_step + 1)
    for callback in step_callbacks(trainer):
        callback.on_step_report(trainer.args, trainer.state, step)
        if (cost := callback.recalibrated(between.cost_model_of_now())) is not None:
            between.cost_model = cost


def _report_of(run: PlannedRun, training: Training, means: LoggedMeans, number: int) -> StepReport:
    """Report how a step went, on all ranks, after its last micro-batch."""
    assert training.step is not None
    assert training.step.batch is not None
    assert training.clock is not None
    batch, step = training.step.batch, training.step.batch.share.step
    busy_s, peak_bytes = training.clock.read(), training.clock.peak_bytes()
    counts = [m.num_targets for m in batch.micro_batches] if means else []
    # ranks exchange integers only, so seconds travel as nanoseconds
    rows = gather([peak_bytes, *(round(1e9 * s) for s in busy_s), *counts], run.control)
    means.add("train", [sum(row[1 + len(busy_s) + m] for row in rows) for m in range(len(counts))])
    experts = run.fitted.experts
    seconds, training.step_s = training.step_s, 0.0
    return StepReport(
        step=number,
        plan=step.plan,
        lengths=step.lengths,
        num_targets=training.step.num_targets,
        seconds=seconds,
        busy_s=tuple(tuple(row[1 + m] / 1e9 for row in rows) for m in range(len(busy_s))),
        wait_s=training.step.fetch_s,
        plan_wait_s=step.wait_s,
        peak_bytes=max(row[0] for row in rows),
        is_lockstep=run.fitted.sharding.is_sharded,
        expert_load=experts.of_all(gather(experts.take(), run.control)) if experts else (),
    )


def step_callbacks(trainer: Trainer) -> Sequence[StepReportCallback]:
    """Return the trainer's callbacks that are told of each step."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, StepReportCallback)]


# ------------------------------------------------------------------------------------------------------ the checkpoint


def save_whole(
    trainer: Trainer, run: PlannedRun, training: Training, cost: CostModel, save: Callable[[], None], folder: Path
) -> None:
    """Save a checkpoint, with its cost model and its place in the data, that is known to be whole, or removed.

    Args:
        trainer, run, training: whose it is.
        cost: the model of now.
        save: writes Trainer's files.
        folder: of the checkpoint.

    Raises:
        HeteroError: what went wrong on any rank.
    """
    assert training.data is not None
    args, stream = trainer.args, training.data.stream
    position = stream.position(trainer.state.global_step) if stream is not None else None

    def save_with_cost_model() -> None:
        save()
        if args.should_save:
            keep_cost_model(folder, cost, args.world_size)

    # `save_model`, which Trainer calls on the way, asks for it
    training.saving = saving = Saving(args, run.control, may_wait=run.fitted.sharding.is_sharded)
    place = Run(args.world_size, training.data.order, position)
    try:
        saving.write(save_with_cost_model, folder, place, best=lambda: trainer.state.best_model_checkpoint)
    finally:
        training.saving = None
