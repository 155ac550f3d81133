"""Several trainers may use one model, one after the other or in between: they learn what plain Trainers learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    arguments,
    largest_difference,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
)
from transformers import Trainer, TrainerCallback

from hf_hetero.collators import PackedCollator
from hf_hetero.model.lm_head import uninstall


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


def sharded(folder: str, gives_back: bool) -> dict[str, Any]:
    """Losses of a model that FSDP2 trains and then evaluates; its head may be given back in between."""
    shard_on_cpu()
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    model, data = tiny_model(), samples(LENGTHS)
    args = arguments(folder, 2, max_steps=2, per_device_eval_batch_size=3, **sharding)
    trainer = ScriptedTrainer(model, args, train_dataset=data, eval_dataset=data[:6])
    losses = [trainer.train().training_loss]
    if gives_back:
        uninstall(model)
    losses.append(trainer.evaluate()["eval_loss"])
    return {"losses": losses, "head": type(model.lm_head).__name__}


def test_a_sharded_head_serves_on(tmp_path: Path) -> None:
    """FSDP2 holds on to the head as it found it, and evaluates with it after it was given back."""
    kept, given_back = (run_ranks(sharded, 2, str(tmp_path), gives_back) for gives_back in (False, True))
    assert [rank["head"] for rank in given_back] == ["FSDPLeanHead"] * 2
    for rank in range(2):
        assert given_back[rank]["losses"] == pytest.approx(kept[rank]["losses"], rel=1e-6)
