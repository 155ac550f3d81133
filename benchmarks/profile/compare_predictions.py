"""Predicted against measured step seconds: `python benchmarks/profile/compare_predictions.py`.

On so many CPU ranks the model of the quickstart is profiled; then it trains on samples of lengths like those of the
quickstart, planned by the profile; by the profile, refitted on the way; and by the profile with all seconds three times
too long, refitted on the way. Printed are the median error of predicted step seconds, and their rank correlation with
those that were measured: of what the slowest group of each micro-batch computed, and of whole steps.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import run_ranks  # noqa: E402

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer  # noqa: E402
from hf_hetero.callbacks import StepReportCallback  # noqa: E402
from hf_hetero.callbacks.refitting import scaled  # noqa: E402
from hf_hetero.collators import PackedCollator  # noqa: E402

RECIPE = ROOT / "recipes" / "quickstart_cpu" / "train.yaml"
BATCH = 16  # samples of a step, as in the recipe
RECOVERED_AFTER = 20


class Keeping(StepReportCallback):
    """Keeps what was planned, by the cost model of that moment, and what was measured."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        """Keep a step."""
        busy_s = sum(max(ranks) for ranks in report.busy_s)
        self.steps.append((report.plan.seconds, busy_s, report.seconds))


def profiled(file: str, seconds: float) -> float:
    """Profile on this rank; returns the seconds that all of it took."""
    from hf_hetero.profile.models import subject_named
    from hf_hetero.profile.profile import profile

    logging.disable(logging.WARNING)
    start = time.perf_counter()
    found = profile(subject_named(str(RECIPE)), seconds, command=f"hf-hetero profile {RECIPE.relative_to(ROOT)}")
    if found.is_first:
        found.cost_model.save(file)
    return time.perf_counter() - start


def trained(file: str, calibrate: bool, num_steps: int) -> list[tuple[float, float, float]]:
    """Train by the cost model of a file; returns planned, computed and whole seconds of each step."""
    import torch
    from transformers import TrainingArguments

    from hf_hetero.profile.models import subject_named

    logging.disable(logging.WARNING)
    subject = subject_named(str(RECIPE))
    rng, world = np.random.default_rng(0), torch.distributed.get_world_size()
    # the recipe's corpus has a median of 1,619 tokens, and a mean of 2,272
    lengths = np.clip(rng.lognormal(7.39, 0.9, BATCH * num_steps).astype(int), 16, subject.max_length or 8192)
    ids = torch.from_numpy(rng.integers(0, subject.config.vocab_size, int(lengths.max())))
    keeping = Keeping()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH // world,
            max_steps=num_steps,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
        )
        trainer = HeteroTrainer(
            subject.build(subject.num_layers),
            args,
            train_dataset=[{"input_ids": ids[:length]} for length in lengths],
            data_collator=PackedCollator(),
            callbacks=[keeping],
            hetero=HeteroConfig(cost_model=file, calibrate=calibrate, solver="fast", **subject.hetero),
        )
        trainer.train()
    return keeping.steps


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of places, which may be taken for distinct, because seconds are."""
    places = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*places)[0, 1])


def row(name: str, steps: list[tuple[float, float, float]]) -> str:
    """Return a line of the table."""
    planned, busy, whole = (np.array(column) for column in zip(*steps, strict=True))
    cells = [f"{np.median(np.abs(planned / x - 1)):.1%} | {rank_correlation(planned, x):.3f}" for x in (busy, whole)]
    return f"| {name} | {len(steps)} | {' | '.join(cells)} |"


def main() -> None:
    """Print one line a cost model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="of each run that are compared")
    parser.add_argument("--seconds", type=float, default=75.0, help="of the profile")
    parser.add_argument("--cost", help="take this cost model for the profile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.cost or f"{folder}/cost.json"
        if not options.cost:
            took = run_ranks(profiled, options.ranks, file, options.seconds, timeout_s=3600)
            print(f"Profiled in {max(took):.0f} s. {CostModel.load(file).source}")
        wrong = f"{folder}/wrong.json"
        replace(scaled(CostModel.load(file), np.full(4, 3.0)), provenance="estimated").save(wrong)
        skipped, steps = 3, options.steps
        profile = run_ranks(trained, options.ranks, file, False, skipped + steps, timeout_s=3600)[0]
        refitted = run_ranks(trained, options.ranks, file, True, 30 + steps, timeout_s=3600)[0]
        recovered = run_ranks(trained, options.ranks, wrong, True, RECOVERED_AFTER + steps, timeout_s=3600)[0]
    print("| cost model | steps | error of computing | rank correlation | error of whole steps | rank correlation |")
    print("|---|---|---|---|---|---|")
    print(row("profile", profile[skipped:]))
    print(row("profile, refitted", refitted[30:]))
    print(row("three times too slow, first steps", recovered[skipped:10]))
    print(row(f"three times too slow, after {RECOVERED_AFTER} steps", recovered[RECOVERED_AFTER:]))


if __name__ == "__main__":
    main()
