"""What the behaviours of `Trainer` share that are tried beside it: rows, a collator, settings, a tiny model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from conformance import Behaviour, compare, learned
from helpers import tiny_model
from transformers import Trainer, TrainingArguments

from hf_hetero import HeteroTrainer
from hf_hetero.data.plan_ahead import PlanSource


class Here(HeteroTrainer):
    """Plans in this process: starting others takes longer than these runs."""

    def _plan_source(self) -> PlanSource:
        return self._planners().for_evaluation()


# ----------------------------------------------------------------------------------------------------- what runs share


def rows(num: int = 24, length: int | None = None, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    found = []
    for _ in range(num):
        ids = [draw.randint(3, 96) for _ in range(length or draw.randint(4, 24))]
        found.append({"input_ids": ids, "labels": list(ids)})
    return found


def pad(examples: list[Any]) -> dict[str, torch.Tensor]:
    most = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(e[name]) + [value] * (most - len(e[name])) for e in examples])

    masks = [[1] * len(e["input_ids"]) + [0] * (most - len(e["input_ids"])) for e in examples]
    batch = {"input_ids": filled("input_ids", 0), "attention_mask": torch.tensor(masks)}
    return {**batch, "labels": filled("labels", -100)} if "labels" in examples[0] else batch


def options(folder: str, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=folder, **{**usual, **changes})


def make(kind: Any, folder: str, data: Any = None, model: Any = None, **changes: Any) -> Any:
    names = ("callbacks", "eval_dataset", "compute_loss_func", "compute_metrics", "model_init", "optimizers")
    names = (*names, "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics", "processing_class", "hetero")
    given = {name: changes.pop(name) for name in names if name in changes}
    given.setdefault("data_collator", changes.pop("data_collator", pad))
    if "model_init" not in given:
        given["model"] = model or tiny_model()
    data = rows() if data is None else data
    return kind(args=options(folder, **changes), train_dataset=data, **given)


def trained(kind: Any, folder: str, *data: Any, **changes: Any) -> list[Any]:
    """Losses, gradient norms, and weights at the end."""
    trainer = make(kind, folder, *data, **changes)
    trainer.train()
    return learned(trainer)


def check(one: Behaviour, folder: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    compare(one, Trainer, Here, folder)
