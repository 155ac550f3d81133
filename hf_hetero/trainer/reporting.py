"""A step is reported here, to callbacks that look at it and may learn from it for the plans to come."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import ProgressCallback, Trainer

from hf_hetero.callbacks import (
    CalibrationCallback,
    PlanMetricsCallback,
    StepProgressCallback,
    StepReportCallback,
)
from hf_hetero.callbacks.refitting import is_priced
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.estimate.devices import known_device
from hf_hetero.plan import StepReport
from hf_hetero.ranks.agreement import gather
from hf_hetero.ranks.by_source import Tally
from hf_hetero.step import Step, StepBatch
from hf_hetero.trainer.checkpoints.resuming import Resumed
from hf_hetero.trainer.fitting import compute_dtype
from hf_hetero.trainer.run import BetweenRuns, PlannedRun
from hf_hetero.trainer.training import Observed, Training

logger = logging.getLogger(__name__)


def report(trainer: Trainer, run: PlannedRun, training: Training, between: BetweenRuns) -> None:
    """Tell the callbacks how a step went; they may know a better cost model for plans to come. A collective."""
    step = _report_of(trainer, run, training, between, trainer.state.global_step + 1)
    for callback in step_callbacks(trainer):
        callback.on_step_report(trainer.args, trainer.state, step)
        if (cost := callback.recalibrated(between.cost_model_of_now())) is not None:
            between.cost_model = cost
            assert training.data is not None
            # planned anew at once: a run that resumes here has no older plans, and must train by the same
            training.data.plans.forget()
            _tell(trainer, run.hetero, cost)


def _report_of(trainer: Trainer, run: PlannedRun, training: Training, between: BetweenRuns, number: int) -> StepReport:
    """Report how a step went, on all ranks, after its last micro-batch."""
    assert training.step is not None
    assert training.step.batch is not None
    assert training.clock is not None
    assert training.began_s is not None
    batch, step, means = training.step.batch, training.step.batch.share.step, between.means
    busy_s, seen, training.seen = training.clock.read(), training.seen, Observed()
    run.groups.check()  # before weights move: what was broken off has let the device go on, with anything in its place
    # a device computes behind its host: the step is over when it has been waited for, not when all was launched
    step_s, training.began_s = time.perf_counter() - training.began_s, None
    totals = [training.clock.peak_bytes(), training.clock.unused_bytes(), seen.sent_bytes]
    charged = _charges(between.cost_model_of_now(), batch)
    counts, own = [m.num_targets for m in batch.micro_batches] if means else [], _by_source(run, training, seen)
    # ranks exchange integers only, so seconds travel as nanoseconds
    seconds = [round(1e9 * s) for s in (*busy_s, *charged)]
    rows = gather([*totals, *seconds, *counts, *training.sources.row(own)], run.control)
    ends = list(accumulate([len(totals), len(busy_s), len(charged), len(counts)]))
    means.add("train", [sum(row[m] for row in rows) for m in range(ends[2], ends[3])])
    experts = run.fitted.experts
    return StepReport(
        step=number,
        plan=step.plan,
        lengths=step.lengths,
        num_targets=training.step.num_targets,
        seconds=step_s,
        busy_s=tuple(tuple(row[m] / 1e9 for row in rows) for m in range(ends[0], ends[1])),
        wait_s=training.step.fetch_s,
        plan_wait_s=step.wait_s,
        peak_bytes=max(row[0] for row in rows),
        unused_bytes=max(row[1] for row in rows),
        repeats=training.repeats.number,
        forward_only=tuple(index for index, m in enumerate(batch.micro_batches) if not m.learns),
        is_lockstep=run.fitted.sharding.is_sharded,
        flops=_flops(run, step),
        peak_flops=_peak_flops(trainer),
        router_loss=run.fitted.router_loss.value,
        expert_load=experts.of_all(gather(experts.take(), run.control)) if experts else (),
        planned_s=tuple(tuple(row[m] / 1e9 for row in rows) for m in range(ends[1], ends[2])),
        static_s=step.static_s,
        sent_bytes=sum(row[2] for row in rows),
        by_source=training.sources.of_all([row[ends[3] :] for row in rows], own, run.control),
        as_text=step.as_text,
    )


def _flops(run: PlannedRun, step: Step) -> float:
    """Count the operations that learning from a step's samples needs, those of towers for their images too."""
    if run.fitted.flops is None:
        return 0.0
    towers = run.packer.towers
    of_images = 0.0 if towers is None else towers.flops(step.drawn.tower_tokens)
    return run.fitted.flops.of(step.lengths) + of_images


