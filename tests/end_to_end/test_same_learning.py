"""The plan never changes the learning: gradients and weights under plans of mixed degrees, against references.

The first reference is independent of the package: one process, each sample alone, losses summed and divided once. The
second is transformers' own Trainer on one process. Plans mix degrees 1, 2 and 4, all methods of attention, 1 to 4
micro-batches, and leave some groups without a sample; the data has labels masked in part, a sample without targets, and
samples of one token.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    FAMILIES,
    LENGTHS,
    ScriptedPlanner,
    ScriptedTrainer,
    arguments,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
    with_lora,
)
from sights import all_in_double
from transformers import Trainer

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.checks.in_double import in_double
from hf_hetero.collators import PackedCollator
from hf_hetero.costs import ActivationPolicy
from hf_hetero.plan import ACTIVATIONS, METHODS, Group

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
DTYPES = {torch.float64: "fp64", torch.float32: "fp32"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def model_of(case: dict[str, Any]) -> Any:
    attention = case.get("attention", "sdpa")
    model = tiny_model(case.get("family", "llama"), attention, case["dtype"], **case.get("config", {}))
    return with_lora(model) if case.get("lora") else model


def train_case(case: dict[str, Any]) -> dict[str, Any]:
    hetero, model = HeteroConfig(**case.get("hetero", {})), model_of(case)
    with all_in_double(model) if case.get("in_double") else nullcontext():
        return trained(model, samples(LENGTHS), hetero=hetero, **case.get("args", {}))


def check_case(case: dict[str, Any], num_ranks: int = 4) -> None:
    found = run_ranks(train_case, num_ranks, case)
    model, is_double = model_of(case), case.get("in_double", False)
    with in_double(model) if is_double else nullcontext():
        expected = reference_steps(model, samples(LENGTHS), STEPS)
    tolerance = TOLERANCE[torch.float64 if is_double else case["dtype"]]
    for rank in found:
        assert rank["wrapper"] == "DistributedDataParallel"
        assert len(rank["gradients"]) == len(STEPS)
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(rank["gradients"][step], gradients) <= tolerance
        assert largest_difference(rank["weights"], expected["weights"]) <= tolerance
    logged = [entry["loss"] for entry in found[0]["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-6)


def test_plans_mix_everything() -> None:
    """The plans of four steps have every method, degree and policy in a group that has samples."""
    plans = [ScriptedPlanner(4).plan([LENGTHS[row] for row in step]) for step in STEPS]
    filled = [group for plan in plans for group in plan.groups if group.samples]
    assert {group.degree for group in filled} == {1, 2, 4}
    assert {group.method for group in filled if group.degree > 1} == set(METHODS)
    assert {group.activations for group in filled} == {None, *ACTIVATIONS}


@pytest.mark.parametrize(
    ("family", "dtype"),
    often(product(["llama", "qwen3"], DTYPES), ("llama", torch.float64), ("qwen3", torch.float32)),
    ids=lambda value: DTYPES.get(value, value),
)
def test_gradients_equal_the_reference(family: str, dtype: torch.dtype) -> None:
    """Gradients of each step, and the weights after four, equal the per-sample reference."""
    check_case({"family": family, "dtype": dtype})


@pytest.mark.parametrize(
    "family",
    often(
        [family for family in FAMILIES if family not in ("llama", "qwen3")],
        "gemma2",
        "gpt-oss",
    ),
)
def test_families(family: str) -> None:
    """Windows, softcap, attention sinks, experts: each family learns as under transformers' eager attention.

    What is computed in fp32 whatever the type, as eager attention's softmax is, is given as fp64, too: how fp32 rounds
    depends on the processor.
    """
    check_case({"family": family, "dtype": torch.float32, "attention": "eager", "in_double": True})


@pytest.mark.parametrize("reentrant", often([True, False], False), ids=["reentrant", "non-reentrant"])
def test_gradients_with_checkpointing(reentrant: bool) -> None:
    """Recompute in backward finds the right micro-batch, whichever kind of checkpointing."""
    args = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    check_case({"family": "qwen3", "dtype": torch.float64, "args": args})


@pytest.mark.parametrize("dtype", often(DTYPES, torch.float64), ids=DTYPES.values())
def test_gradients_with_lora(dtype: torch.dtype) -> None:
    """Adapters learn the same, too."""
    check_case({"dtype": dtype, "lora": True})


def test_gradients_with_lora_and_checkpointing() -> None:
    """Frozen embeddings and recompute together: the usual way to run adapters."""
    args = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    check_case({"dtype": torch.float64, "lora": True, "args": args})


def test_gradients_on_two_ranks() -> None:
    """The same on two ranks."""
    check_case({"dtype": torch.float64}, num_ranks=2)


def train_as_planned(room: int) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    hetero, model = HeteroConfig(max_tokens_per_rank=room), tiny_model(dtype=torch.float64)
    share = len(LENGTHS) // world
    return trained(model, samples(LENGTHS), HeteroTrainer, hetero, per_device_train_batch_size=share)


@pytest.mark.parametrize(
    "num_ranks", [1, 3, pytest.param(6, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_gradients_on_any_number_of_ranks(num_ranks: int) -> None:
    """With the planner's own plans, under a memory limit that the longest sample exceeds wherever there is a choice."""
    room = 24 if num_ranks > 1 else 64
    found = run_ranks(train_as_planned, num_ranks, room)[0] if num_ranks > 1 else train_as_planned(room)
    steps = trainer_order(len(LENGTHS), len(LENGTHS), 7, 4)
    expected = reference_steps(tiny_model(dtype=torch.float64), samples(LENGTHS), steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-12


def train_beyond_heads(methods: list[str]) -> dict[str, Any]:
    class Watch(StepReportCallback):
        def on_step_report(self, args: Any, state: Any, report: Any) -> None:
            groups.extend(report.plan.groups)

    groups: list[Group] = []
    hetero = HeteroConfig(max_tokens_per_rank=20, methods=methods)
    model = tiny_model(dtype=torch.float64, **FEW_HEADS)
    found = trained(model, samples(LENGTHS), HeteroTrainer, hetero, callbacks=[Watch()], per_device_train_batch_size=6)
    return {**found, "groups": groups}


FEW_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize("methods", [["ring"], list(METHODS)])
def test_gradients_of_groups_with_more_ranks_than_heads(methods: list[str]) -> None:
    """Two heads, and a sample that only four ranks can hold."""
    found = run_ranks(train_beyond_heads, 4, methods)[0]
    chosen = {group.method for group in found["groups"] if group.degree == 4}
    assert chosen
    assert chosen <= set(methods)
    steps = trainer_order(len(LENGTHS), len(LENGTHS), 7, 4)
    expected = reference_steps(tiny_model(dtype=torch.float64, **FEW_HEADS), samples(LENGTHS), steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-12


def train_with_little_memory(cost_file: str) -> dict[str, Any]:
    class Watch(StepReportCallback):
        def on_step_report(self, args: Any, state: Any, report: Any) -> None:
            groups.extend(report.plan.groups)

    groups: list[Group] = []
    hetero = HeteroConfig(cost_model=cost_file, activation_policies=list(ACTIVATIONS))
    model = tiny_model(dtype=torch.float64)
    found = trained(model, samples(LENGTHS), HeteroTrainer, hetero, callbacks=[Watch()], per_device_train_batch_size=12)
    return {**found, "groups": groups}


def test_gradients_where_some_groups_recompute(tmp_path: Path) -> None:
    """The planner's own plans where two ranks hold 40 tokens, 60 by recompute, and the longest sample has 64."""
    policies = {"recompute": ActivationPolicy(2 / 3, 1e-6, 1.5e-4), "offload": ActivationPolicy(0.5, 1e-6, 1e-3)}
    machine = {"all_to_all_bytes_per_token": 1.0, "all_to_all_bytes_per_s": {2: 1e6}, "memory_bytes_per_rank": 20.0}
    cost = CostModel(1e-6, 1e-4, 1e-5, **machine, activation_bytes_per_token=1.0, model_state_bytes_per_rank=0.0)
    replace(cost, activation_policies=policies).save(tmp_path / "cost.json")
    found = run_ranks(train_with_little_memory, 2, str(tmp_path / "cost.json"))[0]
    assert {group.activations for group in found["groups"] if group.samples} == {None, *ACTIVATIONS}
    steps = trainer_order(len(LENGTHS), len(LENGTHS), 7, 4)
    expected = reference_steps(tiny_model(dtype=torch.float64), samples(LENGTHS), steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-12


def test_gradients_with_uneven_heads() -> None:
    """Heads that no degree divides (6 query, 3 key-value heads on 4 ranks) are still exact."""
    config = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    check_case({"dtype": torch.float64, "config": config})


def test_gradients_with_dataloader_workers() -> None:
    """Reading samples in two worker processes changes nothing."""
    check_case({"dtype": torch.float64, "args": {"dataloader_num_workers": 2}})


def test_gradients_with_accumulation() -> None:
    """The user's gradient_accumulation_steps counts in the size of the global batch, and nowhere else."""
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    check_case({"dtype": torch.float64, "args": args})


def test_gradients_synchronised_each_micro_batch() -> None:
    """DDP that averages after every micro-batch adds up to the same."""
    check_case({"dtype": torch.float64, "hetero": {"sync_each_micro_batch": True}})


def plain_trainer(folder: str, **changes: Any) -> Any:
    """Transformers' Trainer on one process, as a user would run it, on the same global batches."""
    model = tiny_model("llama")
    collator = PackedCollator()
    changes = {"per_device_train_batch_size": 12, **changes}
    trainer = Trainer(model, arguments(folder, 1, **changes), train_dataset=samples(LENGTHS), data_collator=collator)
    trainer.train()
    return {name: p.detach() for name, p in model.named_parameters()}, trainer.state


def train_plainly_configured(changes: dict[str, Any]) -> dict[str, Any]:
    return trained(tiny_model("llama"), samples(LENGTHS), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.1},
        {"train_sampling_strategy": "sequential"},
        {"max_steps": -1, "num_train_epochs": 2},
    ],
    ids=["bare", "clipping-schedule-decay", "sequential", "epochs"],
)
def test_weights_equal_the_plain_trainer(changes: dict[str, Any], tmp_path: Any) -> None:
    """After four optimizer steps the weights equal those of `Trainer` on one process, in its own order of samples."""
    changes = {"include_num_input_tokens_seen": "all", **changes}
    weights, state = plain_trainer(str(tmp_path), **changes)
    found = run_ranks(train_plainly_configured, 4, changes)
    assert largest_difference(found[0]["weights"], weights) <= 1e-6
    ours = [entry for entry in found[0]["logs"] if "loss" in entry]
    theirs = [entry for entry in state.log_history if "loss" in entry]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "step"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), key
    assert found[0]["state"]["epoch"] == state.epoch
    assert found[0]["state"]["tokens"] == sum(LENGTHS) * 2  # Trainer counts padding as well, so it says more


