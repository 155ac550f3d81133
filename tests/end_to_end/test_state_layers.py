"""Models with layers that carry state learn the same under every plan: gradients and weights against references.

The reference is one process, each sample alone. Plans mix degrees 1, 2 and 4, all methods of attention, recompute and
offloading, and leave some groups without a sample (`helpers.ScriptedPlanner`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    shard_on_cpu,
    trained,
    trainer_order,
    with_lora,
)
from hybrids import HYBRIDS, hybrid_model

from hf_hetero import HeteroConfig

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
TOLERANCE = 2e-6
"""These models compute norms and states in fp32 whatever their type; in fp64, see tests/state_layers."""
LORA = {"qwen3_5": ("in_proj_qkv", "out_proj", "q_proj")}


def model_of(case: dict[str, Any]) -> Any:
    model = hybrid_model(case["family"], torch.float32)
    return with_lora(model, LORA[case["family"]]) if case.get("lora") else model


def train_case(case: dict[str, Any]) -> dict[str, Any]:
    if case.get("sharded"):
        shard_on_cpu()
    hetero = HeteroConfig(**case.get("hetero", {}))
    return trained(model_of(case), samples(LENGTHS), hetero=hetero, **case.get("args", {}))


def check_case(case: dict[str, Any], num_ranks: int = 4) -> None:
    found = run_ranks(train_case, num_ranks, case)
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    for rank in found:
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(rank["gradients"][step], gradients) <= TOLERANCE
        assert largest_difference(rank["weights"], expected["weights"]) <= TOLERANCE
    logged = [entry["loss"] for entry in found[0]["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_equal_the_reference(num_ranks: int) -> None:
    """Gradients of each step, and the weights after four, equal the per-sample reference."""
    check_case({"family": "qwen3_5"}, num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in HYBRIDS if family != "qwen3_5"])
def test_families(family: str) -> None:
    """Each family of state layers, beside attention or alone."""
    check_case({"family": family})


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", ["qwen3_5", "jamba", "mamba"])
def test_gradients_with_checkpointing(family: str, reentrant: bool) -> None:
    """Recompute in backward finds the right micro-batch, also where a model hands no keywords to its mixers."""
    args = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    check_case({"family": family, "args": args})


@pytest.mark.slow
def test_gradients_with_lora() -> None:
    """Adapters inside mixers learn the same, too."""
    check_case({"family": "qwen3_5", "lora": True})
