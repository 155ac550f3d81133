"""This module finds the cost model that measured groups follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_hetero.costs import CostModel
from hf_hetero.costs.least_squares import nonnegative_least_squares
from hf_hetero.plan import Group
from hf_hetero.profile.trials import Trial

Floats = NDArray[np.float64]

LEAST_SHARE = 0.1
"""Least of a measured part, by its estimate, if all of that is scaled alike: nothing computes, or is kept, for free."""
FREE_BYTES_PER_S = 1e15
"""Bandwidth of an exchange that was too short to be noticed."""
OVERLAPS = {"ring": "ring_overlap", "token_ring": "both_ways_overlap"}
"""Method -> the share, a field of the cost model, that only groups by this method tell. Each builds on those before."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A `Measured` is a trial with its seconds.

    Args:
        trial: the group.
        num_layers: of the model that was timed.
        seconds: of a forward and backward pass.
        peak_bytes: most that a rank's device held meanwhile.
    """

    trial: Trial
    num_layers: int
    seconds: float
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A `Fitted` is a cost model, and how far each measured group is from it.

    Args:
        cost_model: of the whole model.
        errors: |predicted / measured - 1| of each group.
    """

    cost_model: CostModel
    errors: Floats


class _Columns:
    """`_Columns` are the unknowns of a fit, by name: what each measured group holds of them, shape (num_groups,)."""

    def __init__(self, measured: Sequence[Measured], estimate: CostModel) -> None:
        def column(entries: Sequence[float]) -> Floats:
            return np.array(entries, dtype=np.float64)

        trials = [one.trial for one in measured]
        layers = column([one.num_layers for one in measured])
        tokens = column([sum(trial.lengths) / trial.degree for trial in trials])
        squares = [sum(s * s for s in t.lengths) / t.degree * estimate.head_imbalance(t.degree) for t in trials]
        pairs = column(squares)
        self.by_name = {"attention": layers * pairs, "linear": layers * tokens, "fixed": layers}
        if len(set(layers.tolist())) > 1:  # else what stands outside of the layers cannot be told from them
            self.by_name |= {"linear outside": tokens, "fixed outside": np.ones(len(trials))}
        for degree in sorted({trial.degree for trial in trials} - {1}):
            here = column([float(trial.degree == degree) for trial in trials])
            self.by_name |= {f"exchange {degree}": here * layers * tokens, f"latency {degree}": here * layers}
        for policy in sorted({trial.activations for trial in trials if trial.activations is not None}):
            here = column([float(trial.activations == policy) for trial in trials])
            self.by_name |= {f"attention {policy}": here * layers * pairs, f"linear {policy}": here * layers * tokens}

    def solved(self, seconds: Floats) -> tuple[dict[str, float], Floats]:
        """Return the unknowns, none below 0, for which relative errors are least, and these errors."""
        # each group counts alike, not the longest most; what disturbed the machine, medians have left out
        relative = np.stack(list(self.by_name.values()), axis=1) / seconds[:, None]
        found = nonnegative_least_squares(relative, np.ones(len(seconds)))
        return dict(zip(self.by_name, found.tolist(), strict=True)), np.abs(relative @ found - 1)


def fitted(measured: Sequence[Measured], estimate: CostModel, num_layers: int) -> Fitted:
    """Return the estimate with the seconds that were measured in the place of its own.

    What was not measured, such as the exchange of more ranks than there were, is scaled as the nearest that was. The
    formula is fitted to groups that exchange heads; of the other methods only what a ring's exchange hides behind
    (`OVERLAPS`) is free, so their errors tell whether the rest of their price is true.

    Args:
        measured: groups of models of some layers, of one number or of several.
        estimate: of the whole model.
        num_layers: of the whole model.
    """
    heads = [one for one in measured if one.trial.method == "ulysses"]
    seconds = np.array([one.seconds for one in heads])
    x, head_errors = _Columns(heads, estimate).solved(seconds)
    cost = replace(_computed(x, heads, estimate, num_layers), provenance="measured")
    for method, overlap in OVERLAPS.items():
        if rings := [one for one in measured if one.trial.method == method]:
            cost = replace(cost, **{overlap: _share(overlap, rings, cost, x, num_layers)})
    known = iter(head_errors.tolist())
    errors = [
        next(known) if one.trial.method == "ulysses" else _error(one, _at_depth(cost, x, one.num_layers, num_layers))
        for one in measured
    ]
    return Fitted(cost, np.array(errors))


