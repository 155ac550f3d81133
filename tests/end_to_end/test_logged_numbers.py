"""Numbers of a real run are those of an independent count: loss by source, bytes, prices, static runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    IGNORE,
    LENGTHS,
    ScriptedTrainer,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)
from planner.reference import small_cost
from torch.nn import functional as F
from transformers import TrainerState, TrainingArguments

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer, Planner
from hf_hetero.callbacks.step_report import StepReportCallback
from hf_hetero.costs.volume import Heads, volume
from hf_hetero.errors import BadSample
from hf_hetero.layout import layout_of
from hf_hetero.plan import StepReport

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
NAMES = ("web", "code", "books")


class Reports(StepReportCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step_report(self, args: TrainingArguments, state: TrainerState, report: StepReport) -> None:
        self.reports.append(report)


def rows_with_sources(distinct: bool) -> list[dict[str, Any]]:
    """Rows from three sources, or each from one of its own, so that every step brings new ones."""
    return [
        {**row, "origin": f"row {number}" if distinct else NAMES[number % 3]}
        for number, row in enumerate(samples(LENGTHS))
    ]


def losses_by_source(rows: list[dict[str, Any]]) -> list[dict[str, tuple[float, int]]]:
    """Each sample alone, on one process: its token losses, added to those of its source; plain gradient descent."""
    model, found = tiny_model(dtype=torch.float64), list[dict[str, tuple[float, int]]]()
    for step in STEPS:
        model.zero_grad()
        count = sum(label != IGNORE for row in step for label in rows[row]["labels"][1:])
        sums: dict[str, tuple[float, int]] = {}
        for row in step:
            ids, labels = (torch.tensor(rows[row][name]) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
            (loss / count + 0 * logits.sum()).backward()
            before = sums.get(rows[row]["origin"], (0.0, 0))
            sums[rows[row]["origin"]] = before[0] + loss.item(), before[1] + int((labels[1:] != IGNORE).sum())
        found.append({name: tally for name, tally in sums.items() if tally[1]})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return found


def run(hetero: dict[str, Any], distinct: bool, kind: Any = ScriptedTrainer, **changes: Any) -> dict[str, Any]:
    reports, settings = Reports(), HeteroConfig(**hetero)
    rows, model = rows_with_sources(distinct), tiny_model(dtype=torch.float64)
    found = trained(model, rows, kind, settings, callbacks=[reports], **changes)
    return {"reports": reports.reports, "logs": found["logs"]}


def largest_error(found: list[StepReport], rows: list[dict[str, Any]]) -> float:
    """Largest relative difference of a source's loss in any step; sources and their targets must be equal."""
    errors: list[float] = []
    for report, expected in zip(found, losses_by_source(rows), strict=True):
        assert {name: count for name, (_, count) in report.by_source.items()} == {
            name: count for name, (_, count) in expected.items()
        }
        errors += [abs(report.by_source[name][0] / loss - 1) for name, (loss, _) in expected.items()]
    return max(errors)


@pytest.mark.parametrize(("distinct", "chunked"), [(False, True), (True, False)])
def test_loss_by_source_is_that_of_its_samples(distinct: bool, chunked: bool) -> None:
    """On every rank, whatever spans ranks hold: the losses of a source's targets, and how many these are.

    Their sum is the loss that Trainer logs.
    """
    ranks = run_ranks(run, 4, {"source_column": "origin", "chunked_loss": chunked}, distinct)
    for rank in ranks:
        assert largest_error(rank["reports"], rows_with_sources(distinct)) < 1e-10
    logs = [entry for entry in ranks[0]["logs"] if "loss" in entry]
    for report, entry in zip(ranks[0]["reports"], logs, strict=True):
        assert sum(loss for loss, _ in report.by_source.values()) / report.num_targets == pytest.approx(entry["loss"])
        for name, (loss, count) in report.by_source.items():
            assert entry[f"hetero/loss/{name}"] == pytest.approx(loss / count)


def test_sources_in_other_places_are_caught() -> None:
    """A negative control: two rows that swap their sources are no rounding error."""
    rows = rows_with_sources(distinct=False)
    [found] = run_ranks(run, 1, {"source_column": "origin"}, False)
    # of one source more: both have targets, and as many
    pair = next(
        (a, b)
        for a in STEPS[0]
        for b in STEPS[0]
        if a < b and rows[a]["origin"] != rows[b]["origin"] and LENGTHS[a] != LENGTHS[b]
    )
    a, b = pair
    rows[a]["origin"], rows[b]["origin"] = rows[b]["origin"], rows[a]["origin"]
    with pytest.raises(AssertionError):
        assert largest_error(found["reports"], rows) < 1e-3


