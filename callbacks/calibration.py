"""`CalibrationCallback` learns from measured steps how long groups really take, for the plans to come."""

from __future__ import annotations

import logging
from collections import deque
from statistics import median
from typing import Any

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks.refitting import PARTS, Floats, Observations, fit, observations, scaled
from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport

logger = logging.getLogger(__name__)

MOST_OBSERVATIONS = 1000
"""Groups that a fit looks back at: enough for four factors, and few enough for a checkpoint."""
WORTH_CHANGING = 0.9
"""A refit is taken if its error is at most this share of the error of now: for less, plans had better stay."""
NEVER_WORTH = 0.01
"""Nor is one taken where predictions are this near already."""
NOTHING_SEEN: dict[str, Any] = {"num_reports": 0, "num_since": 0, "has_tried": False, "charged": [], "measured": []}
"""The state of a callback that begins."""
MOST_STEPS = 500
"""Steps whose planned and measured seconds are compared when training ends."""


class CalibrationCallback(StepReportCallback):
    """`CalibrationCallback` refits the times of the cost model, not its memory; plans may change, learning cannot.

    Each group of each measured step is one observation of

        seconds = attention * A + linear * B + exchange * C + fixed * D

    where A..D are what the cost model charges today. The four factors are found by least squares of the relative error,
    none below 0, with less weight for what all others contradict, and pulled towards one common factor so that what a
    run never varies is not made up. A refit that predicts hardly better is left. Each that is taken is logged, and so
    is, when training ends, how far plans were from what was measured.

    A checkpoint keeps the refitted cost model, and what was observed since (`state`): a run that resumes goes on as if
    it had not been interrupted.

    Args:
        skip_steps: first steps to ignore, when kernels and memory are still warming up.
        every_steps: refit after as many steps.
        pull: strength of the pull, in observations.
        first_steps: the first refit comes sooner, because an estimate may be far off.
    """

    def __init__(self, skip_steps: int = 3, every_steps: int = 20, pull: float = 2.0, first_steps: int = 7) -> None:
        self._skip_steps, self._every_steps, self._pull = skip_steps, every_steps, pull
        self._first_steps = min(first_steps, every_steps)
        self._says = False
        self._reports: list[StepReport] = []
        self._seconds: deque[tuple[float, float]] = deque(maxlen=MOST_STEPS)
        self.restore(None)

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Keep the step for the next fit."""
        self._says = state.is_world_process_zero
        self._num_reports += 1
        if self._num_reports > self._skip_steps:
            self._num_since += 1
            self._reports.append(report)
            self._seconds.append((report.plan.seconds, sum(max(ranks) for ranks in report.busy_s)))

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        """Return a refitted cost model once enough steps were reported since the last look, if it predicts better."""
        self._seen = self._seen.with_more(observations(cost, self._reports, MOST_OBSERVATIONS), MOST_OBSERVATIONS)
        self._reports.clear()
        due = self._every_steps if self._has_tried else self._first_steps
        if self._num_since < due or not len(self._seen.measured):
            return None
        self._num_since, self._has_tried = 0, True
        factors = fit(self._seen, self._pull)
        before, refitted = self._seen, self._seen.under(factors)
        error, error_then = float(np.median(before.errors())), float(np.median(refitted.errors()))
        is_taken = error > NEVER_WORTH and error_then <= WORTH_CHANGING * error
        self._say(before, error, error_then, factors if is_taken else None)
        if not is_taken:
            return None
        self._seen = refitted
        self._seconds.clear()
        return scaled(cost, factors)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log how far plans were from what was measured, since the last refit."""
        if not (state.is_world_process_zero and self._seconds):
            return
        planned, measured = (median(column) for column in zip(*self._seconds, strict=True))
        error = median(abs(plan_s / max(seconds, 1e-9) - 1) for plan_s, seconds in self._seconds)
        logger.warning(
            "In the last %s plans were off by %s: %.3g s planned, %.3g s measured (medians).",
            "step" if len(self._seconds) == 1 else f"{len(self._seconds)} steps",
            f"{error:.0%}",
            planned,
            measured,
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep so that the next refit is the same, ready for JSON."""
        return {
            "num_reports": self._num_reports,
            "num_since": self._num_since,
            "has_tried": self._has_tried,
            "charged": self._seen.charged.tolist(),
            "measured": self._seen.measured.tolist(),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint kept; None: begin anew.

        Raises:
            KeyError, TypeError, ValueError: it is not what `state` returns.
        """
        state = NOTHING_SEEN if state is None else state
        charged = np.array(state["charged"], dtype=np.float64).reshape(-1, len(PARTS))
        measured = np.array(state["measured"], dtype=np.float64)
        if measured.shape != (len(charged),):
            raise ValueError(f"{len(charged)} groups charged, {measured.shape} measured")
        self._num_reports, self._num_since = int(state["num_reports"]), int(state["num_since"])
        self._has_tried, self._seen = bool(state["has_tried"]), Observations(charged, measured)
        self._reports.clear()
        self._seconds.clear()

    def _say(self, before: Observations, error: float, error_then: float, factors: Floats | None) -> None:
        """Log a refit, or why there is none, on the first rank."""
        if not self._says:
            return
        ratio = float(np.median(before.measured / before.charged.sum(axis=1)))
        what = f"Step times: measured {ratio:.2f} x predicted, {error:.0%} apart (medians of {len(before.measured)})"
        if factors is None:
            logger.info("%s; the cost model stays.", what)
        else:
            parts = ", ".join(f"{name} x {factor:.2f}" for name, factor in zip(PARTS, factors, strict=True))
            logger.warning("%s; the cost model is refitted to within %s: %s.", what, f"{error_then:.0%}", parts)
