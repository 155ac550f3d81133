"""Which charts a run has, and the sentence above each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from hf_hetero.report.page.axes import duration, number
from hf_hetero.report.page.charts import Chart, Line, bars_chart, dots_chart, lengths_chart, lines_chart
from hf_hetero.report.rows import StepRow, totals
from hf_hetero.report.run import Run
from hf_hetero.report.static_runs import StaticRuns

Points = list[tuple[int, float]]
GIB = 2**30


def charts(run: Run, static: StaticRuns | None, degrees: Sequence[int]) -> list[Chart]:
    """Draw all that is known of a run, whose degrees these are."""
    drawn = [
        _speed(run.rows),
        *_loss(run),
        _seconds(run.rows),
        *_against(run.rows),
        *_lengths(run.rows, degrees),
        *_memory(run),
        *_waiting(run.rows),
    ]
    return drawn if static is None else [*drawn, _static(static, is_wide=len(drawn) % 2 == 0)]


def measured_to_planned(rows: Sequence[StepRow]) -> float:
    """Return the median of measured by planned seconds: a step that hung for once does not move it."""
    return median([row.seconds / row.planned_s for row in rows if row.planned_s > 0] or [0.0])


def _speed(rows: Sequence[StepRow]) -> Chart:
    points: Points = [(row.step, row.tokens_per_s) for row in rows]
    words = f"All ranks together, waits included. Half of the steps reach {number(median(v for _, v in points))}."
    return lines_chart("speed", "Tokens a second", words, [Line("speed", "measured", points)], "tokens/s")


def _loss(run: Run) -> Iterator[Chart]:
    points = list(run.losses.items())
    if points:
        words = (
            f"As it was logged: {points[0][1]:.4g} at step {points[0][0]:,}, {points[-1][1]:.4g} at {points[-1][0]:,}."
        )
        yield lines_chart("loss", "Loss", words, [Line("loss", "measured", points)], "", has_zero=False)


def _seconds(rows: Sequence[StepRow]) -> Chart:
    lines = [Line("measured", "measured", [(row.step, row.seconds) for row in rows])]
    if any(row.planned_s > 0 for row in rows):
        lines.append(Line("planned", "planned", [(row.step, row.planned_s) for row in rows]))
    words = f"Forward and backward passes. Half of the steps take at most {duration(median(r.seconds for r in rows))}."
    return lines_chart("seconds", "Seconds a step", words, lines, "s")


def _against(rows: Sequence[StepRow]) -> Iterator[Chart]:
    points = [(row.planned_s, row.seconds) for row in rows if row.planned_s > 0]
    if points:
        words = "A dot a step. On a straight line, plans rank well whatever its slope."
        yield dots_chart("against", "Planned against measured", words, points, measured_to_planned(rows))


def _lengths(rows: Sequence[StepRow], degrees: Sequence[int]) -> Iterator[Chart]:
    samples, tokens = totals(row.samples for row in rows), totals(row.tokens for row in rows)
    if samples:
        longest = max(row.longest for row in rows)
        words = f"How many samples of each length were trained by how many ranks. The longest has {longest:,} tokens."
        yield lengths_chart("samples", "Samples by length and degree", words, samples, "samples", degrees)
        words = "The same, each sample counted by its tokens: where the work is."
        yield lengths_chart("tokens", "Tokens by length and degree", words, tokens, "tokens", degrees)


def _memory(run: Run) -> Iterator[Chart]:
    points: Points = [(row.step, row.peak_bytes / GIB) for row in run.rows if row.peak_bytes]
    if points:
        most = max(value for _, value in points)
        limit = None if run.cost_model is None else (run.cost_model.memory_bytes_per_rank / GIB, "may be used")
        words = f"Peak of the fullest rank in each step's passes; {most:.3g} GiB at most."
        yield lines_chart("memory", "Memory", words, [Line("peak", "measured", points)], "GiB", limit)


def _waiting(rows: Sequence[StepRow]) -> Iterator[Chart]:
    points: Points = [(row.step, 100 * row.idle_share) for row in rows if not row.is_lockstep]
    if points:
        words = "Share of the rank-seconds in which a rank waits for the slowest group of its micro-batch."
        yield lines_chart("waiting", "Waiting", words, [Line("waiting", "measured", points)], "%")


def _static(static: StaticRuns, is_wide: bool) -> Chart:
    """Draw what one degree for the whole run would have cost."""
    steps = static.num_steps
    ratio = f"{static.speedup:.2f} x"
    bars = [("as planned", "ours", static.planned_s / steps)]
    bars += [(f"degree {degree}", "other", seconds / steps) for degree, seconds in static.by_degree.items()]
    words = (
        "Seconds a step with one degree for the whole run, packed as well as it can be: the fastest, degree "
        f"{static.best}, takes {ratio} as long as what was planned. Degrees that cannot hold the longest sample are "
        f"left out. All bars are predicted by one cost model ({static.model}): means of {steps:,} steps, evenly over "
        f"the run; these steps measured {duration(static.measured_s / steps)}."
    )
    title = "What a static run would have cost"
    return bars_chart("static", title, words, bars, "s", static.planned_s / steps, is_wide)
