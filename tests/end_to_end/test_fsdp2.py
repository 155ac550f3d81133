"""FSDP2 under plans: gradients and weights are the reference's, whoever recomputes layers; checkpoints hold all.

Accelerate shards on GPUs only; here it is made to on the CPU, and every case asserts that it did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    arguments,
    largest_difference,
    often,
    plain_name,
    reference_steps,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
    whole,
    with_lora,
)
from transformers import AutoModelForCausalLM

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, UnsupportedModel
from hf_hetero.ranks.sharding import check_wrapper

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


def with_fsdp(args: dict[str, Any]) -> dict[str, Any]:
    extra = args.get("fsdp_config", {})
    return {**SHARDED, **args, "fsdp_config": {**SHARDED["fsdp_config"], **extra}}


def model_of(case: dict[str, Any]) -> Any:
    model = tiny_model(case.get("family", "llama"), "sdpa", case["dtype"], **case.get("config", {}))
    return with_lora(model) if case.get("lora") else model


def train_case(case: dict[str, Any]) -> dict[str, Any]:
    shard_on_cpu()
    hetero = HeteroConfig(**case.get("hetero", {}))
    return trained(model_of(case), samples(LENGTHS), hetero=hetero, **with_fsdp(case.get("args", {})))


def check_case(case: dict[str, Any], num_ranks: int = 4) -> None:
    found = run_ranks(train_case, num_ranks, case)
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    for rank in found:
        assert rank["wrapper"].startswith("FSDP"), rank["wrapper"]
        assert len(rank["gradients"]) == len(STEPS)
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(rank["gradients"][step], gradients) <= TOLERANCE[case["dtype"]]
        assert largest_difference(rank["weights"], expected["weights"]) <= TOLERANCE[case["dtype"]]
    logged = [entry["loss"] for entry in found[0]["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-6)


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp": {"fsdp_config": {"activation_checkpointing": True}},
    "fsdp-offloaded": {"fsdp_config": {"activation_checkpointing": True, "activation_checkpointing_offload": True}},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("checkpointing", often(CHECKPOINTING, "none", "fsdp"))
def test_gradients_equal_the_reference(checkpointing: str) -> None:
    """Whoever recomputes layers, gradients of each step and weights after four are the reference's."""
    check_case({"dtype": torch.float64, "args": CHECKPOINTING[checkpointing]})


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "fsdp", "non-reentrant"])
def test_gradients_of_a_compiled_model(checkpointing: str) -> None:
    """torch.compile works around the attention where weights are sharded, too."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", **CHECKPOINTING[checkpointing]}
    check_case({"dtype": torch.float64, "args": compiled})


@pytest.mark.slow
def test_gradients_of_adapters() -> None:
    """LoRA, whose frozen and trainable weights are sharded side by side."""
    check_case({"dtype": torch.float64, "lora": True})


def test_gradients_of_adapters_with_checkpointing() -> None:
    """LoRA with FSDP's own checkpointing: the usual way to run adapters of large models."""
    check_case({"dtype": torch.float64, "lora": True, "args": CHECKPOINTING["fsdp"]})


def test_gradients_synchronised_once_a_step() -> None:
    """Gradients that add up whole, and are scattered by the last micro-batch, are the same."""
    check_case({"dtype": torch.float64, "hetero": {"sync_each_micro_batch": False}})


def test_gradients_of_tied_weights() -> None:
    """Embedding and head are one weight, sharded as one."""
    check_case({"dtype": torch.float64, "config": {"tie_word_embeddings": True}})


def test_gradients_of_weights_loaded_by_one_rank() -> None:
    """With cpu_ram_efficient_loading the others get theirs from rank 0."""
    check_case({"dtype": torch.float32, "args": {"fsdp_config": {"cpu_ram_efficient_loading": True}}}, num_ranks=2)


