"""This module finds the memory of tokens that weighed groups follow, beside the model's states, which are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hf_hetero.costs import CostModel
from hf_hetero.costs.least_squares import nonnegative_least_squares
from hf_hetero.profile.fitting import LEAST_SHARE, Measured

Floats = NDArray[np.float64]


def with_measured_memory(
    cost: CostModel,
    measured: Sequence[Measured],
    states: Mapping[int, float],
    whole_states: float,
    num_layers: int,
) -> CostModel:
    """Return a cost model with the bytes that were weighed in the place of its own.

    Of what a rank held, the model's states are counted, so that those of a deep model, and of more ranks that share
    them, are known. The rest is a line over the tokens, lifted until no weighed group lies above it: a plan that is a
    little too careful costs less than memory that runs out. Groups by other methods hold the same, and what
    `CostModel.methods` adds.

    Args:
        cost: of the whole model; ways to hold more tokens that were not weighed are scaled.
        measured: groups of models of some layers, of one number or of several.
        states: bytes of weights, gradients and optimizer on a rank, by the layers of the model that was weighed.
        whole_states: the same of the whole model, in the run to come.
        num_layers: of the whole model.

    Raises:
        ConfigError: the memory leaves room for no token.
    """
    heads = [one for one in measured if one.trial.method == "ulysses"]
    peaks = np.array([one.peak_bytes for one in heads], dtype=np.float64)
    beyond = peaks - np.array([states[one.num_layers] for one in heads])
    columns = _columns(heads)
    rows = np.stack(list(columns.values()), axis=1)
    # relative to all that is held: of a small group the tokens are a small part, which may be anything
    found = nonnegative_least_squares(rows / peaks[:, None], beyond / peaks)
    missed = max(0.0, float(np.max(beyond - rows @ found)))
    x = dict(zip(columns, found.tolist(), strict=True))

    def token_bytes(policy: str | None, estimate: float) -> float:
        weighed = num_layers * x[f"in layers {policy}"] + x.get(f"outside {policy}", 0.0)
        return max(weighed, LEAST_SHARE * estimate)  # of groups too small to tell, a token seems to take nothing

    fixed = num_layers * x["of layers"] + x.get("of all", 0.0) + missed
    whole = token_bytes(None, cost.activation_bytes_per_token)
    larger = whole / cost.activation_bytes_per_token
    policies = {
        name: replace(
            policy,
            activation_bytes_per_token=token_bytes(name, policy.activation_bytes_per_token)
            if f"in layers {name}" in x
            else policy.activation_bytes_per_token * larger,
        )
        for name, policy in cost.activation_policies.items()
    }
    return replace(
        cost,
        activation_bytes_per_token=whole,
        model_state_bytes_per_rank=whole_states + fixed,
        activation_policies=policies,
    )


def _columns(measured: Sequence[Measured]) -> dict[str, Floats]:
    """Return the unknowns of the fit, by name: what each weighed group holds of them, shape (num_groups,)."""
    layers = np.array([float(one.num_layers) for one in measured])
    tokens = np.array([sum(one.trial.lengths) / one.trial.degree for one in measured])
    has_depths = len(set(layers.tolist())) > 1  # else what stands outside of the layers cannot be told from them
    columns = {"of layers": layers} | ({"of all": np.ones(len(measured))} if has_depths else {})
    for policy in dict.fromkeys(one.trial.activations for one in measured):
        here = np.array([float(one.trial.activations == policy) for one in measured])
        columns[f"in layers {policy}"] = here * layers * tokens
        if has_depths:
            columns[f"outside {policy}"] = here * tokens
    return columns