def _computed(x: dict[str, float], heads: Sequence[Measured], estimate: CostModel, num_layers: int) -> CostModel:
    """Return the estimate with the seconds of groups that exchange heads."""
    attention = num_layers * x["attention"]
    linear = num_layers * x["linear"] + x.get("linear outside", 0.0)
    fixed_s = num_layers * x["fixed"] + x.get("fixed outside", 0.0)
    alone = replace(
        estimate,
        attention_s_per_token2=attention,
        linear_s_per_token=linear,
        micro_batch_s=fixed_s,
        activation_policies={},
    )
    lengths = [one.trial.lengths for one in heads if one.trial.activations is None and one.trial.degree == 1]
    slower = float(np.median([alone.seconds(some, 1) / estimate.seconds(some, 1) for some in lengths]))
    attention = max(attention, LEAST_SHARE * slower * estimate.attention_s_per_token2)
    linear = max(linear, LEAST_SHARE * slower * estimate.linear_s_per_token)
    bandwidths, latencies = _exchanges(x, estimate, num_layers)
    policies = {
        name: replace(
            policy,
            attention_s_per_token2=attention + num_layers * x[f"attention {name}"],
            linear_s_per_token=linear + num_layers * x[f"linear {name}"],
        )
        if f"attention {name}" in x
        else replace(
            policy,
            attention_s_per_token2=policy.attention_s_per_token2 * attention / estimate.attention_s_per_token2,
            linear_s_per_token=policy.linear_s_per_token * linear / estimate.linear_s_per_token,
        )
        for name, policy in estimate.activation_policies.items()
    }
    return replace(
        estimate,
        attention_s_per_token2=attention,
        linear_s_per_token=linear,
        micro_batch_s=fixed_s,
        all_to_all_bytes_per_s=bandwidths,
        all_to_all_latency_s=latencies,
        activation_policies=policies,
    )


def _exchanges(x: dict[str, float], estimate: CostModel, num_layers: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return bandwidths and latencies by degree."""
    bandwidths, latencies = dict(estimate.all_to_all_bytes_per_s), dict(estimate.all_to_all_latency_s)
    known = [degree for degree in bandwidths if f"exchange {degree}" in x]
    for degree in bandwidths:
        if degree in known:
            token_s = num_layers * x[f"exchange {degree}"]
            bandwidths[degree] = min(FREE_BYTES_PER_S, estimate.all_to_all_bytes_per_token / max(token_s, 1e-30))
            latencies[degree] = num_layers * x[f"latency {degree}"]
    for degree in set(bandwidths) - set(known):
        if known:
            near = min(known, key=lambda other: abs(other - degree))
            bandwidths[degree] *= bandwidths[near] / estimate.all_to_all_bytes_per_s[near]
    return bandwidths, latencies


# -------------------------------------------------------------------------------------------------------- other methods


def _at_depth(cost: CostModel, x: dict[str, float], layers: int, num_layers: int) -> CostModel:
    """Return the cost model of the same model with so many layers, of groups that hold no more than others."""
    share = layers / num_layers
    kv_bytes, query_bytes = cost.kv_bytes_per_token, cost.query_bytes_per_token
    return replace(
        cost,
        attention_s_per_token2=cost.attention_s_per_token2 * share,
        linear_s_per_token=layers * x["linear"] + x.get("linear outside", 0.0),
        micro_batch_s=layers * x["fixed"] + x.get("fixed outside", 0.0),
        all_to_all_bytes_per_token=cost.all_to_all_bytes_per_token * share,
        all_to_all_latency_s={degree: s * share for degree, s in cost.all_to_all_latency_s.items()},
        kv_bytes_per_token=None if kv_bytes is None else kv_bytes * share,
        query_bytes_per_token=None if query_bytes is None else query_bytes * share,
        activation_policies={},
    )


def _error(one: Measured, cost: CostModel) -> float:
    """Return |predicted / measured - 1| of a group, by the cost model of the model that was timed."""
    trial = one.trial
    group = Group(tuple(range(trial.degree)), tuple(range(len(trial.lengths))), trial.method)
    return abs(cost.group_seconds(group, trial.lengths) / one.seconds - 1)


def _share(name: str, rings: Sequence[Measured], cost: CostModel, x: dict[str, float], num_layers: int) -> float:
    """Return a share of the cost model, by its name, by which such groups take what was measured: 0, 0.05 ... or 1."""
    by_depth = {one.num_layers: _at_depth(cost, x, one.num_layers, num_layers) for one in rings}

    def misfit(share: float) -> float:
        return sum(_error(one, replace(by_depth[one.num_layers], **{name: share})) ** 2 for one in rings)

    return min(np.linspace(0.0, 1.0, 21).tolist(), key=misfit)