@pytest.mark.slow
def test_mixed_precision_learns_the_same() -> None:
    """bf16 computation over fp32 weights: as near the reference as bf16 rounds, and far from a wrong normalisation."""
    case = {"dtype": torch.float32, "args": {"bf16": True}}
    found = run_ranks(train_case, 4, case)
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    for ours, theirs in zip(found[0]["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 2e-2


# ---------------------------------------------------------------------------------------------------- checkpoints


def train_and_save(folder: str, kind: str, resume: str | None, sharded: bool = True) -> dict[str, Any]:
    shard_on_cpu()
    args: dict[str, Any] = {"output_dir": folder, "optim": "adamw_torch", "learning_rate": 1e-3}
    args |= {"save_strategy": "steps", "save_steps": 2, "full_determinism": False}
    if sharded:
        args = with_fsdp({**args, "fsdp_config": {"state_dict_type": kind}})
    return trained(tiny_model(dtype=torch.float64), samples(LENGTHS), resume=resume, **args)


@pytest.mark.parametrize("kind", often(["FULL_STATE_DICT", "SHARDED_STATE_DICT"], "SHARDED_STATE_DICT"))
def test_resume_of_sharded_training(tmp_path: Path, kind: str) -> None:
    """A resumed run ends with the same weights bit by bit; on half the ranks, where plans differ, to rounding."""
    folder = str(tmp_path)
    whole = run_ranks(train_and_save, 4, folder, kind, None)
    rest = run_ranks(train_and_save, 4, folder, kind, f"{folder}/checkpoint-2")
    assert len(rest[0]["gradients"]) == 2
    assert all(torch.equal(rest[0]["weights"][name], found) for name, found in whole[0]["weights"].items())
    halved = run_ranks(train_and_save, 2, folder, kind, f"{folder}/checkpoint-2")
    assert len(halved[0]["gradients"]) == 2
    assert largest_difference(halved[0]["weights"], whole[0]["weights"]) <= 1e-9
    assert not all(torch.equal(halved[0]["weights"][name], found) for name, found in whole[0]["weights"].items())


def test_full_checkpoint_is_a_model(tmp_path: Path) -> None:
    """A full state dict is what `from_pretrained` reads, with the trained weights."""
    found = run_ranks(train_and_save, 2, str(tmp_path), "FULL_STATE_DICT", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float64)
    weights = dict(loaded.named_parameters())
    assert largest_difference({n: p.detach() for n, p in weights.items()}, found[0]["weights"]) == 0


# ------------------------------------------------------------------------------------------------------- refusals


def refused_without_shards(_: None) -> str:
    """FSDP asked for, on CPU ranks where accelerate wraps with DDP and says nothing."""
    with pytest.raises(UnsupportedModel) as caught:
        trained(tiny_model(), samples(LENGTHS), **SHARDED)
    return str(caught.value)


def test_fsdp_that_would_not_run_is_refused() -> None:
    """Nobody trains in DDP who asked for FSDP."""
    assert "FSDP was asked for, and accelerate runs MULTI_CPU" in run_ranks(refused_without_shards, 2, None)[0]


def wrapped_already(_: None) -> str:
    model = torch.nn.Linear(2, 2)
    args = arguments("unused", 2)
    with pytest.raises(HeteroError) as caught:
        check_wrapper(model, args)
    check_wrapper(torch.nn.parallel.DistributedDataParallel(model), args)
    return str(caught.value)


def test_wrong_wrapper_is_refused() -> None:
    """A model that nobody synchronises is noticed before its first step."""
    message = "should run in DistributedDataParallel and runs in Linear"
    assert message in run_ranks(wrapped_already, 2, None)[0]


def trained_evaluated_and_trained(folder: str, sharded: bool) -> dict[str, torch.Tensor] | tuple[str, str]:
    if sharded:
        shard_on_cpu()
    rows = samples(LENGTHS)
    args = arguments(folder, 2, max_steps=1, per_device_eval_batch_size=4, **(with_fsdp({}) if sharded else {}))
    trainer = HeteroTrainer(tiny_model(dtype=torch.float64), args, train_dataset=rows, eval_dataset=rows[:8])
    trainer.train()
    trainer.train()
    trainer.evaluate()
    try:
        trainer.train()
    except HeteroError as error:
        return str(error), type(error.__cause__).__name__
    return {plain_name(name): whole(p) for name, p in trainer.model.named_parameters()}


def test_what_accelerate_cannot_shard_again(tmp_path: Path) -> None:
    """Trained again, a model goes on; where accelerate cannot prepare it anew, all ranks say so and what to do.

    Transformers 5.23 leaves it no way, 5.24 does: then it learns what it does without shards.
    """
    for found in run_ranks(trained_evaluated_and_trained, 2, str(tmp_path), True):
        if isinstance(found, dict):
            expected = run_ranks(trained_evaluated_and_trained, 2, str(tmp_path), False)[0]
            assert largest_difference(found, expected) < 1e-12
        else:
            assert "a plain Trainer ends so, too. Save it (save_model), and train it on in a new trainer" in found[0]
            assert found[1] == "KeyError"
