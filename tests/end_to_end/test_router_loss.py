"""Models that add the loss of their routers learn the same under any plan: that of one process with the whole batch.

The reference is independent of the package: each sample alone, the logits of routers of all samples put together, their
loss by its definition, in fp64. transformers' own function computes in fp32 (`tests/model/experts` compares with it).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from helpers import (
    IGNORE,
    LENGTHS,
    Recorder,
    ScriptedPlanner,
    ScriptedTrainer,
    arguments,
    gradients_of,
    largest_difference,
    run_ranks,
    samples,
    scripted,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
    with_lora,
)
from torch.nn import functional as F
from transformers import Trainer
from words import tokenizer

from hf_hetero import HeteroConfig, HeteroTrainer, UnsupportedModel
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.plan import StepReport
from hf_hetero.trainer import routers

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
COEFFICIENT = 0.3
NUM_EXPERTS, NUM_USED = 4, 2
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
CASES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {},
    "gpt-oss": {"family": "gpt-oss"},
    "adapters": {"lora": True},
    "recomputed": {"args": {"activation_checkpointing": True}},
    "whole logits": {"hetero": {"chunked_loss": False}},
    "accumulation": {"args": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}},
    "each micro-batch synchronised": {"hetero": {"sync_each_micro_batch": True}},
    "sharded": {"args": SHARDED},
    "replicas": {"args": {**SHARDED, "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}},
}


def model_of(case: dict[str, Any]) -> Any:
    """A model in fp64, whose routers are far from even."""
    family, attention = case.get("family", "qwen3-moe"), "eager" if case.get("family") == "gpt-oss" else "sdpa"
    changes = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    model = tiny_model(family, attention, torch.float64, **changes)
    model.config._experts_implementation = "eager"  # torch's grouped product knows no fp64
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                p *= 30
    return with_lora(model).double() if case.get("lora") else model


def train_case(case: dict[str, Any]) -> dict[str, Any]:
    if case.get("args", {}).get("fsdp"):
        shard_on_cpu()
    if case.get("own_fractions"):  # wrong on purpose: each rank takes its own choices for those of all
        routers._of_all = lambda sums, *_: sums
    hetero = HeteroConfig(**case.get("hetero", {}))
    found = trained(model_of(case), samples(LENGTHS), ScriptedTrainer, hetero, **case.get("args", {}))
    assert not case.get("args", {}).get("fsdp") or found["wrapper"].startswith("FSDP")
    return found


def balance(layers: Sequence[torch.Tensor], fractions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """E sum_e f_e P_e, both means over all rows of all layers; and f."""
    probabilities = torch.cat(list(layers)).softmax(-1)
    chosen = F.one_hot(probabilities.topk(NUM_USED).indices, NUM_EXPERTS).sum(1).double().mean(0)
    given = chosen if fractions is None else fractions
    return NUM_EXPERTS * (given * probabilities.mean(0)).sum(), chosen


def reference(case: dict[str, Any], num_steps: int = 4, last_step: bool = False) -> dict[str, Any]:
    """Gradients, losses and the routers' losses of each step, by plain gradient descent."""
    model, data = model_of(case).train(), samples(LENGTHS)
    found: dict[str, Any] = {"gradients": [], "losses": [], "routers": []}
    fractions: torch.Tensor | None = None
    for rows in STEPS[:num_steps]:
        model.zero_grad()
        count = sum(label != IGNORE for row in rows for label in data[row]["labels"][1:])
        total, layers = torch.zeros((), dtype=torch.float64), list[torch.Tensor]()
        for row in rows:
            ids, labels = (torch.tensor(data[row][key]) for key in ("input_ids", "labels"))
            out = model(input_ids=ids[None], use_cache=False)
            total = total + F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=IGNORE, reduction="sum")
            layers += out.router_logits
        added, chosen = balance(layers, fractions)
        loss = total / count + COEFFICIENT * added
        loss.backward()
        fractions = chosen if last_step else None
        found["gradients"].append(gradients_of(model))
        found["losses"].append(loss.item())
        found["routers"].append(balance(layers)[0].item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return found


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["gradients"]) == len(expected["gradients"])
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-12
    logs = [entry for entry in found["logs"] if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(expected["losses"], rel=1e-6)
    assert [entry["hetero/router_loss"] for entry in logs] == pytest.approx(expected["routers"], rel=1e-12)


@pytest.mark.parametrize(
    "name", [name if name == "qwen3-moe" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_plans_learn_as_one_process(name: str) -> None:
    """Gradients to 1e-12, and what is logged: degrees 1, 2 and 4, several micro-batches, ranks without tokens."""
    expected = reference(CASES[name])
    assert min(expected["routers"]) > 1.001 * NUM_USED  # uneven: a loss of even routers would hide a mistake
    for rank in run_ranks(train_case, 4, CASES[name]):
        check(rank, expected)


def test_a_single_process_with_micro_batches() -> None:
    """Without other ranks, a step is looked at as well."""
    check(train_case({}), reference({}))


def test_fractions_of_each_rank_are_noticed() -> None:
    """The comparison above can fail: choices of one's own micro-batches, as stock ranks take them, are far away."""
    found = run_ranks(train_case, 2, {"own_fractions": True, "args": {"max_steps": 1}})[0]
    expected = reference({}, 1)
    assert largest_difference(found["gradients"][0], expected["gradients"][0]) > 1e-4


def test_products_of_samples_are_another_loss() -> None:
    """The definition above can fail, too: the mean of samples' own losses is not the loss of all."""
    model = model_of({}).eval()
    with torch.no_grad():
        layers = [model(input_ids=torch.tensor(row["input_ids"])[None]).router_logits for row in samples(LENGTHS)[:8]]
    each = torch.stack([balance(of_sample)[0] for of_sample in layers]).mean()
    together = balance([layer for of_sample in layers for layer in of_sample])[0]
    assert abs(each - together) > 1e-2 * together


def test_the_approximation_is_what_it_says() -> None:
    """With `last_step` each step takes the choices of the one before, on all ranks, and the first is exact."""
    case = {"hetero": {"router_loss": "last_step"}, "args": {"max_steps": 3}}
    check(run_ranks(train_case, 2, case)[1], reference({}, 3, last_step=True))


def test_a_plain_trainer_with_one_batch_a_step_learns_the_same(tmp_path: Path) -> None:
    """What is defined is transformers' own loss where one rank takes the whole step as one batch, to its fp32."""
    model = model_of({}).float()
    args = arguments(str(tmp_path), 1, max_steps=1)
    data = samples([40, 3, 17, 9, 28, 64, 2, 11, 7, 33, 21, 4])
    Trainer(model, args, train_dataset=data, data_collator=PackedCollator()).train()
    ours = model_of({}).float()
    ScriptedTrainer(model=ours, args=args, train_dataset=data).train()
    first, second, start = (
        {name: p.detach() for name, p in one.named_parameters()} for one in (ours, model, model_of({}).float())
    )
    moved = max(float((second[name] - start[name]).abs().max()) for name in start)
    assert max(float((first[name] - second[name]).abs().max()) for name in start) <= 1e-4 * moved


def evaluate(batch: int) -> dict[str, float]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, world, per_device_eval_batch_size=batch // world)
        trainer = ScriptedTrainer(model=model_of({}), args=args, eval_dataset=samples(LENGTHS))
        return trainer.evaluate()


def test_evaluations_add_the_loss_of_each_step() -> None:
    """On one rank and on two: token losses of all samples, and for each step its routers' loss, by its targets."""
    data, batch, model = samples(LENGTHS), 8, model_of({}).eval()
    total, count = 0.0, 0
    for start in range(0, len(data), batch):
        layers, targets, summed = list[torch.Tensor](), 0, 0.0
        for row in data[start : start + batch]:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            with torch.no_grad():
                out = model(input_ids=ids[None])
            summed += F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=IGNORE, reduction="sum").item()
            targets += int((labels[1:] != IGNORE).sum())
            layers += out.router_logits
        total += summed + targets * COEFFICIENT * balance(layers)[0].item()
        count += targets
    found = [evaluate(batch), *run_ranks(evaluate, 2, batch)]
    assert [one["eval_loss"] for one in found] == pytest.approx([total / count] * 3, rel=1e-9)


def test_reentrant_checkpoints_are_refused() -> None:
    """They cut off the gradients of what leaves a layer beside its output; without them the same model trains."""
    args = {"activation_checkpointing": True, "max_steps": 1}
    reentrant = {**args, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UnsupportedModel, match="use_reentrant"):
        train_case({"args": reentrant})
    train_case({"args": args})


class Repeats(StepReportCallback):
    """Counts how often steps were begun again."""

    number = 0

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.number += report.repeats


def train_short_of_memory(looks: bool) -> dict[str, Any]:
    """Rank 1 holds 35 tokens, where plans are for 60: in what is looked at before a step, or in the step alone."""
    model, repeats = model_of({}), Repeats()

    def full(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        if module.training and output.shape[1] > 35 and torch.is_grad_enabled() != looks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return output

    if dist.get_rank() == 1:
        model.model.layers[1].register_forward_hook(full)
    hetero = HeteroConfig(max_tokens_per_rank=60)
    found = trained(model, samples(LENGTHS), HeteroTrainer, hetero, callbacks=[repeats], max_steps=3)
    return {**found, "repeats": repeats.number}


@pytest.mark.slow
@pytest.mark.parametrize("looks", [True, False], ids=["look", "step"])
def test_memory_that_runs_out(looks: bool) -> None:
    """A step that is left, wherever, and planned anew for less, is begun with another look, and learns the same."""
    expected = reference({}, 3)
    for rank in run_ranks(train_short_of_memory, 2, looks):
        assert rank["repeats"]
        check(rank, expected)


def train_sft(folder: str) -> dict[str, Any]:
    import datasets
    import trl

    from hf_hetero import HeteroSFTTrainer

    class Scripted(HeteroSFTTrainer):
        def _plan_source(self) -> Any:
            return scripted(ScriptedPlanner(self.args.world_size))

    plain = arguments(folder, dist.get_world_size(), max_steps=2).to_dict()
    names = ("per_device_train_batch_size", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm")
    names += ("use_cpu", "seed", "logging_steps", "save_strategy", "disable_tqdm")
    options = {"bf16": False, "report_to": [], "max_length": None, "activation_checkpointing": False}
    args = trl.SFTConfig(folder, router_aux_loss_coef=COEFFICIENT, **{name: plain[name] for name in names}, **options)
    recorder, data = Recorder(), datasets.Dataset.from_list(samples(LENGTHS))
    model = model_of({}).float()
    model.router_aux_loss_coef = 100.0  # TRL's own factor counts, and not that which the model was built with
    trainer = Scripted(model, args, train_dataset=data, processing_class=tokenizer(), callbacks=[recorder])
    trainer.train()
    return {"gradients": recorder.gradients, "logs": trainer.state.log_history}


def test_trl_learns_and_logs_the_same(tmp_path: Path) -> None:
    """TRL's SFTTrainer adds and logs the loss by itself: its gradients, and what it logs, are the step's, in fp32."""
    pytest.importorskip("trl")
    found, expected = run_ranks(train_sft, 2, str(tmp_path))[1], reference({}, 2)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, {name: theirs[name].float() for name in ours}) <= 1e-4
    logs = [entry for entry in found["logs"] if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(expected["losses"], rel=1e-5)
    assert [entry["aux_loss"] for entry in logs] == pytest.approx(expected["routers"], rel=1e-4)
