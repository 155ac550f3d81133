"""Nothing is lost and nothing is seen twice: over epochs, over interruptions; and a resumed run is the same run."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ScriptedTrainer, arguments, often, run_ranks, tiny_model
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.collators import PackedCollator

NUM_SAMPLES, GLOBAL_BATCH = 22, 8  # the last batch of an epoch holds 6
ROOM = 30  # tokens a rank: less than the longest sample has, so that plans mix degrees


def tagged_data() -> list[dict[str, list[int]]]:
    """Sample i holds token 3 + i and nothing else, so a token tells which sample it is of."""
    return [{"input_ids": [3 + i] * (2 + 5 * i % 37)} for i in range(NUM_SAMPLES)]


class Watcher:
    """Counts tokens in the collator's output and in the model's input, and keeps the plans."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.collated: list[Counter[int]] = []
        self.trained: list[Counter[int]] = []
        self.plans: list[Any] = []
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, _: Any, args: Any, kwargs: Any) -> None:
        real = kwargs["attention_mask"].view(-1)
        self.trained.append(Counter(kwargs["input_ids"].view(-1)[real].tolist()))

    def collator(self) -> PackedCollator:
        watcher = self

        class Watching(PackedCollator):
            def __call__(self, batch: Any) -> Any:
                result = super().__call__(batch)
                for m in result.micro_batches:
                    real = m.inputs["attention_mask"].view(-1)
                    watcher.collated.append(Counter(m.inputs["input_ids"].view(-1)[real].tolist()))
                return result

        return Watching()


class KeepPlans(StepReportCallback):
    def __init__(self, plans: list[Any]) -> None:
        self.plans = plans

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        self.plans.append((report.step, report.plan.to_dict()["micro_batches"], report.lengths))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(folder: str, stop_at: int | None, resume: str | None, workers: int, scripted: bool) -> dict[str, Any]:
    model = tiny_model("llama")
    watcher = Watcher(model)
    options = {
        "num_train_epochs": 2,
        "max_steps": -1,
        "dataloader_num_workers": workers,
        "optim": "adamw_torch",
        "save_strategy": "no" if stop_at is None else "steps",
        "save_steps": 1000,
    }
    trainer = (ScriptedTrainer if scripted else HeteroTrainer)(
        model=model,
        args=arguments(folder, torch.distributed.get_world_size(), GLOBAL_BATCH, **options),
        train_dataset=tagged_data(),
        data_collator=watcher.collator(),
        callbacks=[KeepPlans(watcher.plans), *([StopAt(stop_at)] if stop_at else [])],
        hetero=HeteroConfig(max_tokens_per_rank=ROOM, solver="fast"),  # "auto" improves what is ready early
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "collated": sum(watcher.collated, Counter()),
        "trained": sum(watcher.trained, Counter()),
        "plans": watcher.plans,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def expected_tokens(epochs: int) -> Counter[int]:
    return Counter({sample["input_ids"][0]: epochs * len(sample["input_ids"]) for sample in tagged_data()})


@pytest.mark.parametrize("workers", [0, 2])
def test_each_token_once_an_epoch(tmp_path: Path, workers: int) -> None:
    """Over two epochs each token of each sample is collated and trained exactly twice, on one rank each time."""
    ranks = run_ranks(run, 4, str(tmp_path), None, None, workers, True)
    trained = sum((rank["trained"] for rank in ranks), Counter())
    assert trained == expected_tokens(2)
    if not workers:  # workers keep their own record
        assert sum((rank["collated"] for rank in ranks), Counter()) == expected_tokens(2)


@pytest.mark.parametrize(
    ("stop_at", "scripted", "workers"),
    often([(2, True, 0), (4, False, 2), (None, False, 0)], (4, False, 2)),
    ids=["in epoch 0", "in epoch 1", "anywhere"],
)
def test_resume_continues_the_same_run(tmp_path: Path, stop_at: int | None, scripted: bool, workers: int) -> None:
    """Stopped at any step and resumed: no token lost or repeated, the same plans, bit-equal weights and losses."""
    stop_at = stop_at or random.randint(1, 5)  # shown with the locals of a failure
    whole = run_ranks(run, 4, str(tmp_path / "whole"), None, None, workers, scripted)
    folder = str(tmp_path / "parts")
    first = run_ranks(run, 4, folder, stop_at, None, workers, scripted)
    rest = run_ranks(run, 4, folder, None, f"{folder}/checkpoint-{stop_at}", workers, scripted)
    trained = sum((rank["trained"] for rank in [*first, *rest]), Counter())
    assert trained == expected_tokens(2)
    assert first[0]["plans"] + rest[0]["plans"] == whole[0]["plans"]
    assert rest[0]["plans"][0][0] == stop_at + 1
    assert rest[0]["losses"] == whole[0]["losses"]
    for rank in range(4):
        assert all(torch.equal(rest[rank]["weights"][n], whole[rank]["weights"][n]) for n in whole[rank]["weights"])


def test_real_plans_mix_degrees(tmp_path: Path) -> None:
    """With that room, the planner itself shares some samples and not others."""
    ranks = run_ranks(run, 4, str(tmp_path), None, None, 0, False)
    degrees = {len(g["ranks"]) for _, micro_batches, _ in ranks[0]["plans"] for m in micro_batches for g in m["groups"]}
    assert len(degrees) > 1
    assert sum((rank["trained"] for rank in ranks), Counter()) == expected_tokens(2)
