"""The fit of memory finds what made the bytes, and no weighed group lies above it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from costs.test_cost_model import a_cost_model

from hf_hetero import CostModel
from hf_hetero.costs import ActivationPolicy
from hf_hetero.profile.fitting import Measured
from hf_hetero.profile.fitting_memory import with_measured_memory
from hf_hetero.profile.trials import Trial, trials

STATES = {1: 3e6, 3: 5e6}
WHOLE_STATES = 40e6
LAYERS = 40


def an_estimate() -> CostModel:
    cost = a_cost_model(activation_bytes_per_token=1e4, model_state_bytes_per_rank=1e6, memory_bytes_per_rank=1e9)
    policy = ActivationPolicy(5e3, 2 * cost.attention_s_per_token2, 2 * cost.linear_s_per_token)
    return replace(cost, activation_policies={"recompute": policy})


def bytes_of(trial: Trial, layers: int) -> float:
    """A layer keeps 700 bytes of a token, or 200 and works with 100 more; a loss 900; a layer's workspace is 1 MB."""
    tokens = sum(trial.lengths) / trial.degree
    kept = 300 if trial.activations else 700
    return STATES[layers] + layers * (1e6 + kept * tokens) + 900 * tokens + 2e6


def found(noise: float = 0.0) -> tuple[CostModel, list[Measured]]:
    rng = np.random.default_rng(0)
    measured = [
        Measured(trial, layers, 1.0, round(bytes_of(trial, layers) * (1 + noise * rng.random())))
        for layers in STATES
        for trial in trials([1, 2], 4096, 8192, ["recompute"])
    ]
    return with_measured_memory(an_estimate(), measured, STATES, WHOLE_STATES, LAYERS), measured


def test_finds_the_truth() -> None:
    """The bytes of a token in 40 layers and outside of them, what all tokens share, and the policy's bytes."""
    cost, _ = found()
    assert cost.activation_bytes_per_token == pytest.approx(40 * 700 + 900, rel=1e-4)
    assert cost.model_state_bytes_per_rank == pytest.approx(WHOLE_STATES + 40 * 1e6 + 2e6, rel=1e-3)
    policy = cost.activation_policies["recompute"]
    assert policy.activation_bytes_per_token == pytest.approx(40 * 300 + 900, rel=1e-4)
    assert cost.attention_s_per_token2 == an_estimate().attention_s_per_token2


def test_no_group_lies_above() -> None:
    """With noise every weighed group has room in what is predicted; the mean alone would leave half of them out."""
    cost, measured = found(noise=0.05)
    one_depth = [one for one in measured if one.num_layers == 3]
    there = with_measured_memory(an_estimate(), one_depth, STATES, STATES[3], 3)
    for one in one_depth:
        tokens = sum(one.trial.lengths) / one.trial.degree
        policy = there.activation_policies["recompute"] if one.trial.activations else there
        predicted = there.model_state_bytes_per_rank + tokens * policy.activation_bytes_per_token
        assert predicted >= one.peak_bytes * (1 - 1e-9)
        assert predicted <= one.peak_bytes * 1.1
    assert cost.activation_bytes_per_token > 0


def test_what_was_not_weighed_is_scaled() -> None:
    """A way to hold more that nobody tried has its share of the estimate's bytes."""
    _, measured = found()
    plain = [one for one in measured if one.trial.activations is None]
    estimate = an_estimate()
    cost = with_measured_memory(estimate, plain, STATES, WHOLE_STATES, LAYERS)
    share = estimate.activation_policies["recompute"].activation_bytes_per_token / estimate.activation_bytes_per_token
    scaled = cost.activation_policies["recompute"].activation_bytes_per_token / cost.activation_bytes_per_token
    assert scaled == pytest.approx(share)
    ring = [*plain, replace(plain[0], trial=Trial(2, (8192,), method="ring"), peak_bytes=10**12)]
    assert with_measured_memory(estimate, ring, STATES, WHOLE_STATES, LAYERS) == cost


def test_no_token_is_free() -> None:
    """Of groups too small to tell, a token takes a share of its estimate: a capacity without end would be none."""
    same = [
        Measured(Trial(1, (length,), policy), 3, 1.0, 6_000_000) for length in (8, 16) for policy in (None, "recompute")
    ]
    cost = with_measured_memory(an_estimate(), same, STATES, WHOLE_STATES, 3)
    assert cost.activation_bytes_per_token == pytest.approx(0.1 * an_estimate().activation_bytes_per_token)
    assert cost.activation_policies["recompute"].activation_bytes_per_token == pytest.approx(0.1 * 5e3)
