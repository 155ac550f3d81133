"""What the numbers of a step cost beside the step: `python benchmarks/callbacks/measure_metrics.py`.

Plans of real shapes, for ranks that are not here: what each rank does in Python at the end of a step (prices of its own
groups, sums of the callback, a log), beside the seconds of the step as its cost model predicts them. And a small model
on one rank of this machine, with and without its loss by source, beside the seconds that its steps take. Medians.

What a static run would take is computed where plans are, in another process, before the step; its time is shown, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer, Plan, Planner
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.callbacks.refitting import is_priced
from hf_hetero.plan import StepReport
from hf_hetero.trainer import reporting
from hf_hetero.what_if.mixes import MIXES, draw_lengths

SHAPES = (
    ("llama-8b_8xh100_nvlink", 8, 64),
    ("llama-8b_64xh100_ib", 64, 512),
    ("llama-8b_64xh100_ib", 1024, 4096),
)
"""Cost model, ranks, samples of a step."""


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Median seconds of a call, of the processor: other work of this machine does not count."""
    found: list[float] = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found)


def as_measured(plan: Plan, lengths: list[int], cost: CostModel) -> StepReport:
    """A report of a step that went as it was planned."""
    seconds = tuple(
        tuple(cost.group_seconds(m.group_of(rank), lengths) for rank in range(plan.num_ranks))
        for m in plan.micro_batches
    )
    by_source = {f"source {number}": (1.0, 1) for number in range(16)}
    return StepReport(
        1, plan, tuple(lengths), sum(lengths), plan.seconds, seconds, planned_s=seconds, by_source=by_source
    )


def of_plans(times: int) -> None:
    """A line for each shape."""
    print("| cost model | ranks | samples | step (s) | on each rank (ms) | share of the step | static runs (ms) |")
    print("|---|---|---|---|---|---|---|")
    for name, num_ranks, num_samples in SHAPES:
        cost = CostModel.load(name)
        planner = Planner(cost, num_ranks, solver="fast")
        lengths = draw_lengths(MIXES["github"], num_samples, seed=0, max_tokens=65536)[0].tolist()
        report = as_measured(planner.plan(lengths), lengths, cost)
        own, callback = report.plan.share(0), PlanMetricsCallback()
        args, state = SimpleNamespace(report_to=[]), SimpleNamespace(is_world_process_zero=True)

        def at_the_end() -> None:
            for group in own:  # noqa: B023
                if is_priced(cost, group, lengths):  # noqa: B023
                    cost.group_seconds(group, lengths)  # noqa: B023
            callback.on_step_report(args, state, report)  # pyright: ignore # noqa: B023
            callback.metrics()  # noqa: B023

        end_s = seconds_of(at_the_end, times)
        static_s = seconds_of(lambda: planner.static_seconds(lengths), 1)  # noqa: B023
        step_s = report.plan.seconds
        share = f"{end_s / step_s:.3%}"
        print(f"| {name} | {num_ranks} | {num_samples} | {step_s:.2f} | {1000 * end_s:.2f} | {share} | ", end="")
        print(f"{1000 * static_s:.0f} |", flush=True)


def rows_with_sources(num_rows: int) -> list[dict[str, Any]]:
    """Rows of random tokens, from eight sources."""
    lengths = draw_lengths(MIXES["github"], num_rows, seed=1, max_tokens=1024)[0].tolist()
    tokens = torch.randint(0, 4096, (max(lengths),), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": tokens[:n], "length": n, "origin": f"source {i % 8}"} for i, n in enumerate(lengths)]


class Watched(HeteroTrainer):
    """Notes when each step's forward and backward end."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train, and look at the clock."""
        loss = super().training_step(*args, **kwargs)
        self.ends.append(time.perf_counter())
        return loss


def run(column: str | None, rows: list[dict[str, Any]], steps: int) -> tuple[float, float]:
    """Median seconds of a step, and of its report."""
    spent, original = list[float](), reporting.report

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        original(*args)
        spent.append(time.perf_counter() - start)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    hetero = HeteroConfig(source_column=column, max_tokens_per_rank=16384, calibrate=False, solver="fast")
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            dataloader_pin_memory=False,
            per_device_train_batch_size=16,
            max_steps=steps,
            **quiet,
        )
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
        trainer = Watched(model=model, args=args, train_dataset=rows, hetero=hetero)
        trainer.ends = []
        reporting.report = timed
        try:
            trainer.train()
        finally:
            reporting.report = original
    return median(end - start for start, end in pairwise(trainer.ends)), median(spent)


def of_runs(steps: int) -> None:
    """A line without, and one with the loss by source."""
    torch.set_num_threads(1)
    rows = rows_with_sources(16 * steps)
    print("\n| a run on one rank of this machine | step (s) | its report (ms) | share of the step |\n|---|---|---|---|")
    for name, column in (("without the loss by source", None), ("with it", "origin")):
        step_s, report_s = run(column, rows, steps)
        print(f"| {name} | {step_s:.3f} | {1000 * report_s:.2f} | {report_s / step_s:.3%} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="that each piece of work is timed")
    parser.add_argument("--steps", type=int, default=8, help="of the run on this machine")
    options = parser.parse_args()
    of_plans(options.times)
    of_runs(options.steps)


if __name__ == "__main__":
    main()
