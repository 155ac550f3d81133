"""What a person sees while training runs: whole lines, one bar below them, and no bar where there is no terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import arguments, tiny_model
from screens import on_a_terminal, screen
from transformers import ProgressCallback, Trainer

from hf_hetero import HeteroTrainer
from hf_hetero.callbacks import StepProgressCallback
from hf_hetero.callbacks.progress import log_lines

NUM_STEPS = 12
CODE = f"""
import sys, time
from types import SimpleNamespace
from hf_hetero.callbacks import PlanMetricsCallback, StepProgressCallback
from hf_hetero.callbacks import progress
from hf_hetero.plan import Group, MicroBatch, Plan, StepReport

progress.EVERY_S = float(sys.argv[1])
plan = Plan(2, (MicroBatch((Group((0, 1), (1,)),)), MicroBatch((Group((0,), (0,)), Group((1,), (2,))))), seconds=1.5)
args = SimpleNamespace(output_dir=".")
state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps={NUM_STEPS})
callbacks = [StepProgressCallback(), PlanMetricsCallback(lines=True)]

def tell(event, *values, **others):
    for callback in callbacks:
        getattr(callback, event)(args, state, *values, **others)

tell("on_train_begin", None)
for step in range(1, {NUM_STEPS} + 1):
    tell("on_step_report", StepReport(step, plan, (100, 800, 100), 900, 2.0, ((1.0, 1.0), (1.0, 0.5)), 0.0))
    state.global_step = step
    tell("on_step_end", None)
    time.sleep(0.11)  # the bar is redrawn at most ten times a second
    if step % 5 == 0:
        tell("on_log", None, logs={{"loss": 1.25, "learning_rate": 2e-5, "hetero/tokens_per_s": 500.0, "epoch": 0.5}})
    if step == {NUM_STEPS} - 2 and len(sys.argv) > 2:
        sys.exit()  # as one sees it in the middle of the run
tell("on_train_end", None)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("columns", [160, 60])
def test_lines_stand_above_one_bar(columns: int) -> None:
    """After each update the screen has a whole line for each step, in order, and below them one bar, not more."""
    written = on_a_terminal(CODE, columns, environment(), ["60", "stop"])
    seen = screen(written, columns)
    words = " ".join(line.strip() for line in seen)
    steps = NUM_STEPS - 2
    for step in range(1, steps + 1):
        # wide enough, a line is one line; in a narrow terminal it goes on in the next
        whole = [line for line in seen if line.startswith(f"step {step:>4}  [2] [1x2]")]
        assert len(whole) == 1, seen
    at = [seen.index(next(line for line in seen if line.startswith(f"step {step:>4}"))) for step in range(1, steps + 1)]
    assert at == sorted(at)
    bars = [line for line in seen if "%|" in line]
    assert len(bars) == 1, seen
    assert bars == [line for line in seen if line][-1:], "the bar is what stands lowest"
    assert f"{steps}/{NUM_STEPS} steps" in bars[0]
    if columns == 160:
        assert "500 tokens/s, [2] [1x2]" in bars[0]
        assert all("tokens/s  idle  12%" in line for line in seen if line.startswith("step    "))
    assert words.count("loss 1.25") == 2
    assert "{'loss'" not in words
    assert all(len(line) <= columns for line in seen)


def test_interleaving_would_be_seen() -> None:
    """A line that is printed without clearing the bar leaves rests of it, which the test above refuses."""
    code = CODE.replace('tell("on_step_end", None)', "tell(\"on_step_end\", None); print('step', step, flush=True)")
    seen = screen(on_a_terminal(code, 160, environment(), ["60", "stop"]), 160)
    assert [line for line in seen if "%|" in line and line != [line for line in seen if line][-1]]


def test_the_end_of_a_run_stays_on_the_screen() -> None:
    """The last bar is full and followed by the summary, each in its own lines."""
    seen = [line for line in screen(on_a_terminal(CODE, 160, environment(), ["60"]), 160) if line]
    (bar,) = [place for place, line in enumerate(seen) if "%|" in line]
    assert "100%|" in seen[bar]
    assert f"{NUM_STEPS}/{NUM_STEPS} steps" in seen[bar]
    assert seen[bar + 1].startswith(f"{NUM_STEPS} steps, {3 * NUM_STEPS} samples, ")


@pytest.mark.parametrize("every_s", ["0", "60"])
def test_without_a_terminal_there_are_lines_only(every_s: str) -> None:
    """In a file or a pipe nothing is redrawn; logs are as `ProgressCallback` writes them; a line may say how far."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, every_s], capture_output=True, text=True, env=environment(), check=True
    )
    assert "\r" not in done.stdout + done.stderr
    assert "%|" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step    ") or line.startswith("step   1") for line in lines) == NUM_STEPS
    assert lines.count("{'loss': '1.25', 'learning_rate': '2e-05', 'hetero/tokens_per_s': '500', 'epoch': '0.5'}") == 2
    far = [line for line in lines if " left, " in line]
    assert len(far) == (NUM_STEPS if every_s == "0" else 0)
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
