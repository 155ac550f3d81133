"""`CalibrationCallback` learns from measured steps how long groups really take, for the plans to come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerState, TrainingArguments

from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport


class CalibrationCallback(StepReportCallback):
    """`CalibrationCallback` refits the times of the cost model, not its memory; plans may change, learning cannot.

    Each group of each measured step is one observation of

        seconds = attention * A + linear * B + exchange * C + fixed * D

    where A..D are what the cost model charges today. The four factors are found by least squares of the relative error,
    pulled towards one common factor so that what a run never varies is not made up.

    A run that resumes from a checkpoint starts from the cost model it was given and refits anew.

    Args:
        skip_steps: first steps to ignore, when kernels and memory are still warming up.
        every_steps: refit after as many steps.
        pull: strength of the pull, in observations.
    """

    def __init__(self, skip_steps: int = 3, every_steps: int = 20, pull: float = 2.0) -> None:
        self._skip_steps, self._every_steps, self._pull = skip_steps, every_steps, pull
        self._num_reports = 0
        self._reports: list[StepReport] = []

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Keep the step for the next fit."""
        self._num_reports += 1
        if self._num_reports > self._skip_steps:
            self._reports.append(report)

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        """Return a refitted cost model once enough steps were reported since the last one."""
        if len(self._reports) < self._every_steps:
            return None
        reports, self._reports = self._reports, []
        charged, measured = observations(cost, reports)
        return scaled(cost, fit(charged, measured, self._pull)) if len(measured) else None


Floats = NDArray[np.float64]


def observations(cost: CostModel, reports: list[StepReport]) -> tuple[Floats, Floats]:
    """Pair what the model charges for each group with what was measured.

    Returns:
        Seconds for attention, linear, exchange and fixed, shape (num_groups, 4); measured seconds, shape (num_groups,).
    """
    charged: list[list[float]] = []
    measured: list[float] = []
    for report in reports:
        for micro_batch, busy_s in zip(report.plan.micro_batches, report.busy_s, strict=True):
            filled = [group for group in micro_batch.groups if group.samples]
            # under sharded weights every rank measures the slowest group: one observation, of the one predicted slowest
            if report.is_lockstep:
                filled = sorted(filled, key=lambda group: cost.group_seconds(group, report.lengths))[-1:]
            for group in filled:
                seconds = max(busy_s[rank] for rank in group.ranks)
                if seconds <= 0:  # too short to be measured
                    continue
                charged.append(list(cost.charges(group, report.lengths)))
                measured.append(seconds)
    return np.array(charged), np.array(measured)


def fit(charged: Floats, measured: Floats, pull: float) -> Floats:
    """Fit the factors of attention, linear, exchange and fixed time; each is at least a tenth of the common factor.

    Least squares may give 0 or less, by which a part would look free and the next plans would be full of it.
    """
    common = float(np.median(measured / charged.sum(axis=1)))
    relative = charged / measured[:, None]  # so that each group counts alike, not the longest most
    # of each part, as if `pull` groups more had been measured that are its mean share alone, and take `common` of it
    ridge = np.sqrt(pull) * np.diag(relative.mean(axis=0) + 1e-12)
    left = np.vstack([relative, ridge])
    right = np.concatenate([np.ones(len(measured)), ridge @ np.full(4, common)])
    factors, *_ = np.linalg.lstsq(left, right, rcond=None)
    return np.maximum(factors, 0.1 * common)


def scaled(cost: CostModel, factors: Floats) -> CostModel:
    """Multiply the times of a cost model: attention, linear, exchange, fixed."""
    attention, linear, exchange, fixed = map(float, factors)
    return replace(
        cost,
        attention_s_per_token2=cost.attention_s_per_token2 * attention,
        linear_s_per_token=cost.linear_s_per_token * linear,
        all_to_all_bytes_per_s={d: v / exchange for d, v in cost.all_to_all_bytes_per_s.items()},
        network_bytes_per_s=cost.network_bytes_per_s and cost.network_bytes_per_s / exchange,
        all_to_all_latency_s={d: v * fixed for d, v in cost.all_to_all_latency_s.items()},
        micro_batch_s=cost.micro_batch_s * fixed,
        activation_policies={
            name: replace(
                policy,
                attention_s_per_token2=policy.attention_s_per_token2 * attention,
                linear_s_per_token=policy.linear_s_per_token * linear,
            )
            for name, policy in cost.activation_policies.items()
        },
        source=f"{cost.source}; times refitted to measured steps",
    )
