"""`StepProgressCallback` shows how far training is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.plan import StepReport
from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.progress import say, shows_bars

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
MOST_DEGREES = 28
"""Letters of a step's degrees beside the bar."""
STEPS_OF_SPEED = 20
"""Last steps whose tokens a second are shown."""
EVERY_S = 60.0
"""Between two lines about the progress, where there is no terminal."""


class StepProgressCallback(ProgressCallback, StepReportCallback):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`StepProgressCallback` takes the place of `ProgressCallback`: its bar also has tokens a second and degrees.

    Logs are written above the bar, in lines that fit the terminal. Where the output is no terminal there is no bar:
    logs look as `ProgressCallback` writes them, and a line every minute says how far training is.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        super().__init__(max_str_len)
        self._steps: deque[tuple[int, float]] = deque(maxlen=STEPS_OF_SPEED)
        self._degrees = ""
        self._began_s = self._said_s = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a bar, where there can be one."""
        self._steps.clear()
        self._degrees, self.current_step, self._first_step = "", state.global_step, state.global_step
        self._began_s = self._said_s = time.monotonic()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=BAR,
                disable=not shows_bars(),
            )

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Note the speed and the degrees of a step for the bar."""
        self._steps.append((report.num_tokens, report.seconds + report.wait_s))
        self._degrees = textwrap.shorten(describe_degrees(report.plan), MOST_DEGREES, placeholder=" ...")
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(self._speed(), refresh=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; elsewhere, say once in a while how far training is."""
        super().on_step_end(args, state, control, **kwargs)
        now = time.monotonic()
        if state.is_world_process_zero and not shows_bars() and now - self._said_s >= EVERY_S:
            self._said_s = now
            left_s = (now - self._began_s) * (state.max_steps - state.global_step)
            left = tqdm.format_interval(left_s / max(state.global_step - self._first_step, 1))
            say(f"step {state.global_step:,} of {state.max_steps:,}, {left} left, {self._speed()}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar of an evaluation, where there can be one."""
        if shows_bars():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a log: in lines for people above the bar, elsewhere as `ProgressCallback` does."""
        if not shows_bars():
            super().on_log(args, state, control, logs, **kwargs)
        elif state.is_world_process_zero and self.training_bar is not None and logs:
            width = shutil.get_terminal_size().columns
            say(log_lines(logs, state.global_step, state.max_steps, width))

    def close(self) -> None:
        """Leave the bar as it is, wherever a run has ended; what is written next begins a line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _speed(self) -> str:
        """Say tokens a second over the last steps, and the degrees of the last."""
        tokens, seconds = sum(n for n, _ in self._steps), sum(s for _, s in self._steps)
        return f"{tokens / seconds if seconds > 0 else 0:,.0f} tokens/s, {self._degrees}"


def log_lines(logs: Mapping[str, Any], step: int, num_steps: int, width: int) -> str:
    """Write a log for people, in lines of at most so many letters: those of training first, then of planned steps."""
    shown = {name: value for name, value in logs.items() if name != "total_flos"}
    own = {name.removeprefix("hetero/"): value for name, value in shown.items() if name.startswith("hetero/")}
    others = {name: value for name, value in shown.items() if not name.startswith("hetero/")}
    head = f"step {step:,} of {num_steps:,}"
    lines: list[str] = []
    for first, values in ((f"{head}   ", others), ("   ", own)):
        # a name stays with its value: blanks within are no places to break at
        words = "   ".join(f"{name}\0{_number(value)}" for name, value in values.items())
        if words:
            lines += textwrap.wrap(first + words, max(width - 1, 20), subsequent_indent="   ", break_long_words=False)
    return "\n".join(lines).replace("\0", " ")


def _number(value: Any) -> str:
    """Write a number shortly; other values as they are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
