"""This module shows a run from its records: its numbers, and one self-contained HTML page with pictures.

The page needs matplotlib (`drawing`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from hf_hetero.costs import CostModel
from hf_hetero.plan import Plan, describe_degrees, idle_share
from hf_hetero.report.drawing import ACCENT, DEGREE_COLOURS, INK, new_figure, rendered, short, written
from hf_hetero.report.plan_picture import plan_figure
from hf_hetero.report.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hf-hetero: a run</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2f33; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; } img { width: 100%; }
table { border-collapse: collapse; } td { padding: .15rem 2rem .15rem 0; border-bottom: 1px solid #e4e4e2; }
td + td { text-align: right; }
</style></head><body><h1>hf-hetero: a run</h1>
"""


def most_mixed(records: Sequence[Record]) -> Record:
    """Choose the step that shows most: most different degrees, then most samples outside the commonest one."""

    def variety(record: Record) -> tuple[int, int]:
        counts = [len(lengths) for lengths in _lengths_by_degree([record]).values()]
        return len(counts), sum(counts) - max(counts, default=0)

    return max(records, key=variety)


def summarise(records: Sequence[Record]) -> dict[str, str]:
    """Sum a run up in numbers, each under its name: sums and means over the steps."""
    steps, plans, degrees = len(records), [Plan.from_dict(r["plan"]) for r in records], _lengths_by_degree(records)
    samples, tokens = sum(len(r["lengths"]) for r in records), sum(sum(r["lengths"]) for r in records)
    seconds = sum(r["seconds"] + r["wait_s"] for r in records)
    return {
        "steps": f"{steps:,}",
        "samples": f"{samples:,}",
        "tokens": f"{tokens:,}",
        "seconds, waits included": f"{seconds:,.1f}",
        "tokens a second": f"{tokens / seconds if seconds > 0 else 0:,.0f}",
        **{f"samples at degree {degree}": f"{len(lengths) / samples:.0%}" for degree, lengths in degrees.items()},
        "micro-batches a step": f"{sum(len(plan.micro_batches) for plan in plans) / steps:.1f}",
        "idle share of the rank-seconds": _idle(records),
        "measured over planned seconds, median": f"{_measured_to_planned(records):.2f}",
        "planning a step, in the background": f"{1000 * sum(plan.planning_s for plan in plans) / steps:.1f} ms",
        "waited for plans and data": f"{sum(r['wait_s'] for r in records):.2f} s",
    }


def _idle(records: Sequence[Record]) -> str:
    """Say the mean idle share of the steps, if it was measured."""
    if any(record.get("is_lockstep") for record in records):
        return "not measured: sharded weights keep all ranks in step"
    return f"{sum(idle_share(record['busy_s']) for record in records) / len(records):.0%}"


def _measured_to_planned(records: Sequence[Record]) -> float:
    """Return the median of measured by planned seconds: a step that hung for once does not move it."""
    return median([r["seconds"] / r["plan"]["seconds"] for r in records if r["plan"]["seconds"] > 0] or [0.0])


def _lengths_by_degree(records: Sequence[Record]) -> dict[int, list[int]]:
    """Collect the lengths of all samples by the degree that trained them, ascending."""
    by_degree: dict[int, list[int]] = {}
    for record in records:
        for group in Plan.from_dict(record["plan"]).groups:
            if group.samples:
                by_degree.setdefault(group.degree, []).extend(record["lengths"][sample] for sample in group.samples)
    return dict(sorted(by_degree.items()))


def write_report(records: Sequence[Record], path: str | Path, cost_model: CostModel | None = None) -> None:
    """Write a run, from `read_records`, as one HTML page that loads nothing from elsewhere.

    One step is drawn as it was measured and, with a cost model, as it was predicted.

    Raises:
        HeteroError: no matplotlib, or a file that cannot be written.
    """
    step = most_mixed(records)
    plan, lengths, is_lockstep = Plan.from_dict(step["plan"]), step["lengths"], bool(step.get("is_lockstep"))
    pictures: dict[str, Callable[[], Figure]] = {"Seconds of each step": lambda: _seconds_figure(records)}
    pictures["Lengths, by the degree that trained them"] = lambda: _lengths_figure(records)
    degrees = describe_degrees(plan)
    if cost_model is not None:
        pictures[f"Step {step['step']} as planned: {degrees}"] = lambda: plan_figure(plan, lengths, cost_model)
    pictures[f"Step {step['step']} as measured: {degrees}"] = lambda: plan_figure(
        plan, lengths, None, step["busy_s"], is_lockstep
    )
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n" for name, value in summarise(records).items()
    )
    page = PAGE + f"<table>\n{rows}</table>\n"
    for title, make in pictures.items():  # inside the page, as SVG: one file to send, sharp at any size
        data, words = base64.b64encode(rendered(make, "svg")).decode(), escape(title)
        page += f'<h2>{words}</h2>\n<img alt="{words}" src="data:image/svg+xml;base64,{data}">\n'
    written((page + "</body></html>\n").encode(), path)


def _seconds_figure(records: Sequence[Record]) -> Figure:
    """Draw planned and measured seconds over steps; one against the other shows whether plans are ranked well."""
    from matplotlib.ticker import MaxNLocator

    figure, over = new_figure(10, 2.8, (1, 2), width_ratios=(2, 1))
    against = figure.axes[1]
    steps, measured, planned = zip(*((r["step"], r["seconds"], r["plan"]["seconds"]) for r in records), strict=True)
    over.plot(steps, measured, color=INK, label="measured")
    over.plot(steps, planned, color=ACCENT, label="planned")
    over.set(xlabel="step", ylabel="seconds", ylim=(0, 1.25 * max(*measured, *planned) or 1))
    over.xaxis.set_major_locator(MaxNLocator(integer=True))
    over.legend(loc="upper right", ncols=2)
    ratio = _measured_to_planned(records)
    against.scatter(planned, measured, s=12, color=INK, alpha=0.6, linewidths=0)
    against.axline((0, 0), slope=ratio, color=ACCENT, linewidth=1, label=f"x {ratio:.2f}, the median")
    against.set(xlim=(0, 1.1 * max(planned) or 1), ylim=(0, 1.1 * max(measured) or 1))
    against.set(xlabel="planned seconds", ylabel="measured seconds")
    against.legend(loc="lower right")
    return figure


def _lengths_figure(records: Sequence[Record]) -> Figure:
    """Draw how many samples of each length were trained at each degree."""
    figure, axes = new_figure(10, 2.6)
    by_degree = _lengths_by_degree(records)
    least, most = min(map(min, by_degree.values())), max(map(max, by_degree.values()))
    colours = [DEGREE_COLOURS[min(degree.bit_length() - 1, len(DEGREE_COLOURS) - 1)] for degree in by_degree]
    bins = [2 ** (k / 2) for k in range(2 * (least.bit_length() - 1), 2 * most.bit_length() + 1)]
    names = [f"degree {degree}" for degree in by_degree]
    axes.hist(list(by_degree.values()), bins, stacked=True, color=colours, label=names, edgecolor="white")
    ticks = [2**k for k in range(least.bit_length() - 1, most.bit_length() + 1)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.set(xlabel="tokens of a sample", ylabel="samples", xlim=(ticks[0], ticks[-1]))
    axes.legend(loc="upper left")
    return figure
