"""Behaviours of a trainer, run with a stock class and with ours: the same outcome, or a refusal that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_hetero import HeteroError

Run = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Behaviour:
    """What is tried, given a trainer's class and a folder; and the words of the refusal where it cannot be equal."""

    run: Run
    refused: str | None

    @property
    def name(self) -> str:
        return self.run.__name__


class Table:
    """Behaviours, each put in by decorating its function."""

    def __init__(self) -> None:
        self.all: list[Behaviour] = []

    def __call__(self, refused: str | None = None) -> Callable[[Run], Run]:
        """Put a function into the table."""

        def add(run: Run) -> Run:
            self.all.append(Behaviour(run, refused))
            return run

        return add


def compare(one: Behaviour, stock: type, ours: type, folder: Path) -> None:
    """Run it with both classes."""
    if one.refused is not None:
        with pytest.raises(HeteroError, match=re.escape(one.refused)):
            outcome(one, ours, folder / "ours")
        return
    expected, found = outcome(one, stock, folder / "stock"), outcome(one, ours, folder / "ours")
    assert same(expected, found), f"{stock.__name__}: {expected}\n{ours.__name__}: {found}"


def outcome(one: Behaviour, kind: Any, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return one.run(kind, str(folder))


def same(stock: Any, ours: Any) -> bool:
    if isinstance(stock, dict):
        return stock.keys() == ours.keys() and all(same(value, ours[key]) for key, value in stock.items())
    if isinstance(stock, list | tuple):
        return len(stock) == len(ours) and all(same(a, b) for a, b in zip(stock, ours, strict=True))
    if isinstance(stock, float):
        return ours == pytest.approx(stock, rel=2e-4, abs=1e-7, nan_ok=True)
    return stock == ours


def learned(trainer: Any) -> list[Any]:
    """Losses, gradient norms, and weights at the end."""
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    weights = [float(p.detach().double().norm()) for p in trainer.model.parameters()]
    return [trainer.state.global_step, logs, weights]


def subclass(kind: Any, **methods: Any) -> Any:
    """A user's class over either trainer."""
    return type("Own", (kind,), methods)