def warnings_while_training(changes: dict[str, Any]) -> list[str]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("hf_hetero.model.lm_head").addHandler(Listener())
    trained(tiny_model(), samples(LENGTHS), **changes)
    return said


@pytest.mark.parametrize("changes", [{}, {"ddp_find_unused_parameters": False}, {"bf16": True}])
def test_whole_logits_are_not_computed_under_ddp(changes: dict[str, Any]) -> None:
    """Whatever the wrapper does with what the model gives, and says nothing about it."""
    assert run_ranks(warnings_while_training, 2, changes) == [[], []]


# ---------------------------------------------------------------------------------------------- negative controls


class NoGlobalCount(ScriptedTrainer):
    """Wrong on purpose: each rank divides by its own targets."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        own = torch.tensor(max(inputs.batch.num_targets, 1))
        return super().training_step(model, inputs, own)


class NoWorldFactor(ScriptedTrainer):
    """Wrong on purpose: the average over ranks is not undone."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / self.args.world_size


class CountedTwice(ScriptedTrainer):
    """Wrong on purpose: the count of all ranks is gathered once more."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super().training_step(model, inputs, num_items_in_batch * self.args.world_size)


def train_wrongly(trainer_class: Any) -> dict[str, Any]:
    return trained(tiny_model("llama"), samples(LENGTHS), trainer_class=trainer_class)


@pytest.mark.parametrize("trainer_class", often([NoGlobalCount, NoWorldFactor, CountedTwice], NoGlobalCount))
def test_wrong_normalisation_is_caught(trainer_class: Any) -> None:
    """The comparison above can fail: three usual mistakes are far outside its tolerance."""
    found = run_ranks(train_wrongly, 4, trainer_class)
    expected = reference_steps(tiny_model("llama"), samples(LENGTHS), STEPS)
    worst = max(largest_difference(a, b) for a, b in zip(found[0]["gradients"], expected["gradients"], strict=True))
    assert worst > 1e-2