def _peak_flops(trainer: Trainer) -> float | None:
    """Return the operations a second of all ranks' cards by their data sheet, for models that compute in 16 bits."""
    device = trainer.args.device
    if device.type != "cuda" or compute_dtype(trainer) not in (torch.bfloat16, torch.float16):
        return None
    card = known_device(torch.cuda.get_device_name(device))
    return None if card is None else card.flops * trainer.args.world_size


def _charges(cost: CostModel, batch: StepBatch) -> list[float]:
    """Return what the cost model charges for this rank's group of each micro-batch; 0 where it knows no price."""
    lengths = batch.share.step.planned_lengths
    return [
        cost.group_seconds(group, lengths) if group.samples and is_priced(cost, group, lengths) else 0.0
        for group in batch.share.groups
    ]


def _by_source(run: PlannedRun, training: Training, seen: Observed) -> dict[str, Tally]:
    """Return the loss of each source on this rank; nothing where not each target of the rank was seen."""
    found = seen.tallies()
    assert training.step is not None
    assert training.step.batch is not None
    asked = [m for m in training.step.batch.micro_batches if m.sources is not None]
    if sum(count for _, count in found.values()) == sum(m.num_targets for m in asked):
        return found
    if run.args.process_index == 0 and not training.has_said_sources:
        logger.warning(
            "HeteroConfig.source_column=%r: the loss is not computed where %s hands it to the package, so it is not "
            "known by source, and is not logged.",
            run.hetero.source_column,
            type(run.fitted.model).__name__,
        )
    training.has_said_sources = True
    return {}


def add_callbacks(trainer: Trainer) -> None:
    """Add the callback that counts planned steps, unless the user did; the bar that shows them replaces Trainer's."""
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[place] = StepProgressCallback(callback.max_str_len)
    if not any(isinstance(callback, PlanMetricsCallback) for callback in callbacks):
        trainer.add_callback(PlanMetricsCallback())


def close_bars(trainer: Trainer) -> None:
    """Close the bars of a run that may have failed, so that what is said of it stands below them."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, StepProgressCallback):
            callback.close()


def _tell(trainer: Trainer, hetero: HeteroConfig, cost: CostModel) -> None:
    """Tell the callbacks what plans are made by from now on."""
    for callback in step_callbacks(trainer):
        callback.on_cost_model(trainer.args, trainer.state, hetero, cost)


def step_callbacks(trainer: Trainer) -> Sequence[StepReportCallback]:
    """Return the trainer's callbacks that are told of each step."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, StepReportCallback)]


# ---------------------------------------------------------------------------------------------------------- calibration


def begin_calibrating(trainer: Trainer, hetero: HeteroConfig, between: BetweenRuns, resumed: Resumed | None) -> None:
    """Have the cost model refitted to measured steps, if the user says so, or nothing and it is an estimate.

    A callback of the user's is left as it is. Where the cost model is that of a checkpoint, the callback goes on from
    what it had seen by then.
    """
    machine, wanted = between.machine, hetero.calibrate
    assert machine is not None
    _tell(trainer, hetero, between.cost_model_of_now())
    if wanted is None:  # by measured times no two runs are planned alike
        wanted = machine.is_estimate and not trainer.args.full_determinism
    if wanted and not _calibrations(trainer):
        trainer.add_callback(CalibrationCallback())
    if between.cost_model is not machine.cost_model:  # of an earlier run, and so is what the callback has seen
        return
    kept = resumed.run.calibration if machine.is_kept and resumed is not None and resumed.run is not None else None
    for callback in _calibrations(trainer):
        try:
            callback.restore(kept)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("What the checkpoint kept for refitting the cost model cannot be read (%r).", error)
            callback.restore(None)


def kept_calibration(trainer: Trainer) -> dict[str, Any] | None:
    """Return what a checkpoint keeps for the next refit of the cost model; None where none is refitted."""
    return next((callback.state() for callback in _calibrations(trainer)), None)


def _calibrations(trainer: Trainer) -> list[CalibrationCallback]:
    return [c for c in step_callbacks(trainer) if isinstance(c, CalibrationCallback)]
