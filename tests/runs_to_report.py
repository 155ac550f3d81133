"""Runs for the tests of their report: records made from plans, the files beside them, and a long run on many ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_hetero import CostModel, Planner
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.report import report_run
from hf_hetero.report.rows import row_of
from hf_hetero.report.run import Run
from hf_hetero.what_if.simulate import busy_seconds

COST = CostModel(
    attention_s_per_token2=1e-8,
    linear_s_per_token=1e-4,
    micro_batch_s=0.02,
    all_to_all_bytes_per_token=1000,
    all_to_all_bytes_per_s={2: 1e8, 4: 1e8},
    all_to_all_latency_s={2: 0.01, 4: 0.02},
    activation_bytes_per_token=1.0,
    model_state_bytes_per_rank=0.0,
    memory_bytes_per_rank=5000.0,
    name="a machine",
    provenance="measured",
)
BATCHES = [[9000, 400, 300, 2000], [100, 200, 300, 400], [4000, 900, 800, 3000, 10, 1]]
"""The second is planned with the most degrees, so that it is shown first."""


def records_of(batches: Sequence[Sequence[int]] = BATCHES, num_ranks: int = 4) -> list[dict[str, Any]]:
    planner = Planner(COST, num_ranks)
    records: list[dict[str, Any]] = []
    for step, lengths in enumerate(batches, 1):
        plan = planner.plan(lengths)
        busy = [[1.2 * seconds for seconds in ranks] for ranks in busy_seconds(plan, lengths, COST)]
        record = {"step": step, "lengths": list(lengths), "plan": plan.to_dict(), "busy_s": busy, "wait_s": 0.1}
        records.append({**record, "seconds": 1.25 * plan.seconds, "peak_bytes": 2**30 * step})
    return records


def write_run(folder: Path, records: Sequence[Any], **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "plans.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    about = {"format": "hf-hetero-run/1", "cost_model": COST.to_dict(), **said}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "logs.jsonl").write_text("".join(json.dumps({"step": k, "loss": 9.0 - k}) + "\n" for k in range(1, 4)))
    return folder


def page_of(folder: Path) -> str:
    report_run(folder, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;\"'\u2028]]>--><!--"


def named(name: str, folder: Path) -> str:
    """A page of a run in which every text is this one."""
    settings = {name: {name: name}, "Model": {"name": name, name: [name]}}
    cost = replace(COST, name=name, source=name).to_dict()
    records = [{**record, "plan": {**record["plan"], "solver": name}, name: name} for record in records_of()]
    folder = write_run(folder, records, settings=settings, cost_model=cost, num_steps=9, has_ended=False)
    (folder / "logs.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, name: name}) + "\n")
    return page_of(folder)


def many_steps(num_steps: int, num_ranks: int, num_samples: int) -> Run:
    """A run on many ranks, whose steps all look like one of two that are made by hand."""
    records: list[dict[str, Any]] = []
    for turn in range(2):
        lengths = [100 + (37 * k + 1000 * turn) % 5000 for k in range(num_samples)]
        shared = tuple(range(turn, num_samples, 2))
        alone = [tuple(range(1 - turn + 2 * rank, num_samples, 2 * num_ranks)) for rank in range(num_ranks)]
        first = MicroBatch(tuple(Group((rank,), alone[rank]) for rank in range(num_ranks)))
        plan = Plan(num_ranks, (first, MicroBatch((Group(tuple(range(num_ranks)), shared),))), 3.0, 2.9)
        busy = [[1 + rank % 7 / 13 for rank in range(num_ranks)], [1.5] * num_ranks]
        fields = {"step": 1, "lengths": lengths, "plan": plan.to_dict(), "busy_s": busy, "wait_s": 0.0}
        records.append({**fields, "seconds": 3.0 + turn})
    rows = [row_of(record) for record in records]
    steps = [replace(rows[step % 2], step=step, seconds=3 + step % 11 / 7) for step in range(1, num_steps + 1)]
    losses = {step: 2 + 1 / step for step in range(1, num_steps + 1)}
    return Run(steps, lambda step: {**records[step % 2], "step": step}, losses=losses)