def test_a_loss_of_ones_own_is_not_known_by_source(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """It is said once, and not logged; training goes on."""

    def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[..., :-1, :].flatten(0, 1)
        return F.cross_entropy(logits, labels[..., 1:].flatten(), reduction="sum") / num_items_in_batch

    class Own(ScriptedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, compute_loss_func=own_loss, **kwargs)

    found = run({"source_column": "origin"}, False, Own)
    assert not any(report.by_source for report in found["reports"])
    assert not [name for entry in found["logs"] for name in entry if name.startswith("hetero/loss")]
    assert caplog.text.count("it is not known by source") == 1


@pytest.mark.parametrize("source", [None, 2.5, ["web"], True])
def test_a_row_without_a_source_is_named(source: Any) -> None:
    """A source is a name or a whole number; the row and its value are said."""
    rows = [{**row, "origin": source} for row in samples(LENGTHS)]
    with pytest.raises(BadSample, match=r"row \d+: origin is .*a source is a name or a whole number"):
        trained(tiny_model(), rows, ScriptedTrainer, HeteroConfig(source_column="origin"))


def test_bytes_are_what_the_formula_says() -> None:
    """Every method, policy and degree of scripted plans: what leaves ranks in all layers, forward and backward."""
    [first, *_] = ranks = run_ranks(run, 4, {}, False)
    heads, num_layers, itemsize = Heads(4, 2, 8, 8), 2, 8
    methods: set[str] = set()
    for report in first["reports"]:
        expected = 0
        for group in report.plan.groups:
            layout = layout_of(group, report.lengths)
            elements = [volume(layout, group.method, heads, rank).total for rank in range(group.degree)]
            expected += num_layers * itemsize * sum(elements)
            methods |= {group.method} if sum(elements) else set()
        assert report.sent_bytes == expected > 0
    assert len(methods) > 2
    assert [report.sent_bytes for report in ranks[3]["reports"]] == [r.sent_bytes for r in first["reports"]]
    logged = [entry["hetero/exchanged_gib"] for entry in first["logs"] if "loss" in entry]
    assert logged == pytest.approx([report.sent_bytes / 2**30 for report in first["reports"]])


def cost_file(folder: Path) -> str:
    path = folder / "cost.json"
    cost = small_cost(40, (2, 4))
    cost.save(path)
    return str(path)


def planned(path: str) -> dict[str, Any]:
    return run({"cost_model": path, "solver": "fast"}, False, HeteroTrainer)


def test_prices_and_static_runs_are_those_of_the_cost_model(tmp_path: Path) -> None:
    """Each rank's groups at their price; each degree that holds the step's samples, as the planner plans it; the log.

    Planned again here, in another process, from the lengths alone.
    """
    path = cost_file(tmp_path)
    cost = CostModel.load(path)
    [first, second] = run_ranks(planned, 2, path)
    planner = Planner(cost, num_ranks=2)
    of_run = dict.fromkeys(planner.degrees, 0.0)
    for report, entry in zip(first["reports"], (e for e in first["logs"] if "loss" in e), strict=True):
        for micro_batch, charged in zip(report.plan.micro_batches, report.planned_s, strict=True):
            for rank, seconds in enumerate(charged):
                group = micro_batch.group_of(rank)
                price = cost.group_seconds(group, report.lengths) if group.samples else 0.0
                assert seconds == pytest.approx(price, abs=1e-9)
        held = {d for d in planner.degrees if max(report.lengths) <= d * cost.capacity_tokens}
        assert report.static_s.keys() == held
        for degree in held:
            assert report.static_s[degree] == planner.static(report.lengths, degree).seconds
            assert report.plan.seconds <= report.static_s[degree] * (1 + 1e-9)
        of_run = {d: of_run[d] + report.static_s[d] for d in of_run.keys() & held}
        best = min(of_run, key=lambda d: of_run[d])
        assert entry["hetero/static_degree_by_model"] == best
        assert entry["hetero/saved_s_by_model"] == pytest.approx(report.static_s[best] - report.plan.seconds)
        assert entry["hetero/gap"] == pytest.approx(report.plan.gap)
        assert math.isclose(entry["hetero/tokens_per_s"], 2 * entry["hetero/tokens_per_s_per_rank"])
    assert [replace(r, wait_s=0, plan_wait_s=0) for r in second["reports"]] == [
        replace(r, wait_s=0, plan_wait_s=0, seconds=s.seconds)
        for r, s in zip(first["reports"], second["reports"], strict=True)
    ]
