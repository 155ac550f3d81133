"""A run refits an estimate by default, and what it has learned of its machine survives an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model
from transformers import TrainerCallback

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import CalibrationCallback
from hf_hetero.callbacks.refitting import scaled
from hf_hetero.trainer.checkpoints.checkpoint import RUN_FILE

NUM_STEPS = 12


def a_machine(**changes: Any) -> CostModel:
    """A machine on which 2 ranks gain by sharing the longest samples only, and exchanges are dear."""
    cost = CostModel(
        1e-5, 1e-4, 1e-3, 100, {2: 1e6}, 10, 100, 1100, all_to_all_latency_s={2: 1e-3}, provenance="estimated"
    )
    return replace(cost, **changes)


class OfAnotherMachine(CalibrationCallback):
    """It measures, to the bit the same in each run, what a machine would take whose parts are all wrongly known."""

    def __init__(self, truth: CostModel, every_steps: int) -> None:
        super().__init__(skip_steps=1, every_steps=every_steps, first_steps=every_steps - 1)
        self.truth = truth
        self.plans: list[Any] = []

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        self.plans.append((report.step, report.plan.to_dict()["micro_batches"]))
        busy = [[0.0] * report.plan.num_ranks for _ in report.plan.micro_batches]
        for seconds, micro_batch in zip(busy, report.plan.micro_batches, strict=True):
            for group in micro_batch.groups:
                for rank in group.ranks:
                    # it becomes slower all the time, so that each refit is another
                    seconds[rank] = self.truth.group_seconds(group, report.lengths) * (1 + report.step)
        super().on_step_report(args, state, replace(report, busy_s=tuple(map(tuple, busy))))


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(folder: str, cost_file: str, stop_at: int | None, resume: str | None, every_steps: int = 3) -> dict[str, Any]:
    model = tiny_model()
    watch = OfAnotherMachine(scaled(a_machine(), np.array([30.0, 0.5, 0.01, 0.2])), every_steps)
    options: dict[str, Any] = {"max_steps": NUM_STEPS, "optim": "adamw_torch"}
    if stop_at is not None:
        options |= {"save_strategy": "steps", "save_steps": 1000}
    trainer = HeteroTrainer(
        model=model,
        args=arguments(folder, torch.distributed.get_world_size(), 8, **options),
        train_dataset=samples(LENGTHS),
        callbacks=[watch, StopAt(stop_at)],
        hetero=HeteroConfig(cost_model=cost_file, solver="fast", plan_ahead_steps=3),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.cost_model is not None
    return {
        "plans": watch.plans,
        "cost": trainer.cost_model.to_dict(),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def checked(tmp_path: Path, stop_at: int) -> tuple[Any, Any, Any]:
    """A whole run, and two parts of the same run."""
    cost_file = str(tmp_path / "cost.json")
    a_machine().save(cost_file)
    whole = run_ranks(run, 2, str(tmp_path / "whole"), cost_file, None, None)
    first = run_ranks(run, 2, str(tmp_path / "parts"), cost_file, stop_at, None)
    checkpoint = str(tmp_path / "parts" / f"checkpoint-{stop_at}")
    rest = run_ranks(run, 2, str(tmp_path / "parts"), cost_file, None, checkpoint)
    return whole, first, rest


@pytest.mark.parametrize(
    "stop_at", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 7]
)
def test_a_resumed_run_refits_as_the_whole_one(tmp_path: Path, stop_at: int) -> None:
    """Stopped before, at or after a refit: the same plans, refits, losses and weights, to the bit."""
    whole, first, rest = checked(tmp_path, stop_at)
    assert first[0]["plans"] + rest[0]["plans"] == whole[0]["plans"]
    assert rest[0]["cost"] == whole[0]["cost"] != first[0]["cost"]
    assert rest[0]["losses"] == whole[0]["losses"]
    for rank in range(2):
        assert all(torch.equal(rest[rank]["weights"][n], w) for n, w in whole[rank]["weights"].items())


@pytest.mark.slow
def test_without_what_is_kept_it_would_refit_otherwise(tmp_path: Path) -> None:
    """A negative control: without what a checkpoint keeps for it, the next refit is another; and refits move plans."""
    cost_file = str(tmp_path / "cost.json")
    whole, *_ = checked(tmp_path, 7)
    checkpoint = tmp_path / "parts" / "checkpoint-7"
    kept = json.loads((checkpoint / RUN_FILE).read_text())
    assert kept.pop("calibration")["measured"]
    (checkpoint / RUN_FILE).write_text(json.dumps(kept))
    rest = run_ranks(run, 2, str(tmp_path / "parts"), cost_file, None, str(checkpoint))
    assert rest[0]["cost"] != whole[0]["cost"]
    never = run_ranks(run, 2, str(tmp_path / "never"), cost_file, None, None, 1000)
    assert never[0]["plans"] != whole[0]["plans"]


CASES = [  # provenance of the user's file, settings, a callback of the user's, how many there are then
    (None, {}, False, 1),
    (None, {}, True, 1),
    (None, {"calibrate": False}, False, 0),
    ("estimated", {}, False, 1),
    ("measured", {}, False, 0),
    ("", {}, False, 0),
    ("measured", {"calibrate": True}, False, 1),
    (None, {"full_determinism": True}, False, 0),
    (None, {"full_determinism": True, "calibrate": True}, False, 1),
]


def numbers_of_callbacks(folder: str) -> list[int]:
    found: list[int] = []
    for provenance, settings, own, _ in CASES:
        config = dict(settings)
        determinism = config.pop("full_determinism", False)
        if provenance is not None:
            config["cost_model"] = f"{folder}/cost.json"
            a_machine(provenance=provenance or None).save(config["cost_model"])
        trainer = HeteroTrainer(
            tiny_model(),
            arguments(folder, 1, max_steps=1, full_determinism=determinism),
            train_dataset=samples(LENGTHS),
            callbacks=[CalibrationCallback()] if own else [],
            hetero=HeteroConfig(**config),
        )
        trainer.train()
        found.append(sum(isinstance(callback, CalibrationCallback) for callback in trainer.callback_handler.callbacks))
    return found


def test_an_estimate_is_refitted(tmp_path: Path) -> None:
    """By default only an estimate, once, where runs need not be alike; never or always where the user says so."""
    assert run_ranks(numbers_of_callbacks, 1, str(tmp_path)) == [[expected for *_, expected in CASES]]
