"""This module shows a run from its records: its numbers, and one self-contained HTML page (`page`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_hetero.costs import CostModel
from hf_hetero.report.drawing import written
from hf_hetero.report.page.page import make_page
from hf_hetero.report.page.sections import measured_to_planned
from hf_hetero.report.records import Record
from hf_hetero.report.rows import StepRow, by_degree, row_of, totals
from hf_hetero.report.run import Run, read_run, run_of


def most_mixed(records: Sequence[Record]) -> Record:
    """Choose the step that shows most: most different degrees, then most samples outside the commonest one."""
    return max(records, key=lambda record: row_of(record).variety)


def summarise(records: Sequence[Record]) -> dict[str, str]:
    """Sum a run up in numbers, each under its name: sums and means over the steps."""
    return summary([row_of(record) for record in records])


def summary(rows: Sequence[StepRow]) -> dict[str, str]:
    """Sum up the rows of a run, as `summarise` does its records."""
    steps, degrees = len(rows), by_degree(totals(row.samples for row in rows))
    samples, tokens = sum(row.num_samples for row in rows), sum(row.num_tokens for row in rows)
    seconds = sum(row.seconds + row.wait_s for row in rows)
    return {
        "steps": f"{steps:,}",
        "samples": f"{samples:,}",
        "tokens": f"{tokens:,}",
        "seconds, waits included": f"{seconds:,.1f}",
        "tokens a second": f"{tokens / seconds if seconds > 0 else 0:,.0f}",
        **{f"samples at degree {degree}": f"{count / samples:.0%}" for degree, count in degrees.items()},
        "micro-batches a step": f"{sum(row.num_micro_batches for row in rows) / steps:.1f}",
        "idle share of the rank-seconds": _idle(rows),
        "measured over planned seconds, median": f"{measured_to_planned(rows):.2f}",
        "planning a step, in the background": f"{1000 * sum(row.planning_s for row in rows) / steps:.1f} ms",
        "waited for plans and data": f"{sum(row.wait_s for row in rows):.2f} s",
    }


def _idle(rows: Sequence[StepRow]) -> str:
    """Say the mean idle share of the steps, if it was measured."""
    if any(row.is_lockstep for row in rows):
        return "not measured: sharded weights keep all ranks in step"
    return f"{sum(row.idle_share for row in rows) / len(rows):.0%}"


def write_report(records: Sequence[Record], path: str | Path, cost_model: CostModel | None = None) -> None:
    """Write a run, from `read_records`, as one HTML page that loads nothing from elsewhere.

    Args:
        records: of the steps, ascending.
        path: of the page.
        cost_model: what plans were made by: with it, steps are drawn as they were planned, too, and compared with
            static runs.

    Raises:
        HeteroError: a file that cannot be written.
    """
    write_page(run_of(records, cost_model), path)


def report_run(source: str | Path, path: str | Path, cost_model: CostModel | None = None) -> None:
    """Write the page of a run that may be long, or not at its end, from the folder or the file of its records.

    Besides, the page has what the run wrote down beside them: settings, versions, losses, and the cost model.

    Raises:
        ConfigError: as `read_records`.
        HeteroError: a file that cannot be written.
    """
    write_page(read_run(source, cost_model), path)


def write_page(run: Run, path: str | Path) -> None:
    """Write the page of a run.

    Raises:
        HeteroError: it cannot be written.
    """
    written(make_page(run, summary(run.rows)).encode("utf-8", errors="replace"), path)
