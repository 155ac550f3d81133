"""Replicas of shards (HSDP): gradients and weights are the reference's for any mesh, and samples go to all ranks.

Accelerate shards on GPUs only; here it is made to on the CPU, and every case asserts how weights really lie.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from helpers import (
    LENGTHS,
    Recorder,
    ScriptedTrainer,
    arguments,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
    with_lora,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer
from hf_hetero.estimate.memory import Shards, gathered_bytes, sharded_bytes
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.ranks.mesh import check_mesh
from hf_hetero.trainer import training
from hf_hetero.trainer.checkpoints.kept_cost_model import KEPT_COST_MODEL

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
NUM_MICRO_BATCHES = [1 + sum(LENGTHS[row] for row in rows) % 4 for rows in STEPS]  # of ScriptedPlanner
Size = tuple[int, int]
LIES = {  # replicas, ranks of each -> shape of the mesh, and how a weight lies along its axes
    (1, 4): ((4,), ("S(0)",)),
    (1, 2): ((2,), ("S(0)",)),
    (2, 2): ((2, 2), ("R", "S(0)")),
    (4, 1): None,  # DDP: whole weights
}


@dataclass
class Lying(TrainerCallback):
    """Notes before each optimizer step how weights lie, and the bytes of weights, gradients and moments here."""

    ways: set[Any] = field(default_factory=set[Any])
    num_bytes: int = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        weights = list(model.parameters())
        parts = [p for p in weights if isinstance(p, DTensor)]
        assert len(parts) in (0, len(weights))
        self.ways |= {(tuple(p.device_mesh.shape), tuple(map(str, p.placements))) for p in parts} or {None}
        moments = [x for kept in optimizer.state.values() for x in kept.values() if torch.is_tensor(x) and x.ndim]
        here = [*weights, *(p.grad for p in weights if p.grad is not None), *moments]
        self.num_bytes = sum(_local(x).nbytes for x in here)


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def with_mesh(size: Size, args: dict[str, Any], launched: bool = False) -> dict[str, Any]:
    """Arguments for so many replicas, of so many ranks each; by the launcher's environment, or as an argument."""
    replicas, shards = size
    sharded = {**SHARDED, **args, "fsdp_config": {**SHARDED["fsdp_config"], **args.get("fsdp_config", {})}}
    if shards > 1:
        shard_on_cpu()
    else:
        # accelerate takes a mesh without FSDP on GPUs only
        ParallelismConfig._validate_accelerator = lambda *_: None
        sharded = args
    if launched:
        os.environ |= {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicas),
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shards),
        }
        return sharded
    return {**sharded, "parallelism_config": ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)}


def model_of(case: dict[str, Any]) -> Any:
    model = tiny_model("llama", "sdpa", case.get("dtype", torch.float64), **case.get("config", {}))
    return with_lora(model) if case.get("lora") else model


def train_case(size: Size, case: dict[str, Any]) -> dict[str, Any]:
    lying, reduced = Lying(), list[bool]()
    _watch_reductions(reduced, forget=case.get("forget", False))
    args = with_mesh(size, case.get("args", {}), case.get("launched", False))
    hetero = HeteroConfig(**case.get("hetero", {}))
    found = trained(model_of(case), samples(LENGTHS), hetero=hetero, callbacks=[lying], **args)
    return {**found, "ways": lying.ways, "num_bytes": lying.num_bytes, "reduced": reduced}


def _watch_reductions(reduced: list[bool], forget: bool) -> None:
    """Note for each exchange of gradients of FSDP2 whether replicas add theirs up.

    Args:
        reduced: where.
        forget: wrong on purpose: they never do, so that each replica learns from its own ranks.
    """
    reduce = _fsdp_param_group.foreach_reduce

    def watched(*args: Any) -> Any:
        reduced.append(args[11])
        return reduce(*args[:9], None if forget else args[9], *args[10:])

    _fsdp_param_group.foreach_reduce = watched


def check_lies(found: Sequence[dict[str, Any]], size: Size) -> None:
    for rank in found:
        assert rank["ways"] == {LIES[size]}
        assert rank["wrapper"].startswith("FSDP" if size[1] > 1 else "DistributedDataParallel"), rank["wrapper"]


