"""Behaviours of a trainer, run with Trainer and with HeteroTrainer on one tiny model, and how two outcomes compare.

A behaviour is a function of the trainer's class and a folder. Test files hold tables of them (`into`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from transformers import Trainer, TrainingArguments

from hf_hetero import HeteroError, HeteroTrainer
from hf_hetero.plan_ahead import PlanSource

Run = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Behaviour:
    """What is tried, and the words of the refusal where it cannot be equal."""

    run: Run
    refused: str | None

    @property
    def name(self) -> str:
        return self.run.__name__


def into(table: list[Behaviour]) -> Callable[..., Callable[[Run], Run]]:
    """A decorator that puts functions into a table; its argument is the words of the refusal, if there is one."""

    def behaviour(refused: str | None = None) -> Callable[[Run], Run]:
        def add(run: Run) -> Run:
            table.append(Behaviour(run, refused))
            return run

        return add

    return behaviour


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


def learned(trainer: Any) -> list[Any]:
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    weights = [float(p.detach().double().norm()) for p in trainer.model.parameters()]
    return [trainer.state.global_step, logs, weights]


def subclass(kind: Any, **methods: Any) -> Any:
    """A user's class over either trainer."""
    return type("Own", (kind,), methods)


def same(stock: Any, ours: Any) -> bool:
    if isinstance(stock, list | tuple):
        return len(stock) == len(ours) and all(same(a, b) for a, b in zip(stock, ours, strict=True))
    if isinstance(stock, float):
        return ours == pytest.approx(stock, rel=2e-4, abs=1e-7, nan_ok=True)
    return stock == ours


# ------------------------------------------------------------------------------------------------------------ judgement


def outcome(one: Behaviour, kind: Any, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return one.run(kind, str(folder))


def check(one: Behaviour, folder: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    if one.refused is not None:
        with pytest.raises(HeteroError, match=re.escape(one.refused)):
            outcome(one, Here, folder / "ours")
        return
    stock, ours = outcome(one, Trainer, folder / "stock"), outcome(one, Here, folder / "ours")
    assert same(stock, ours), f"Trainer: {stock}\nHeteroTrainer: {ours}"
