"""What a callback of one rank asks for happens on all ranks, after the same step, as if all had asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import LENGTHS, ScriptedTrainer, run_ranks, samples, tiny_model, trained
from transformers import TrainerCallback

from hf_hetero.errors import CollectiveFailed

pytestmark = pytest.mark.slow

NUM_STEPS = 4


class Asks(TrainerCallback):
    """Sets a flag on one rank, or on all, when an event comes in step 2 (or in an epoch's end)."""

    def __init__(self, event: str, flag: str, ranks: tuple[int, ...]) -> None:
        self.event, self.flag, self.ranks = event, flag, ranks
        setattr(self, event, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 2 and args.process_index in self.ranks:
            setattr(control, self.flag, True)


class Seen(TrainerCallback):
    """After which steps this rank evaluated, saved and logged."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {"evaluate": [], "save": [], "log": []}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps["evaluate"].append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps["save"].append(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.steps["log"].append(state.global_step)


def run(folder: str, event: str, flag: str, ranks: tuple[int, ...]) -> Any:
    seen = Seen()

    class WithEvaluation(ScriptedTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, eval_dataset=samples(LENGTHS[:6]))

    changes: dict[str, Any] = {"output_dir": folder, "max_steps": NUM_STEPS, "logging_steps": 2}
    if event == "on_evaluate":
        changes |= {"eval_strategy": "steps", "eval_steps": 2}
    if event == "on_save":
        changes |= {"save_strategy": "steps", "save_steps": 2}
    callbacks = [Asks(event, flag, ranks), seen]
    found = trained(tiny_model(), samples(LENGTHS), WithEvaluation, callbacks=callbacks, **changes)
    return len(found["gradients"]), seen.steps


@pytest.mark.parametrize(
    ("event", "flag", "rank"),
    [
        ("on_step_end", "should_training_stop", 0),
        ("on_step_end", "should_epoch_stop", 1),
        ("on_step_end", "should_evaluate", 1),
        ("on_log", "should_evaluate", 0),
        ("on_evaluate", "should_save", 1),
        ("on_save", "should_training_stop", 1),
        ("on_epoch_end", "should_training_stop", 0),
        ("on_pre_optimizer_step", "should_training_stop", 1),
    ],
)
def test_one_rank_asks(tmp_path: Path, event: str, flag: str, rank: int) -> None:
    """The same steps, evaluations, checkpoints and logs, on both ranks, as when both ask."""
    both = run_ranks(run, 2, str(tmp_path / "both"), event, flag, (0, 1))
    assert both[0] == both[1]
    assert run_ranks(run, 2, str(tmp_path / "one"), event, flag, (rank,), timeout_s=100) == both


class Raises(TrainerCallback):
    """On one rank."""

    def __init__(self, event: str, rank: int) -> None:
        self.rank = rank
        setattr(self, event, self.fail)

    def fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == self.rank:
            raise OSError("the tracker is gone")


def run_into(event: str, rank: int) -> None:
    trained(tiny_model(), samples(LENGTHS), callbacks=[Raises(event, rank)])


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_a_callback_that_raises_on_one_rank(event: str) -> None:
    """The others end within seconds, and know why where it can be known: word is kept by rank 0 here."""
    errors = run_ranks(run_into, 2, event, 1, expect_errors=True, timeout_s=100)  # less than the limit of the ranks
    assert isinstance(errors[0], CollectiveFailed), errors
    assert "Rank 1 had ended with OSError: the tracker is gone" in str(errors[0])
