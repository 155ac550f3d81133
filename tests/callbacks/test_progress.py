"""What a person sees while training runs: whole lines, one bar below them, and no bar where there is no terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import arguments, run_program, tiny_model
from screens import on_a_terminal, screen
from transformers import ProgressCallback, Trainer, TrainerCallback

from hf_hetero import HeteroTrainer
from hf_hetero.callbacks import StepProgressCallback, progress
from hf_hetero.callbacks.progress import log_lines

NUM_STEPS = 12
STEPS_SEEN = 10  # in the middle of a run
CODE = f"""
import fcntl, struct, sys, termios, time
from types import SimpleNamespace
from hf_hetero.callbacks import PlanMetricsCallback, StepProgressCallback, progress
from hf_hetero.plan import Group, MicroBatch, Plan, StepReport

plan = Plan(2, (MicroBatch((Group((0, 1), (1,)),)), MicroBatch((Group((0,), (0,)), Group((1,), (2,))))), seconds=1.5)
args = SimpleNamespace(output_dir=".")

def run(steps, columns=None, every_s=60, cares=True):
    if columns:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    progress.EVERY_S = every_s
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps={NUM_STEPS})
    callbacks = [StepProgressCallback(), PlanMetricsCallback(lines=True)]

    def tell(event, *values, **others):
        for callback in callbacks:
            getattr(callback, event)(args, state, *values, **others)

    tell("on_train_begin", None)
    for step in range(1, steps + 1):
        tell("on_step_report", StepReport(step, plan, (100, 800, 100), 900, 2.0, ((1.0, 1.0), (1.0, 0.5)), 0.0))
        state.global_step = step
        tell("on_step_end", None)
        time.sleep(0.11)  # the bar is redrawn at most ten times a second
        if not cares:
            print("a line of", step, flush=True)
        if step % 5 == 0:
            logs = {{"loss": 1.25, "learning_rate": 2e-5, "hetero/tokens_per_s": 500.0, "epoch": 0.5}}
            tell("on_log", None, logs=logs)
    if steps == {NUM_STEPS}:
        tell("on_train_end", None)
    callbacks[0].close()
    print("=" * 20, flush=True)

"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}


def parts(lines: list[str]) -> list[list[str]]:
    """Lines of each run, without empty ones."""
    found: list[list[str]] = [[]]
    for line in filter(None, lines):
        if line == "=" * 20:
            found.append([])
        else:
            found[-1].append(line)
    return found[:-1]


@pytest.fixture(scope="module")
def screens() -> dict[str, list[str]]:
    """What is seen of runs: in a wide and in a narrow terminal, at the end, and where lines do not care for the bar."""
    wide = f"run({STEPS_SEEN}, 160); run({NUM_STEPS}, 160); run({STEPS_SEEN}, 160, cares=False)\n"
    written, narrow, _ = on_a_terminal(
        CODE + wide + f"print('#'); run({STEPS_SEEN}, 60); print('#')", 160, environment()
    ).split("#")
    found = dict(zip(("wide", "end", "careless"), parts(screen(written, 160)), strict=True))
    return {**found, "narrow": parts(screen(narrow.lstrip(), 60))[0]}


@pytest.mark.parametrize(("name", "columns"), [("wide", 160), ("narrow", 60)])
def test_lines_stand_above_one_bar(screens: dict[str, list[str]], name: str, columns: int) -> None:
    """After each update the screen has a whole line for each step, in order, and below them one bar, not more."""
    seen = screens[name]
    # wide enough, a line is one line; in a narrow terminal it goes on in the next
    starts = [line[:22] for line in seen if line.startswith("step  ")]
    assert starts == [f"step {step:>4}  [2] [1x2]  "[:22] for step in range(1, STEPS_SEEN + 1)]
    bars = [line for line in seen if "%|" in line]
    assert bars == seen[-1:], "one, and it stands lowest"
    assert f"{STEPS_SEEN}/{NUM_STEPS} steps" in bars[0]
    words = " ".join(seen)
    assert words.count("loss 1.25") == 2
    assert "{'loss'" not in words
    assert all(len(line) <= columns for line in seen)
    if name == "wide":
        assert "500 tokens/s, [2] [1x2]" in bars[0]
        assert all("500 tokens/s  idle  12%" in line for line in seen if line.startswith("step  "))


