"""What towers compute is in plans, in predicted seconds and in the share of a card's peak; and in no gradient.

Half of the rows have many images, half none, and all have about as many tokens: by tokens alone any half of them looks
like the other.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import Recorder, arguments, largest_difference, run_ranks, trainer_order
from sights import all_in_double, reference, rows_with_images, seeing_model
from torch.utils.flop_counter import FlopCounterMode

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import PlanMetricsCallback, StepReportCallback
from hf_hetero.checks.in_double import in_double
from hf_hetero.data.plan_ahead import PlanAhead
from hf_hetero.estimate.flops import flops_of
from hf_hetero.plan import StepReport
from hf_hetero.planner import Planner
from hf_hetero.report import read_records
from hf_hetero.step import Step
from hf_hetero.trainer import packing

NUM_IMAGES = [4, 0] * 12
COST = CostModel(
    attention_s_per_token2=1e-9,
    linear_s_per_token=1e-6,
    micro_batch_s=1e-5,
    all_to_all_bytes_per_token=1e3,
    all_to_all_bytes_per_s={2: 1e9},
    activation_bytes_per_token=1.0,
    model_state_bytes_per_rank=0.0,
    memory_bytes_per_rank=1e6,
)


def rows_of(name: str, num_images: list[int] = NUM_IMAGES) -> list[dict[str, Any]]:
    """Rows of about as many tokens, whatever they are of."""
    with_images = rows_with_images(name, [12] * len(num_images), num_images)
    most = max(len(row["input_ids"]) for row in with_images)
    texts = [12 if images else most - 1 - n % 5 for n, images in enumerate(num_images)]
    return rows_with_images(name, texts, num_images)


class Reports(StepReportCallback):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.reports.append(report)


def train(name: str, rows: list[dict[str, Any]], kind: str = "rows", knows_towers: bool = True) -> dict[str, Any]:
    """Train on this rank by real plans, all in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        if not knows_towers:
            patch.setattr(packing, "_towers_of", lambda *_: None)
        return watched(patch, name, rows, kind)


