"""`PlanMetricsCallback` writes a readable line a step, numbers for the trainer's log, a file of plans, a summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_hetero.callbacks.plan_numbers import PlanNumbers
from hf_hetero.callbacks.recording import append, describe_run, numbers_of, record_path, write_object
from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.callbacks.stragglers import Stragglers, alert
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport
from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.progress import say

logger = logging.getLogger(__name__)

LATE_S = 0.1  # a shorter wait is not worth a word


class PlanMetricsCallback(StepReportCallback):
    """`PlanMetricsCallback` says what each step did: its degrees, planned and measured seconds, speed, idle share.

    Args:
        lines: print a line a step on rank 0.
        record: keep each step's lengths, plan and times in `plans.jsonl` under the output folder; beside it what the
            run is (`run.json`), and what it logs (`logs.jsonl`), for its report.
    """

    def __init__(self, lines: bool = False, record: bool = False) -> None:
        self._lines, self._record = lines, record
        self._since_log, self._totals = _Totals(), _Totals()
        self._numbers, self._stragglers = PlanNumbers(), Stragglers()
        self._is_incomplete = False
        self._planned_by: tuple[HeteroConfig, CostModel] | None = None
        self._run: dict[str, Any] = {}

    def on_cost_model(
        self, args: TrainingArguments, state: TrainerState, hetero: HeteroConfig, cost_model: CostModel
    ) -> None:
        """Note what plans are made by; a refit is written down at once, for a report of the run so far."""
        self._planned_by = hetero, cost_model
        if self._run:
            self._note(args, state, cost_model=cost_model.to_dict())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new record, unless a checkpoint is resumed."""
        self._since_log, self._totals = _Totals(), _Totals()
        self._numbers, self._stragglers = PlanNumbers(), Stragglers()
        self._is_incomplete = False
        # a resumed run adds to its record; of a step that was trained twice, `read_records` takes the last
        if self._record and state.is_world_process_zero and state.global_step == 0:
            for name in ("plans.jsonl", "logs.jsonl"):
                self._without_failing(record_path(args, name).unlink, missing_ok=True)
        if self._record:
            hetero, cost = self._planned_by or (None, None)
            self._run = {}
            self._note(args, state, **describe_run(args, kwargs.get("model"), state.max_steps, hetero, cost))

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        """Print, record, and count for the next log."""
        self._since_log.add(report)
        self._totals.add(report)
        self._numbers.add(report)
        self._stragglers.add(report)
        if not state.is_world_process_zero:
            return
        if words := self._stragglers.words():
            alert(args, words)
        if self._lines:
            say(step_line(report))
        if self._record:
            self._without_failing(append, record_path(args), json.dumps(to_record(report)))

    def metrics(self) -> dict[str, float]:
        """Return means over the steps since the last log, under `hetero/`."""
        totals, self._since_log = self._since_log, _Totals()
        if not totals.num_steps:
            return {}
        slowdowns = self._stragglers.slowdowns()
        of_slowest = {"hetero/slowest_rank": max(slowdowns)} if slowdowns else {}
        return {**totals.means(), **self._numbers.take(), **of_slowest}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what the run did as a whole."""
        if self._lines and state.is_world_process_zero and self._totals.num_steps:
            say(self._totals.summary())
        if self._run:
            self._note(args, state, has_ended=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the numbers that are logged."""
        if self._record and logs and state.is_world_process_zero:
            line = json.dumps(numbers_of(logs, state.global_step))
            self._without_failing(append, record_path(args, "logs.jsonl"), line)

    def _note(self, args: TrainingArguments, state: TrainerState, **facts: Any) -> None:
        """Write down, on rank 0, what the run is, with these facts changed."""
        self._run |= facts
        if state.is_world_process_zero:
            self._without_failing(write_object, record_path(args, "run.json"), self._run)

    def _without_failing(self, write: Callable[..., object], *values: Any, **options: Any) -> None:
        """Write, and say once if that fails: a missing record costs a picture, and is no reason to end a run."""
        try:
            write(*values, **options)
        except OSError as error:
            if not self._is_incomplete:
                logger.warning("Steps are missing from the record of plans, because it cannot be written: %s.", error)
            self._is_incomplete = True


def step_line(report: StepReport) -> str:
    """Say one step in one line, and whether its plan was late."""
    late = f"  waited {report.plan_wait_s:.2f} s for its plan" if report.plan_wait_s >= LATE_S else ""
    late += f"  ran out of memory, planned anew {report.repeats}x" if report.repeats else ""
    idle = "" if report.idle_share is None else f"  idle {report.idle_share:4.0%}"
    return (
        f"step {report.step:>4}  {describe_degrees(report.plan):<28}  planned {report.plan.seconds:7.3f} s  "
        f"measured {report.seconds:7.3f} s  {report.tokens_per_s:9,.0f} tokens/s{idle}{late}"
    )