def test_interleaving_would_be_seen(screens: dict[str, list[str]]) -> None:
    """A line that is printed without care for the bar leaves rests of it, which the test above refuses."""
    assert [line for line in screens["careless"][:-1] if "%|" in line]


def test_the_end_of_a_run_stays_on_the_screen(screens: dict[str, list[str]]) -> None:
    """The last bar is full and followed by the summary, each in its own lines."""
    seen = screens["end"]
    (bar,) = [place for place, line in enumerate(seen) if "%|" in line]
    assert "100%|" in seen[bar]
    assert f"{NUM_STEPS}/{NUM_STEPS} steps" in seen[bar]
    assert seen[bar + 1].startswith(f"{NUM_STEPS} steps, {3 * NUM_STEPS} samples, ")


def test_without_a_terminal_there_are_lines_only(tmp_path: Path) -> None:
    """In a file or a pipe nothing is redrawn; logs are as `ProgressCallback` writes them; a line may say how far."""
    script = tmp_path / "runs.py"
    script.write_text(f"{CODE}run({NUM_STEPS}); run({NUM_STEPS}, every_s=0)", encoding="utf-8")
    status, written = run_program(script)
    assert status == 0, written
    assert "\r" not in written
    assert "%|" not in written
    for lines, num_far in zip(parts(written.splitlines()), (0, NUM_STEPS), strict=True):
        assert sum(line.startswith("step  ") for line in lines) == NUM_STEPS
        log = "{'loss': '1.25', 'learning_rate': '2e-05', 'hetero/tokens_per_s': '500', 'epoch': '0.5'}"
        assert lines.count(log) == 2
        far = [line for line in lines if " left, " in line]
        assert len(far) == num_far
        assert all("500 tokens/s, [2] [1x2]" in line for line in far)


def test_a_log_fits_the_terminal() -> None:
    """Each name stays with its value, in lines no longer than the terminal; what concerns plans comes last."""
    logs = {"loss": 5.2771, "total_flos": 1e15, "hetero/tokens_per_s": 12148.3, "learning_rate": 3.8e-5, "words": "a b"}
    lines = log_lines({**logs, **{f"name_{k}": float(k) for k in range(20)}}, 40, 1200, 60).split("\n")
    assert lines[0].startswith("step 40 of 1,200   loss 5.277   learning_rate 3.8e-05")
    assert all(len(line) <= 60 for line in lines)
    assert lines[-1] == "   tokens_per_s 12,148"
    assert "name_19 19" in " ".join(lines)
    assert "total_flos" not in " ".join(lines)


class Own(ProgressCallback):
    """A user's own bar."""


@pytest.mark.parametrize("is_shown", [True, False])
def test_the_bar_takes_the_place_of_trainers(is_shown: bool, tmp_path: Path) -> None:
    """Where `Trainer` has its bar, stands ours, once; a user's own stays; without bars there is none."""
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    args = arguments(str(tmp_path), 1, 1, disable_tqdm=not is_shown)
    trainer = HeteroTrainer(model=tiny_model("llama"), args=args, train_dataset=data, callbacks=[Own()])
    stock = Trainer(model=tiny_model("llama"), args=args, train_dataset=data, callbacks=[Own()])
    ours, theirs = (
        [type(callback) for callback in one.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
        for one in (trainer, stock)
    )
    assert theirs == [Own, ProgressCallback][: 1 + is_shown]
    assert ours == [Own, StepProgressCallback][: 1 + is_shown]
    trainer.remove_callback(StepProgressCallback if is_shown else Own)


class Failing(TrainerCallback):
    """It fails in the middle of the run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("in the middle")


def test_a_run_that_fails_leaves_no_bar_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said about the failure begins a line of its own, below the bar as it was."""
    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    args = arguments(str(tmp_path), 1, 1, disable_tqdm=False)
    trainer = HeteroTrainer(model=tiny_model("llama"), args=args, train_dataset=data, callbacks=[Failing()])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    bar = capsys.readouterr().err
    assert bar.endswith("\n")
    assert "/4 steps" in bar.rstrip("\n").rpartition("\r")[2]
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, StepProgressCallback)]
    assert callback.training_bar is None
