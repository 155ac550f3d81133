"""Predicted against measured seconds and bytes: `python benchmarks/gpu/measure_predictions.py --device cpu`.

First by the estimate, then by what `hf-hetero profile` measures of the model: steps of `HeteroTrainer` on packs that
neither has seen. Seconds are those of forward and backward; bytes, where they are counted, the peak of a step.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from shapes import MINIATURES, SHAPES, Shape, make_model, mix_lengths, samples
from short_runs import run
from stage import Stage, begin

from hf_hetero import HeteroConfig
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.costs import CostModel
from hf_hetero.plan import StepReport

ROOT = Path(__file__).parents[2]
FIRST_STEPS = 3
"""They warm up, and do not count."""


class Reports(StepReportCallback):
    """Keeps the reports, and the cost model that plans were made by."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.cost: CostModel | None = None

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        """Keep one."""
        self.reports.append(report)

    def recalibrated(self, cost: CostModel) -> None:
        """Look at the cost model, and leave it as it is."""
        self.cost = cost


def measured(report: StepReport) -> float:
    """Seconds of a step's micro-batches, each as long as its slowest rank."""
    return sum(map(max, report.busy_s))


def compare(stage: Stage, model_name: str, cost_name: str, reports: Sequence[StepReport], cost: CostModel) -> None:
    """A row of predictions."""
    seconds = np.array([[report.plan.seconds, measured(report)] for report in reports])
    columns: dict[str, Any] = {
        "steps": len(reports),
        "predicted (ms)": f"{1e3 * seconds[:, 0].min():.1f} to {1e3 * seconds[:, 0].max():.1f}",
        "measured (ms)": f"{1e3 * seconds[:, 1].min():.1f} to {1e3 * seconds[:, 1].max():.1f}",
        "median error": percent(np.median(np.abs(seconds[:, 0] / seconds[:, 1] - 1))),
        "largest error": percent(np.max(np.abs(seconds[:, 0] / seconds[:, 1] - 1))),
        "rank correlation": round(rank_correlation(seconds[:, 0], seconds[:, 1]), 3),
    }
    if all(report.peak_bytes for report in reports):
        said = np.array([predicted_bytes(report, cost) for report in reports])
        peaks = np.array([report.peak_bytes for report in reports])
        columns["peak (GiB)"] = f"{peaks.min() / 2**30:.2f} to {peaks.max() / 2**30:.2f}"
        columns["median error of bytes"] = percent(np.median(np.abs(said / peaks - 1)))
        columns["largest excess over the prediction"] = percent(np.max(peaks / said - 1))
    stage.row("Predicted against measured", model=model_name, by=cost_name, **columns)


def predicted_bytes(report: StepReport, cost: CostModel) -> float:
    """Bytes of the fullest group of a step."""
    by_group: list[float] = []
    for group in report.plan.groups:
        of_group = cost.by_activations.get(group.activations, cost)
        by_group.append(of_group.num_bytes([report.lengths[sample] for sample in group.samples], group.degree))
    return max(by_group)


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.1f} %"


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's: the correlation of ranks."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def profiled(stage: Stage, shape: Shape, folder: Path, most: int) -> str | None:
    """The cost file that `hf-hetero profile` makes of the model's config; None, with a note, where it makes none."""
    made = folder / "cost.json"
    shape.kind(**shape.sizes).save_pretrained(folder / "model")
    command = [sys.executable, "-m", "hf_hetero.cli", "profile", str(folder / "model"), "-o", str(made)]
    command += ["--max-length", str(most), "--ranks", "1", "--seconds", str(stage.pick(40, 5))]
    command.append(stage.pick("--bf16", "--cpu"))
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(5.0, stage.left_s - stage.pick(40, 60))
        )
    except subprocess.TimeoutExpired:
        stage.note("`hf-hetero profile` was not through in time.")
        return None
    if done.returncode or not made.exists():
        stage.note(f"`hf-hetero profile` made no file: {' '.join(done.stderr.split())[-400:]}")
        return None
    stage.fact("profile", CostModel.load(str(made)).source.replace(f"{folder}/", ""))
    return str(made)


def measure(stage: Stage, name: str, shape: Shape, num_steps: int, most: int) -> None:
    """One model by the estimate, and by its profile."""
    data = samples(mix_lengths("github", 4 * num_steps, most, seed=1), shape.sizes["vocab_size"])
    # as it was made, not refitted on the way
    fixed: dict[str, Any] = {"calibrate": False} if "calibrate" in {f.name for f in fields(HeteroConfig)} else {}
    with tempfile.TemporaryDirectory() as folder:
        for cost_name in ("estimate", "profile"):
            path = None if cost_name == "estimate" else profiled(stage, shape, Path(folder), most)
            if cost_name == "profile" and path is None:
                continue
            with stage.alone(f"{name} by {cost_name}"):
                reports = Reports()
                model = make_model(shape, stage.device)
                hetero = HeteroConfig(cost_model=path, **fixed)
                run(model, stage.device, data, 4, 1, hetero, callbacks=[reports], num_train_epochs=1)
                model.to("meta")
                assert reports.cost is not None
                compare(stage, name, cost_name, reports.reports[FIRST_STEPS:], reports.cost)


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    name = stage.pick("qwen3-0.6b", "tiny-qwen3")
    shape = {**SHAPES, **MINIATURES}[name]
    measure(stage, name, shape, num_steps=stage.pick(24, 10), most=stage.pick(16384, 100))
    stage.done()


if __name__ == "__main__":
    main()
