"""This module times and weighs groups as training computes them: a trainer of random tokens, planned as the trials.

A first round over all trials warms up, in a second one their memory is weighed, and those that follow are timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks import StepReportCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan, StepReport
from hf_hetero.profile.fitting import Measured
from hf_hetero.profile.peaks import states_of, weighed
from hf_hetero.profile.trials import TrialStep
from hf_hetero.trainer import HeteroTrainerMixin

UNTIMED_ROUNDS = 2
"""The first rounds: one that warms up, and one that is weighed."""
LEAST_ROUNDS = 3
"""Every trial is timed so often at least."""
Rows = list[dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Script:
    """A `Script` is a source of plans: those of the trials."""

    steps: dict[tuple[int, ...], TrialStep]

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Return the plan of the step that has these samples."""
        return self.steps[tuple(sorted(lengths))].plan(lengths)

    static = plan

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """Return the plan as it is."""
        return plan


class WeighingTrainer(Trainer):
    """`WeighingTrainer` weighs each micro-batch while it is told to; `peaks` are the bytes, one after the other."""

    is_weighing = False
    peaks: list[int]

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward of a micro-batch, weighed or not."""
        if not self.is_weighing:
            return super().training_step(model, inputs, num_items_in_batch)
        assert self.model is not None
        with weighed(states_of(self.model, self.optimizer), self.args.device) as peak:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.peaks += peak
        return loss


class ScriptedTrainer(HeteroTrainerMixin, WeighingTrainer):
    """`ScriptedTrainer` takes its plans from a script."""

    script: Script

    def _plan_source(self) -> PlanSource:
        return self.script


class Stopwatch(StepReportCallback):
    """`Stopwatch` keeps what was measured, and ends training when the time is over and each trial was timed enough.

    Args:
        trainer: told when to weigh.
        seconds: to time for, after the first rounds.
        tick: told how many seconds each step took, on the first rank.
    """

    def __init__(self, trainer: ScriptedTrainer, seconds: float, tick: Callable[[float], None]) -> None:
        self._trainer, self._num_steps = trainer, len(trainer.script.steps)
        self._seconds, self._tick = seconds, tick
        self._start = self._last = time.perf_counter()
        self.reports: list[StepReport] = []
        self.is_done = False

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Keep the report."""
        self.reports.append(report)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after a whole round; the ranks join what any of them decides."""
        now = time.perf_counter()
        rounds, rest = divmod(state.global_step, self._num_steps)
        self._trainer.is_weighing = rounds == 1
        if state.global_step <= UNTIMED_ROUNDS * self._num_steps:
            self._start = now
        elif state.is_world_process_zero:
            self._tick(now - self._last)
        self._last = now
        if not rest and rounds >= UNTIMED_ROUNDS + LEAST_ROUNDS and now - self._start >= self._seconds:
            self.is_done = control.should_training_stop = True


def trainer_for(
    model: Any, arguments: dict[str, Any], hetero: dict[str, Any], steps: Sequence[TrialStep], vocab_size: int
) -> ScriptedTrainer:
    """Make a trainer of random tokens whose steps are the trials, in order, again and again.

    Args:
        model: to time; it is trained.
        arguments, hetero: fields of `TrainingArguments`, with its `output_dir`, and of `HeteroConfig`.
        steps: of a round.
        vocab_size: of the model.

    Raises:
        HeteroError: the model, or a setting, is refused.
    """
    num_ranks, num_samples = steps[0].num_ranks, len(steps[0].lengths())
    lengths = [length for step in steps for length in step.lengths()]
    tokens = torch.randint(0, vocab_size, (max(lengths),), generator=torch.Generator().manual_seed(0))
    rows: Rows = [{"input_ids": tokens[:length]} for length in lengths]
    options: dict[str, Any] = {
        "learning_rate": 0.0,  # random tokens teach nothing, and weights that grow might compute slower
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "max_steps": 1_000_000,
        "per_device_train_batch_size": num_samples // num_ranks,
        "train_sampling_strategy": "sequential",
    }
    ours: dict[str, Any] = {**hetero, "calibrate": False, "solver": "fast"}
    settings = HeteroConfig(**ours)
    trainer = ScriptedTrainer(
        model, TrainingArguments(**options), train_dataset=rows, data_collator=PackedCollator(), hetero=settings
    )
    trainer.remove_callback(PrinterCallback)  # which says how long it took
    trainer.script = Script({tuple(sorted(step.lengths())): step for step in steps})
    return trainer


def timed(trainer: ScriptedTrainer, num_layers: int, seconds: float, tick: Callable[[float], None]) -> list[Measured]:
    """Time the trials of a trainer for about so many seconds; return the medians. A collective of all ranks.

    Raises:
        HeteroError: training ended before each trial was timed often enough.
    """
    steps = list(trainer.script.steps.values())
    watch = Stopwatch(trainer, seconds, tick)
    trainer.add_callback(watch)
    trainer.peaks = []
    trainer.train()
    if len(watch.reports) < (UNTIMED_ROUNDS + LEAST_ROUNDS) * len(steps):
        raise HeteroError("Timing was ended before each group was timed often enough. Nothing is written.")
    timed_reports, peaks = watch.reports[UNTIMED_ROUNDS * len(steps) :], iter(trainer.peaks)
    found: list[Measured] = []
    for index, step in enumerate(steps):
        reports = timed_reports[index :: len(steps)]
        for number, trial in enumerate(step.trials):
            middle_s = median(_seconds_of(report, number) for report in reports)
            found.append(Measured(trial, num_layers, middle_s, next(peaks)))
        next(peaks)  # of the samples that fill the step up
    return found


def _seconds_of(report: StepReport, number: int) -> float:
    """Return the seconds of a micro-batch whose groups all hold the same."""
    busy_s = report.busy_s[number]
    # whoever comes last to its group's first exchange waits for nobody
    return median(min(busy_s[rank] for rank in group.ranks) for group in report.plan.micro_batches[number].groups)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for what a trainer might write."""
    return tempfile.TemporaryDirectory(prefix="hf-hetero-profile-")
