"""What tests of preference pairs share: pairs, plans of them, runs of both trainers, a head that computes in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import datasets
import torch
import torch.distributed as dist
import trl
from helpers import (
    Recorder,
    ScriptedPlanner,
    arguments,
    plain_name,
    scripted,
    shard_on_cpu,
    tiny_model,
    whole,
    with_lora,
)
from torch.nn import functional as F
from words import say, tokenizer

from hf_hetero import Group, HeteroConfig, HeteroDPOTrainer, MicroBatch, Plan
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.plan import StepReport
from hf_hetero.trainer.pairs.plans import PlansOfPairs

SIZES = [(3, 9, 5), (7, 2, 30), (1, 1, 2), (20, 5, 5), (2, 40, 3), (5, 17, 8), (11, 3, 26)]
"""Words of prompt, chosen and rejected completion; so many that a step of four is followed by one of three."""
PLAIN = ("per_device_train_batch_size", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm")


def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": say(prompt, n), "chosen": " " + say(chosen, 3 * n), "rejected": " " + say(rejected, 5 * n + 1)}
        for n, (prompt, chosen, rejected) in enumerate(SIZES)
    ]


class PlannerOfItems:
    """Scripted plans of items, as of samples: mixed degrees, 1 to 4 micro-batches, empty groups."""

    def __init__(self, num_ranks: int) -> None:
        self._planner = ScriptedPlanner(num_ranks)

    def plan(self, items: Sequence[Any]) -> Plan:
        plan = self._planner.plan([sum(item) for item in items])
        return replace(plan, micro_batches=tuple(MicroBatch(tuple(map(_held, m.groups))) for m in plan.micro_batches))


def _held(group: Group) -> Group:
    """Without a GPU nothing is offloaded, and a cost model knows no such groups."""
    return replace(group, activations=None if group.activations == "offload" else group.activations)


class Degrees(StepReportCallback):
    """Keeps the largest degree of each step."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.found.append(max(group.degree for group in report.plan.groups))


class Scripted(HeteroDPOTrainer):
    def _plan_source(self) -> Any:
        return PlansOfPairs(scripted(PlannerOfItems(self.args.world_size)))

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


def config(folder: str, kind: Any = trl.DPOConfig, global_batch: int = 4, **changes: Any) -> Any:
    world = dist.get_world_size() if dist.is_initialized() else 1
    plain = arguments(folder, world, global_batch).to_dict()
    options = {
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return kind(folder, **{**{name: plain[name] for name in PLAIN}, **options, **changes})


def model_of(seed: int, adapters: bool, **options: Any) -> Any:
    """The trained model, or a reference of other weights."""
    model = tiny_model(**options)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return with_lora(model) if adapters else model


def exact_head(model: Any) -> None:
    """Have TRL's fused head compute log-probabilities in the model's own type, plainly."""
    fused = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, labels=labels, **kwargs)
        logits = fused(*args, **kwargs).logits[:, :-1]
        log_softmax, targets = F.log_softmax(logits, -1), labels[:, 1:]
        mask = targets != -100
        log_probs = log_softmax.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=-(log_softmax.exp() * log_softmax).sum(-1) * mask,
            mean_logits=logits.mean(-1) * mask,
            is_top1=(logits.argmax(-1) == targets) & mask,
        )

    model.forward = MethodType(forward, model)


def train(
    folder: str,
    changes: dict[str, Any],
    kind: Any = Scripted,
    adapters: bool = False,
    dtype: torch.dtype = torch.float64,
    hetero: dict[str, Any] | None = None,
    resume: str | None = None,
    data: Any = None,
    streamed: bool = False,
) -> dict[str, Any]:
    """Gradients, weights and logs of a run; `changes` are of the arguments, `data` pairs, or a folder with a table."""
    if changes.get("fsdp"):
        shard_on_cpu()
    recorder, degrees = Recorder(), Degrees()
    table = datasets.load_from_disk(data) if isinstance(data, str) else datasets.Dataset.from_list(data or pairs())
    if kind is trl.DPOTrainer:
        options: dict[str, Any] = {}
    else:
        options = {"hetero": HeteroConfig(**(hetero or {}))}
    if changes.get("eval_strategy"):
        options["eval_dataset"] = table
    reference = None if adapters else model_of(1, False, dtype=dtype)
    trainer = kind(
        model_of(0, adapters, dtype=dtype),
        ref_model=reference,
        args=config(folder, **changes),
        train_dataset=table.to_iterable_dataset() if streamed else table,
        processing_class=tokenizer(),
        callbacks=[recorder, degrees],
        **options,
    )
    if kind is trl.DPOTrainer and dtype == torch.float64:
        exact_head(trainer.model.get_base_model() if adapters else trainer.model)
        if reference is not None:
            exact_head(reference)
    trainer.train(resume_from_checkpoint=resume)
    named = trainer.model.named_parameters()
    return {
        "gradients": recorder.gradients,
        "weights": {plain_name(name): whole(p) for name, p in named if ".ref." not in name},
        "logs": trainer.state.log_history,
        "degrees": degrees.found,
        "wrapper": type(trainer.model_wrapped).__name__,
        "reference": None if reference is None else reference.config._attn_implementation,
    }