def check_case(size: Size, case: dict[str, Any]) -> list[dict[str, Any]]:
    found = run_ranks(train_case, size[0] * size[1], size, case)
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    tolerance = 1e-12 if case.get("dtype", torch.float64) == torch.float64 else 1e-6
    check_lies(found, size)
    for rank in found:
        assert len(rank["gradients"]) == len(STEPS)
        for ours, theirs in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(ours, theirs) <= tolerance
        assert largest_difference(rank["weights"], expected["weights"]) <= tolerance
    logged = [entry["loss"] for entry in found[0]["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-6)
    return found


LOADED_BY_ONE = {"fsdp_config": {"cpu_ram_efficient_loading": True}}
RECOMPUTED = {"fsdp_config": {"activation_checkpointing": True}}
CASES: dict[str, tuple[Size, dict[str, Any]]] = {
    "2x2": ((2, 2), {}),
    "1x4": ((1, 4), {}),
    "4x1": ((4, 1), {}),
    "launched": ((2, 2), {"launched": True}),
    "recomputed by FSDP": ((2, 2), {"args": RECOMPUTED}),
    "recomputed by transformers": ((2, 2), {"args": {"activation_checkpointing": True}}),
    "accumulation": ((2, 2), {"args": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}}),
    "synchronised once": ((2, 2), {"hetero": {"sync_each_micro_batch": False}}),
    "adapters": ((2, 2), {"lora": True}),
    "adapters, recomputed": ((2, 2), {"lora": True, "args": RECOMPUTED}),
    "tied": ((2, 2), {"config": {"tie_word_embeddings": True}}),
    "loaded by one rank": (
        (2, 2),
        {"dtype": torch.float32, "args": LOADED_BY_ONE},
    ),
    "compiled": ((2, 2), {"args": {"torch_compile": True, "torch_compile_backend": "eager"}}),
}


@pytest.mark.parametrize("name", [n if n == "2x2" else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_gradients_equal_the_reference(name: str) -> None:
    """For each mesh of four ranks, gradients of each step and weights after four are one process's."""
    size, case = CASES[name]
    found = check_case(size, case)
    if size == (2, 2) and case.get("hetero", {}).get("sync_each_micro_batch", True):
        # each micro-batch exchanges the gradients of as many layers; replicas add up those of a step's last one
        reduced = found[0]["reduced"]
        assert sum(reduced) * sum(NUM_MICRO_BATCHES) == len(reduced) * len(STEPS)
        assert reduced[-1]


def test_replicas_that_do_not_add_up_are_noticed() -> None:
    """The comparison above can fail: with each replica on its own, gradients are far away, and replicas drift apart."""
    found = run_ranks(train_case, 4, (2, 2), {"forget": True})
    expected = reference_steps(model_of({}), samples(LENGTHS), STEPS)
    check_lies(found, (2, 2))
    assert largest_difference(found[0]["gradients"][0], expected["gradients"][0]) > 1e-2
    assert largest_difference(found[0]["weights"], found[2]["weights"]) > 1e-4
    assert largest_difference(found[0]["weights"], found[1]["weights"]) == 0


@pytest.mark.slow
def test_gradients_in_16_bits_do_not_wait() -> None:
    """Replicas add up in every micro-batch where what waits would be added up in 16 bits; bf16 is as near as it was."""
    case = {"dtype": torch.float32, "args": {"bf16": True}}
    found = run_ranks(train_case, 4, (2, 2), case)
    check_lies(found, (2, 2))
    assert all(found[0]["reduced"])
    expected = reference_steps(model_of(case), samples(LENGTHS), STEPS)
    for ours, theirs in zip(found[0]["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 2e-2


def never_added_up(_: None) -> str:
    """FSDP2 is told that replicas wait, and never that they no longer do."""
    later = FSDPModule.set_requires_all_reduce
    FSDPModule.set_requires_all_reduce = lambda self, *_, **__: later(self, False)  # pyright: ignore
    with pytest.raises(HeteroError) as caught:
        train_case((2, 2), {"args": {"max_steps": 1}})
    return str(caught.value)


def test_gradients_that_still_wait_are_refused() -> None:
    """A step does not end with gradients that replicas have not added up: every rank says so, and what to do."""
    for words in run_ranks(never_added_up, 4, None):
        assert "replicas have not added them up. Set HeteroConfig.sync_each_micro_batch=False" in words


def test_clipped_gradients() -> None:
    """The norm is that of the whole gradient, once, and weights are those of plain clipping."""
    limit = 0.05
    found = run_ranks(train_case, 4, (2, 2), {"args": {"max_grad_norm": limit}})
    model, norms = model_of({}), list[float]()
    for rows in STEPS:
        [gradients] = reference_steps(model, samples(LENGTHS), [rows], rate=0.0)["gradients"]
        norms.append(math.sqrt(sum(float((g * g).sum()) for g in gradients.values())))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.05 * gradients[name] * min(1.0, limit / (norms[-1] + 1e-6))
    assert min(norms) > limit
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for rank in found:
        assert largest_difference(rank["weights"], weights) <= 1e-12
    assert [e["grad_norm"] for e in found[0]["logs"] if "loss" in e] == pytest.approx(norms, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 2), (1, 4)])
def test_states_take_what_is_estimated(size: Size) -> None:
    """A rank holds its replica's share of weights, gradients and Adam's moments, and the estimate says how many bytes.

    What is gathered while layers compute is counted beside.
    """
    case = {"dtype": torch.float32, "args": {"optim": "adamw_torch", "max_steps": 2}}
    found = run_ranks(train_case, 4, size, case)
    check_lies(found, size)
    model = model_of(case)
    shape = shape_of(model, model.config, 4, False, True, True)
    estimated = sharded_bytes(shape, 4, Shards(replicas=size[0])) - gathered_bytes(shape)
    assert sum(rank["num_bytes"] for rank in found) / 4 == pytest.approx(estimated, rel=0.01)
    assert found[0]["num_bytes"] == pytest.approx(16 * shape.num_params / size[1], rel=0.03)


def trained_after_an_error(folder: str, hetero: dict[str, Any]) -> dict[str, Any]:
    """Break a first run off after the first micro-batch of its first step, and train again."""
    look, recorder = training.check_reached, Recorder()

    def fails(*args: Any) -> None:
        training.check_reached = look
        raise HeteroError("broken off")

    training.check_reached = fails
    args = arguments(folder, 4, **with_mesh((2, 2), {}))
    rows, asked = samples(LENGTHS), HeteroConfig(**hetero)
    trainer = ScriptedTrainer(model_of({}), args, train_dataset=rows, callbacks=[recorder], hetero=asked)
    with pytest.raises(HeteroError, match="broken off"):
        trainer.train()
    assert not recorder.gradients
    trainer.train()
    return {"gradients": recorder.gradients}


@pytest.mark.slow
@pytest.mark.parametrize("syncs_each", [None, False])
def test_a_step_that_was_broken_off_leaves_nothing(tmp_path: Path, syncs_each: bool | None) -> None:
    """What had added up for a later micro-batch is in no step of the run after."""
    assert NUM_MICRO_BATCHES[0] > 1
    expected = reference_steps(model_of({}), samples(LENGTHS), STEPS)
    for rank in run_ranks(trained_after_an_error, 4, str(tmp_path), {"sync_each_micro_batch": syncs_each}):
        for ours, theirs in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(ours, theirs) <= 1e-12


# ----------------------------------------------------------------------------------------------------------- samples


def rows_trained(folder: str) -> list[list[int]]:
    """Tokens of each micro-batch of this rank, in one step without sharing."""
    seen, model = list[list[int]](), tiny_model()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append(kwargs["input_ids"].flatten().tolist())

    args = arguments(folder, 4, len(LENGTHS), max_steps=1, **with_mesh((2, 2), {}))
    trainer = HeteroTrainer(model, args, train_dataset=samples(LENGTHS), hetero=HeteroConfig(max_degree=1))
    model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return seen


def test_samples_are_dealt_over_both_axes(tmp_path: Path) -> None:
    """Of a step without sharing, each sample is trained by one rank alone: no two of a mesh get the same ones."""
    seen = run_ranks(rows_trained, 4, str(tmp_path))
    said = [" ".join(f" {' '.join(map(str, tokens))} " for tokens in rank) for rank in seen]
    rows = [f" {' '.join(map(str, row['input_ids']))} " for row in samples(LENGTHS) if len(row["input_ids"]) > 3]
    assert [sum(row in rank for rank in said) for row in rows] == [1] * len(rows)
    assert all(any(row in rank for row in rows) for rank in said)


def evaluated(folder: str, size: Size | None) -> float:
    rows = samples(LENGTHS)
    changes = {"max_steps": 2, "per_device_eval_batch_size": 2}
    args = arguments(folder, 4, **(changes if size is None else with_mesh(size, changes)))
    trainer = HeteroTrainer(tiny_model(dtype=torch.float64), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


@pytest.mark.slow
def test_evaluation(tmp_path: Path) -> None:
    """The loss of an evaluation after some steps is that of whole weights on each rank."""
    whole = run_ranks(evaluated, 4, str(tmp_path), None)
    found = run_ranks(evaluated, 4, str(tmp_path), (2, 2))
    assert found == pytest.approx(whole, rel=1e-12)
    assert len(set(found)) == 1


# ------------------------------------------------------------------------------------------------------- checkpoints


def train_and_save(folder: str, size: Size, kind: str, resume: str | None) -> dict[str, Any]:
    lying = Lying()
    args: dict[str, Any] = {"output_dir": folder, "optim": "adamw_torch", "learning_rate": 1e-3}
    args |= {"save_strategy": "steps", "save_steps": 2, "full_determinism": False}
    args = with_mesh(size, {**args, "fsdp_config": {"state_dict_type": kind}})
    found = trained(tiny_model(dtype=torch.float64), samples(LENGTHS), resume=resume, callbacks=[lying], **args)
    return {**found, "ways": lying.ways}


RESUMED_ON: dict[str, tuple[Size, ...]] = {
    "FULL_STATE_DICT": ((2, 2), (1, 4), (1, 2)),
    "SHARDED_STATE_DICT": ((2, 2), (1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resume(tmp_path: Path, kind: str) -> None:
    """A resumed run ends with the same weights bit by bit; over another mesh, or half the ranks, to rounding."""
    folder = str(tmp_path)
    whole = run_ranks(train_and_save, 4, folder, (2, 2), kind, None)
    check_lies(whole, (2, 2))
    cost = json.loads((tmp_path / "checkpoint-2" / KEPT_COST_MODEL).read_text())
    assert (cost["num_ranks"], cost["replicas"]) == (4, 2)
    assert "in 2 replicas" in cost["source"]
    for size in RESUMED_ON[kind]:
        rest = run_ranks(train_and_save, size[0] * size[1], folder, size, kind, f"{folder}/checkpoint-2")
        check_lies(rest, size)
        assert len(rest[0]["gradients"]) == 2
        if size == (2, 2):
            assert all(torch.equal(rest[0]["weights"][name], found) for name, found in whole[0]["weights"].items())
        else:
            assert largest_difference(rest[0]["weights"], whole[0]["weights"]) <= 1e-9


# --------------------------------------------------------------------------------------------------------- refusals


def lying_otherwise(folder: str) -> str:
    model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    for size in ((2, 2), None):
        asked = None if size is None else ParallelismConfig(dp_replicate_size=size[0], dp_shard_size=size[1])
        check_mesh(model, arguments(folder, 4, parallelism_config=asked))
    with pytest.raises(HeteroError) as caught:
        check_mesh(model, arguments(folder, 4, parallelism_config=ParallelismConfig(dp_shard_size=4)))
    return str(caught.value)


def test_weights_that_lie_otherwise_are_refused(tmp_path: Path) -> None:
    """A model that was spread over another mesh than was asked for is noticed before its first step."""
    for words in run_ranks(lying_otherwise, 4, str(tmp_path)):
        assert "should lie in 1 replicas of 4 parts (parallelism_config), and lie in 2 of 2" in words


def refused(folder: str) -> str:
    mesh = ParallelismConfig(dp_replicate_size=4, dp_shard_size=2)
    with pytest.raises(HeteroError) as caught:
        trained(tiny_model(), samples(LENGTHS), output_dir=folder, parallelism_config=mesh, **SHARDED)
    assert dist.is_initialized()
    return str(caught.value)


def test_a_mesh_of_other_ranks_is_refused_in_words(tmp_path: Path) -> None:
    """Before a trainer is made, the mesh and the ranks are said."""
    [words] = set(run_ranks(refused, 2, str(tmp_path)))
    assert "dp_replicate_size=4 x dp_shard_size=2 (parallelism_config) is a mesh of 8 ranks, and there are 2" in words
