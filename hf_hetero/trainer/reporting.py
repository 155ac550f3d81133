"""A step is reported here, to callbacks that look at it and may learn from it for the plans to come."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer

from hf_hetero.callbacks import CalibrationCallback, StepReportCallback
from hf_hetero.config import HeteroConfig
from hf_hetero.estimate.devices import known_device
from hf_hetero.model.logged_means import LoggedMeans
from hf_hetero.plan import StepReport
from hf_hetero.ranks.agreement import gather
from hf_hetero.trainer.checkpoints.checkpoint import Resumed
from hf_hetero.trainer.fitting import compute_dtype
from hf_hetero.trainer.run import BetweenRuns, PlannedRun
from hf_hetero.trainer.training import Training

logger = logging.getLogger(__name__)


def report(trainer: Trainer, run: PlannedRun, training: Training, between: BetweenRuns) -> None:
    """Tell the callbacks how a step went; they may know a better cost model for plans to come. A collective."""
    step = _report_of(trainer, run, training, between.means, trainer.state.global_step + 1)
    for callback in step_callbacks(trainer):
        callback.on_step_report(trainer.args, trainer.state, step)
        if (cost := callback.recalibrated(between.cost_model_of_now())) is not None:
            between.cost_model = cost
            assert training.data is not None
            # planned anew at once: a run that resumes here has no older plans, and must train by the same
            training.data.plans.forget()


def _report_of(trainer: Trainer, run: PlannedRun, training: Training, means: LoggedMeans, number: int) -> StepReport:
    """Report how a step went, on all ranks, after its last micro-batch."""
    assert training.step is not None
    assert training.step.batch is not None
    assert training.clock is not None
    batch, step = training.step.batch, training.step.batch.share.step
    busy_s, peaks = training.clock.read(), [training.clock.peak_bytes(), training.clock.unused_bytes()]
    counts = [m.num_targets for m in batch.micro_batches] if means else []
    # ranks exchange integers only, so seconds travel as nanoseconds
    rows = gather([*peaks, *(round(1e9 * s) for s in busy_s), *counts], run.control)
    means.add("train", [sum(row[2 + len(busy_s) + m] for row in rows) for m in range(len(counts))])
    experts = run.fitted.experts
    seconds, training.step_s = training.step_s, 0.0
    return StepReport(
        step=number,
        plan=step.plan,
        lengths=step.lengths,
        num_targets=training.step.num_targets,
        seconds=seconds,
        busy_s=tuple(tuple(row[2 + m] / 1e9 for row in rows) for m in range(len(busy_s))),
        wait_s=training.step.fetch_s,
        plan_wait_s=step.wait_s,
        peak_bytes=max(row[0] for row in rows),
        unused_bytes=max(row[1] for row in rows),
        repeats=training.repeats.number,
        forward_only=tuple(index for index, m in enumerate(batch.micro_batches) if not m.learns),
        is_lockstep=run.fitted.sharding.is_sharded,
        flops=0.0 if run.fitted.flops is None else run.fitted.flops.of(step.lengths),
        peak_flops=_peak_flops(trainer),
        router_loss=run.fitted.router_loss.value,
        expert_load=experts.of_all(gather(experts.take(), run.control)) if experts else (),
    )


def _peak_flops(trainer: Trainer) -> float | None:
    """Return the operations a second of all ranks' cards by their data sheet, for models that compute in 16 bits."""
    device = trainer.args.device
    if device.type != "cuda" or compute_dtype(trainer) not in (torch.bfloat16, torch.float16):
        return None
    card = known_device(torch.cuda.get_device_name(device))
    return None if card is None else card.flops * trainer.args.world_size


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
