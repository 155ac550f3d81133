"""What a run is, and what it logs, is written down beside its plans, for a report at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import arguments, samples, tiny_model
from transformers import TrainerCallback

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import CalibrationCallback, PlanMetricsCallback
from hf_hetero.callbacks.recording import RUN_FORMAT, numbers_of, write_object
from hf_hetero.report import report_run
from hf_hetero.report import run as readers
from hf_hetero.report.run import read_run

COST = CostModel(1e-9, 1e-6, 1e-3, 100, {2: 1e6}, 10, 100, 10_000, name="tiny", provenance="estimated")


class Look(TrainerCallback):
    """It looks at the report's files in the middle of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.seen:
            self.seen.append(read_run(self.folder))
            report_run(self.folder, self.folder / "so_far.html")


class Refitting(CalibrationCallback):
    """It knows better after the second step."""

    def recalibrated(self, cost: CostModel) -> CostModel | None:
        return CostModel.from_dict({**cost.to_dict(), "name": "better"}) if self._num_reports == 2 else None


def test_a_run_notes_what_a_report_needs(tmp_path: Path) -> None:
    """Settings, versions and cost model are there early, losses as they are logged; a refit replaces the model."""
    COST.save(tmp_path / "cost.json")
    look = Look(tmp_path)
    trainer = HeteroTrainer(
        model=tiny_model("llama"),
        args=arguments(str(tmp_path), 1, 2, max_steps=3, learning_rate=0.125),
        train_dataset=samples([5, 9, 3, 8, 4, 7]),
        callbacks=[PlanMetricsCallback(record=True), Refitting(), look],
        hetero=HeteroConfig(cost_model=str(tmp_path / "cost.json"), max_tokens_per_rank=500),
    )
    trainer.train()
    (middle,), end = look.seen, read_run(tmp_path)
    for run in (middle, end):
        assert run.settings["Model"]["type"] == "llama"
        assert run.settings["Training"]["learning_rate"] == "0.125"
        assert run.settings["Planning"]["max_tokens_per_rank"] == "500"
        assert {"torch", "transformers", "python"} <= run.settings["Versions"].keys()
        assert run.num_steps == 3
    assert (middle.has_ended, end.has_ended) == (False, True)
    assert [len(run.rows) for run in (middle, end)] == [2, 3]
    assert end.cost_model is not None
    assert end.cost_model.name == "better"
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert end.losses == logged
    assert (tmp_path / "so_far.html").exists()
    assert str(tmp_path) not in (tmp_path / "run.json").read_text(), "a report may be sent to others"


def test_only_numbers_are_kept_of_a_log() -> None:
    """What JSON cannot hold, and words, are left out."""
    logs = {"loss": 1.5, "nan": float("nan"), "inf": float("inf"), "words": "a", "count": 3}
    assert numbers_of(logs, 7) == {"loss": 1.5, "count": 3, "step": 7}


def test_what_a_run_is_stands_whole(tmp_path: Path) -> None:
    """A file is replaced at once, and nothing is left beside it."""
    for data in ({"a": 1}, {"a": [2] * 1000}):
        write_object(tmp_path / "new" / "run.json", data)
        assert json.loads((tmp_path / "new" / "run.json").read_text()) == data
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_both_sides_mean_one_format() -> None:
    """What the callback writes is what the report reads."""
    assert RUN_FORMAT == readers.RUN_FORMAT
