"""Models with layers that carry state learn the same under every plan: gradients and weights against references.

The reference is one process, each sample alone. Plans mix degrees 1, 2 and 4, all methods of attention, recompute and
offloading, and leave some groups without a sample (`helpers.ScriptedPlanner`).
"""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    arguments,
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
    torch.set_num_threads(1)
    args = dict(case.get("args", {}))
    if case.get("sharded"):
        shard_on_cpu()
        args |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    hetero = HeteroConfig(**case.get("hetero", {}))
    return trained(model_of(case), samples(LENGTHS), hetero=hetero, **args)


def check_case(case: dict[str, Any], num_ranks: int = 4) -> None:
    found = run_ranks(train_case, num_ranks, case)
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    for rank in found:
        assert rank["wrapper"].startswith("FSDP" if case.get("sharded") else "Distributed"), rank["wrapper"]
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmo_hybrid", "falcon_mamba"])
def test_gradients_where_weights_are_sharded(family: str) -> None:
    """FSDP2 gathers a layer's weights before they are cut by heads; of Falcon-Mamba it wraps the mixers themselves."""
    check_case({"family": family, "sharded": True})


def evaluated(family: str) -> tuple[float, list[float]]:
    """The loss of an evaluation by plans of mixed degrees, and that of each sample alone, token by token."""
    model, rows = hybrid_model(family, torch.float32), samples(LENGTHS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ScriptedTrainer(model, arguments(folder, 2), eval_dataset=rows)
        loss = trainer.evaluate()["eval_loss"]
    model.set_attn_implementation("eager")
    losses = reference_steps(model, rows, [range(len(rows))], rate=0.0)["losses"]
    return loss, losses


def test_evaluation() -> None:
    """A planned evaluation shares samples' mixers, too; afterwards the model is as it was."""
    for loss, [expected] in run_ranks(evaluated, 2, "qwen3_5"):
        assert loss == pytest.approx(expected, rel=1e-6)
