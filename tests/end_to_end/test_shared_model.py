"""Several trainers may use one model, one after the other or in between: they learn what plain Trainers learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LENGTHS, ScriptedTrainer, arguments, largest_difference, samples, tiny_model
from transformers import Trainer, TrainerCallback

from hf_hetero.collators import PackedCollator


class InBetween(TrainerCallback):
    """Trains with another trainer after the second step."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.other.train()


def learned(trainer_class: Any, how: str, folder: str) -> dict[str, torch.Tensor]:
    """Weights after two trainers have used one model, the first of them twice."""
    model = tiny_model("qwen3-moe", "eager")
    first, second = (
        trainer_class(
            model,
            arguments(folder, 1, max_steps=3, seed=7),
            train_dataset=samples(LENGTHS, seed),
            data_collator=PackedCollator(),
        )
        for seed in (7, 8)
    )
    if how == "interleaved":
        first.add_callback(InBetween(second))
        first.train()
    else:
        for trainer in (first, second, first):
            trainer.train()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["in turn", "interleaved"])
def test_trainers_may_share_a_model(how: str, tmp_path: Path) -> None:
    """The weights are those of plain Trainers used in the same way."""
    ours, theirs = (learned(kind, how, str(tmp_path)) for kind in (ScriptedTrainer, Trainer))
    assert largest_difference(ours, theirs) < 1e-5