def watched(patch: pytest.MonkeyPatch, name: str, rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Train, and keep what was drawn, planned and reported."""
    steps: list[Step] = []
    take = PlanAhead.step

    def kept(self: PlanAhead, epoch: int, index: int) -> Step | None:
        if (step := take(self, epoch, index)) is not None:
            steps.append(step)
        return step

    patch.setattr(PlanAhead, "step", kept)
    model, recorder, reports = seeing_model(name), Recorder(), Reports()
    with tempfile.TemporaryDirectory() as folder, all_in_double(model):
        COST.save(cost := str(Path(folder) / "cost.json"))
        world = 2 if torch.distributed.is_initialized() else 1
        changes = {"max_steps": 2} if kind == "stream" else {}
        trainer = HeteroTrainer(
            model=model,
            args=arguments(folder, world, **changes),
            train_dataset=made(rows, kind),
            callbacks=[recorder, reports, PlanMetricsCallback(record=True)],
            hetero=HeteroConfig(cost_model=cost, solver="fast", calibrate=False),
        )
        trainer.train()
        evaluated = trainer.evaluate(made(rows, "rows"))
        lines = (Path(folder) / "plans.jsonl").read_text().splitlines() if trainer.args.process_index == 0 else []
        records = read_records(folder) if trainer.args.process_index == 0 else []
    num_trained = len(reports.reports)
    return {
        "gradients": recorder.gradients,
        "reports": reports.reports,
        "drawn": [(step.drawn, step.digest(), step.as_text) for step in steps[:num_trained]],
        "evaluated": [(step.drawn, step.as_text) for step in steps[num_trained:]],
        "loss": evaluated["eval_loss"],
        "keys": [sorted(json.loads(line)) for line in lines],
        "records": records,
    }


def made(rows: list[dict[str, Any]], kind: str) -> Any:
    """The same rows as a list, as a table that stores them, or as a stream."""
    if kind == "table":
        return datasets.Dataset.from_list(
            [{key: x.tolist() if isinstance(x, torch.Tensor) else x for key, x in row.items()} for row in rows]
        )
    if kind == "stream":
        return datasets.IterableDataset.from_generator(lambda: iter(rows))
    return rows


def imbalance(found: dict[str, Any], tower_tokens: dict[int, float]) -> float:
    """The most that a rank has to do beyond the mean of both, in linear work, of any step."""
    most = 0.0
    for report, (drawn, _, _) in zip(found["reports"], found["drawn"], strict=True):
        for micro_batch in report.plan.micro_batches:
            work = [
                sum(report.lengths[s] + tower_tokens[drawn.rows[s]] for s in group.samples) / group.degree
                for group in micro_batch.groups
                for _ in group.ranks
            ]
            most = max(most, max(work) * len(work) / sum(work) - 1)
    return most


def test_ranks_are_balanced_towers_and_all() -> None:
    """Rows with images are shared out as what they take; by tokens alone, ranks that get more of them are late.

    And gradients are those of each row alone, in fp64.
    """
    name = "qwen3-vl"
    rows = rows_of(name)
    found, other = run_ranks(train, 2, name, rows)
    tower_tokens = {
        row: tokens
        for drawn, _, _ in found["drawn"]
        for row, tokens in zip(drawn.rows, drawn.tower_tokens, strict=True)
    }
    assert all((tokens > 20) == bool(NUM_IMAGES[row]) for row, tokens in tower_tokens.items())
    without, _ = run_ranks(train, 2, name, rows, "rows", False)
    assert not any(drawn.tower_tokens or as_text for drawn, _, as_text in without["drawn"])
    assert imbalance(found, tower_tokens) < 0.08 < 0.15 < imbalance(without, tower_tokens)
    model = seeing_model(name)
    with in_double(model):
        expected = reference(model, rows, trainer_order(len(rows), 12, 7, 4))
    for rank in (found, other, without):
        for mine, theirs in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(mine, theirs) < 1e-12
    # what is planned is what is predicted, charged, and written down
    for report, (drawn, _, as_text), record, keys in zip(
        found["reports"], found["drawn"], found["records"], found["keys"], strict=True
    ):
        assert report.lengths == drawn.lengths != report.planned_lengths == as_text
        assert report.plan.seconds == pytest.approx(COST.plan_seconds(report.plan, as_text))
        assert sum(max(ranks) for ranks in report.planned_s) == pytest.approx(report.plan.seconds, abs=1e-8)
        assert record["planned_lengths"] == list(as_text)
        assert "planned_lengths" in keys
    assert found["evaluated"]
    assert all(any(drawn.tower_tokens) and as_text for drawn, as_text in found["evaluated"])


def test_operations_of_towers_count() -> None:
    """Beside those of text, three times what torch counts of a forward pass through the tower."""
    name = "qwen3-vl"
    rows, model = rows_of(name)[:12], seeing_model(name)
    found = train(name, rows)
    expected = flops_of(model).of([len(row["input_ids"]) for row in rows])
    model.set_attn_implementation("eager")
    for row in rows:
        if "pixel_values" in row:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                images = {key: row[key] for key in ("pixel_values", "image_grid_thw")}
                model.model.get_image_features(**images, return_dict=True)
            expected += 3 * counter.get_total_flops()
    for report in found["reports"]:
        assert report.flops == pytest.approx(expected, rel=1e-12)
    assert found["reports"]


@pytest.mark.parametrize("name", ["qwen2.5-vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_however_rows_come(name: str) -> None:
    """A list, a table that stores images, and a stream tell the same of the same rows."""
    rows = rows_of(name)[:12]
    told = [sorted(train(name, rows, kind)["drawn"][0][0].tower_tokens) for kind in ("rows", "table", "stream")]
    assert told[0] == told[1] == told[2]
    assert sum(tokens > 0 for tokens in told[0]) == 6


@pytest.mark.parametrize("name", ["qwen3-vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_text_alone_is_planned_as_before(name: str) -> None:
    """Of rows without images a model that sees makes the plans, digests and records that lengths alone make."""
    rows = rows_of(name, [0] * 12)
    found, without = train(name, rows), train(name, rows, "rows", False)
    planner = Planner(COST, num_ranks=1, solver="fast")
    for (drawn, digest, as_text), (_, other, _), report in zip(
        found["drawn"], without["drawn"], found["reports"], strict=True
    ):
        assert digest == other
        assert (drawn.tower_tokens, as_text, report.as_text) == ((), (), ())
        assert report.planned_lengths == report.lengths
        assert planner.plan(drawn.lengths).digest() == report.plan.digest()
    assert found["keys"] == without["keys"]
    assert not any("planned_lengths" in keys for keys in found["keys"])


def test_a_table_is_evaluated_twice(tmp_path: Path) -> None:
    """What is known of a dataset from an evaluation before serves the next, whatever its images are of."""
    rows = made(rows_with_images("llava")[:8], "table")
    trainer = HeteroTrainer(seeing_model("llava"), arguments(str(tmp_path), 1), train_dataset=rows)
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate(rows)["eval_loss"]


def test_images_that_nobody_has_seen_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column of lengths spares reading rows of which a collator makes images: it is said that plans are of tokens."""
    rows = rows_of("qwen3-vl")[:12]

    def collate(examples: list[Any]) -> dict[str, Any]:
        row = rows[examples[0]["input_ids"][0]]
        images = {key: values for key, values in row.items() if isinstance(values, torch.Tensor)}
        return {**{key: torch.tensor([values]) for key, values in row.items() if key not in images}, **images}

    lengths = [len(row["input_ids"]) for row in rows]
    data = datasets.Dataset.from_dict({"input_ids": [[n] * length for n, length in enumerate(lengths)]})
    for table, is_said in ((data.add_column("length", lengths), True), (data, False)):
        caplog.clear()
        args = arguments(str(tmp_path), 1, max_steps=1)
        reports = Reports()
        HeteroTrainer(
            seeing_model("qwen3-vl"), args, train_dataset=table, data_collator=collate, callbacks=[reports]
        ).train()
        assert any("is in no plan" in message for message in caplog.messages) == is_said
        assert bool(reports.reports[0].as_text) != is_said
