"""This module corrects the times of a cost model by groups that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hf_hetero.costs import CostModel
from hf_hetero.costs.least_squares import robust_nonnegative_least_squares
from hf_hetero.plan import Group, StepReport

Floats = NDArray[np.float64]

PARTS = ("attention", "linear", "exchange", "fixed")
"""What the seconds of a group are for, in the order of `Charges`."""
LEAST_SHARE = 0.1
"""Least factor of a part, by the common one: what looks free fills the next plans."""


def _no_rows() -> Floats:
    return np.zeros((0, len(PARTS)))


def _no_seconds() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True, slots=True)
class Observations:
    """`Observations` are groups whose seconds were measured.

    Args:
        charged: what the cost model charges for attention, linear, exchange and fixed time, shape (num_groups, 4).
        measured: seconds, shape (num_groups,).
    """

    charged: Floats = field(default_factory=_no_rows)
    measured: Floats = field(default_factory=_no_seconds)

    def with_more(self, more: Observations, most: int) -> Observations:
        """Return the newest of both, at most so many."""
        charged = np.concatenate([self.charged, more.charged])[-most:]
        return Observations(charged, np.concatenate([self.measured, more.measured])[-most:])

    def under(self, factors: Floats) -> Observations:
        """Return the same groups as charged by a cost model whose times were multiplied (`scaled`)."""
        return replace(self, charged=self.charged * factors)

    def errors(self) -> Floats:
        """Return how far each prediction is from the measurement, by the measurement, shape (num_groups,)."""
        return np.abs(self.charged.sum(axis=1) / self.measured - 1)


def observations(cost: CostModel, reports: Sequence[StepReport], most: int | None = None) -> Observations:
    """Pair what the model charges for each group with what was measured.

    Of a group that was planned otherwise, at a degree, with activations or by a method that the model knows nothing of,
    nothing is learned, nor of micro-batches without a backward pass.

    Args:
        cost: prices the groups.
        reports: of steps, the oldest first.
        most: groups, the newest; the others are not even priced, because a step of many ranks has many. None: all.
    """
    newest: list[tuple[list[float], float]] = []
    for group, seconds, lengths in _measured_groups(cost, reports):
        if len(newest) == most:
            break
        newest.append((list(cost.charges(group, lengths)), seconds))
    newest.reverse()
    charged = np.array([row for row, _ in newest]).reshape(-1, len(PARTS))
    return Observations(charged, np.array([seconds for _, seconds in newest]))


def _measured_groups(cost: CostModel, reports: Sequence[StepReport]) -> Iterator[tuple[Group, float, Sequence[int]]]:
    """Give what something is learned from, the newest first: a group, its measured seconds, the lengths of its step."""
    for report in reversed(reports):
        measured = list(enumerate(zip(report.plan.micro_batches, report.busy_s, strict=True)))
        for number, (micro_batch, busy_s) in reversed(measured):
            if number in report.forward_only:
                continue
            groups = [group for group in reversed(micro_batch.groups) if group.samples]
            if report.is_lockstep:
                # under sharded weights every rank measures the slowest group: one observation, of the one predicted so
                if not all(is_priced(cost, group, report.planned_lengths) for group in groups):
                    continue  # the slowest may be one of those
                groups = sorted(groups, key=lambda group: -cost.group_seconds(group, report.planned_lengths))[:1]
            for group in groups:
                seconds = max(busy_s[rank] for rank in group.ranks)
                # what takes 0 s is too short to be measured
                if seconds > 0 and is_priced(cost, group, report.planned_lengths):
                    yield group, seconds, report.planned_lengths


def is_priced(cost: CostModel, group: Group, lengths: Sequence[int]) -> bool:
    """Tell whether a group is one that the cost model offers; alone, a rank exchanges nothing, whatever its method."""
    under = cost.by_activations.get(group.activations)
    if under is None or group.degree == 1:
        return under is not None
    return group.degree in cost.all_to_all_bytes_per_s and any(
        (way.method, way.ulysses_degree) == (group.method, group.ulysses_degree)
        for way in under.methods(replace(group, activations=None), lengths)
    )


def fit(seen: Observations, pull: float) -> Floats:
    """Fit the factors of attention, linear, exchange and fixed time, shape (4,).

    Each is at least a tenth of the common factor: least squares may give 0, by which a part would look free. There is
    at least one observation.

    Args:
        seen: what was measured.
        pull: how much the factors are pulled towards the common one, in observations.
    """
    common = float(np.median(seen.measured / seen.charged.sum(axis=1)))
    relative = seen.charged / seen.measured[:, None]  # so that each group counts alike, not the longest most
    # of each part, as if `pull` groups more had been measured that are its mean share alone, and take `common` of it
    ridge = np.sqrt(pull) * np.diag(relative.mean(axis=0) + 1e-12)
    least = np.full(len(PARTS), LEAST_SHARE * common)
    left = np.vstack([relative, ridge])
    right = np.concatenate([np.ones(len(seen.measured)), ridge @ np.full(len(PARTS), common)])
    return least + robust_nonnegative_least_squares(left, right - left @ least, num_exact=len(PARTS))


def scaled(cost: CostModel, factors: Floats) -> CostModel:
    """Multiply the times of a cost model: attention, linear, exchange, fixed."""
    attention, linear, exchange, fixed = map(float, factors)
    note = "; times refitted to measured steps"
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
        source=cost.source if cost.source.endswith(note) else f"{cost.source}{note}",
        provenance="refitted",
    )