def to_record(report: StepReport) -> dict[str, Any]:
    """Return a step as one JSON object, which `hf_hetero.report.read_records` reads."""
    return {
        "step": report.step,
        "lengths": list(report.lengths),
        "plan": report.plan.to_dict(),
        "seconds": report.seconds,
        "busy_s": [list(ranks) for ranks in report.busy_s],
        "wait_s": report.wait_s,
        "is_lockstep": report.is_lockstep,
        "peak_bytes": report.peak_bytes,
        **({"planned_lengths": list(report.as_text)} if report.as_text else {}),
    }


class _Totals:
    """`_Totals` sum over steps: reports are not kept, because a run may never log."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = self.num_micro_batches = self.num_idle = self.num_loads = 0
        self.num_routed = 0
        self.flops = self.peak_flop = 0.0
        self.seconds = self.planned_s = self.planning_s = self.wait_s = self.idle_share = 0.0
        self.load = self.worst_load = self.router_loss = 0.0
        self.num_repeats = self.unused_bytes = 0
        self.is_lockstep = False
        self.degrees: dict[int, int] = {}

    def add(self, report: StepReport) -> None:
        """Count one step."""
        self.num_steps += 1
        self.num_tokens += report.num_tokens
        self.num_micro_batches += len(report.plan.micro_batches)
        self.seconds += report.seconds + report.wait_s
        self.planned_s += report.plan.seconds
        self.planning_s += report.plan.planning_s
        self.wait_s += report.wait_s
        self.num_idle += report.idle_share is not None  # under sharded weights nobody can tell it
        self.idle_share += report.idle_share or 0.0
        self.num_loads += len(report.expert_load)
        self.load += sum(report.expert_load)
        self.worst_load = max((self.worst_load, *report.expert_load))
        if report.mfu is not None:
            self.flops += report.flops
            self.peak_flop += report.flops / report.mfu  # what the cards could have computed meanwhile
        self.num_routed += report.router_loss is not None
        self.router_loss += report.router_loss or 0.0
        self.is_lockstep = report.is_lockstep
        self.num_repeats += report.repeats
        self.unused_bytes = max(self.unused_bytes, report.unused_bytes)
        for group in report.plan.groups:
            self.degrees[group.degree] = self.degrees.get(group.degree, 0) + len(group.samples)

    def means(self) -> dict[str, float]:
        """Return means over the steps, and none of what no step measured."""
        means = {
            "hetero/tokens_per_s": self.num_tokens / self.seconds if self.seconds > 0 else 0.0,
            "hetero/step_s": self.seconds / self.num_steps,
            "hetero/planned_s": self.planned_s / self.num_steps,
            "hetero/micro_batches": self.num_micro_batches / self.num_steps,
            "hetero/wait_s": self.wait_s / self.num_steps,
        }
        if self.num_idle:
            means["hetero/idle_share"] = self.idle_share / self.num_idle
        if self.num_loads:
            means |= {"hetero/expert_load": self.load / self.num_loads, "hetero/expert_load_worst": self.worst_load}
        if self.peak_flop:
            means["hetero/mfu"] = self.flops / self.peak_flop
        if self.num_routed:
            means["hetero/router_loss"] = self.router_loss / self.num_routed
        if self.unused_bytes:
            means["hetero/unused_gib"] = self.unused_bytes / 2**30
        if self.num_repeats:
            means["hetero/repeats"] = float(self.num_repeats)
        return means

    def summary(self) -> str:
        """Say what the run did as a whole, in three lines."""
        samples = sum(self.degrees.values())
        shares = ", ".join(f"{self.degrees[d] / samples:.0%} at degree {d}" for d in sorted(self.degrees))
        idle = "" if self.is_lockstep else f"idle {self.idle_share / self.num_steps:.0%}, "
        return (
            f"{self.num_steps} steps, {samples:,} samples, {self.num_tokens:,} tokens in {self.seconds:.1f} s: "
            f"{self.num_tokens / self.seconds:,.0f} tokens/s\n"
            f"samples: {shares}\n"
            f"{self.num_micro_batches / self.num_steps:.1f} micro-batches a step, "
            f"{idle}"
            f"planning {1000 * self.planning_s / self.num_steps:.1f} ms a step in the background, "
            f"waited {self.wait_s:.2f} s for plans and data"
        )
