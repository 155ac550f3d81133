"""The timeline of a step: ranks from top to bottom, seconds from left to right, a bar for each sample.

The script of the page draws any of the steps that are kept whole, from what `timeline` returns; the picture made here
is that of one step, for those who read the page without a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, Plan
from hf_hetero.plan_in_words import describe_degrees
from hf_hetero.report.page import axes
from hf_hetero.report.page.axes import Scale
from hf_hetero.report.page.markup import Html, element
from hf_hetero.report.page.palette import colour_of
from hf_hetero.report.records import Record, priced
from hf_hetero.report.rows import StepRow
from hf_hetero.report.run import Run
from hf_hetero.report.static_runs import knows

MOST_TIMELINES = 200
MOST_BYTES = 2_500_000
"""Of all timelines together, so that a page of a long run on many ranks can be mailed."""
MOST_BARS = 3000
"""Bars of samples in the picture without a script; a step of more shows its groups only."""
WIDTH, LEFT, TOP, BOTTOM = 960.0, 44.0, 22.0, 34.0
METHODS = {
    "ulysses": "heads for tokens, all to all",
    "gather": "keys and values are fetched",
    "ring": "keys and values go round",
    "ulysses_ring": "heads within a block, keys and values round the blocks",
    "token_ring": "queries go round, outputs come home",
}
"""How attention crosses the ranks of a group, in words."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """A `Timeline` is a step that is kept whole.

    Args:
        step: its number.
        why: why it was chosen.
        data: what the script draws.
    """

    step: int
    why: str
    data: dict[str, Any]


def timelines(run: Run) -> list[Timeline]:
    """Keep the steps whole that show most, then others evenly over the run, as many as the page may hold."""
    kept: list[Timeline] = []
    room = MOST_BYTES
    for row, why in _by_interest(run.rows):
        if len(kept) == MOST_TIMELINES:
            break
        if room < 8 * row.num_samples + 30 * row.num_groups and kept:
            continue
        data = timeline(run.record_of(row.step), run.cost_model)
        size = len(json.dumps(data, separators=(",", ":")))
        if size <= room or not kept:
            kept.append(Timeline(row.step, why, data))
            room -= size
    return sorted(kept, key=lambda one: one.step)


def timeline(record: Record, cost: CostModel | None) -> dict[str, Any]:
    """Return what is drawn of a step, ready for JSON.

    A group is [first rank, degree, method, blocks, activations, least and most measured seconds of its ranks, predicted
    seconds, seconds of its exchange, samples, their tokens]; predictions are None where no cost model knows the plan.
    """
    plan, lengths = Plan.from_dict(record["plan"]), record["lengths"]
    cost = cost if cost is not None and knows(cost, plan) else None

    def drawn(group: Group, busy_s: Sequence[float]) -> list[Any]:
        measured = [busy_s[rank] for rank in group.ranks]
        charges = cost.charges(group, priced(record)) if cost is not None else None
        samples = sorted(group.samples, key=lambda sample: -lengths[sample])  # the longest first, where the eye begins
        return [
            group.ranks[0],
            group.degree,
            group.method if group.degree > 1 else "",
            group.ulysses_degree or 0,
            group.activations or "",
            _short(min(measured)),
            _short(max(measured)),
            _short(sum(charges)) if charges is not None else None,
            _short(charges.exchange_s) if charges is not None else None,
            samples,
            [lengths[sample] for sample in samples],
        ]

    return {
        "step": record["step"],
        "ranks": plan.num_ranks,
        "seconds": _short(record["seconds"]),
        "wait": _short(record["wait_s"]),
        "planned": _short(plan.seconds),
        "gap": _short(min(plan.gap, 1e6)) if plan.lower_bound_s > 0 else None,
        "degrees": describe_degrees(plan)[:200],
        "lockstep": bool(record.get("is_lockstep")),
        "batches": [
            [drawn(group, busy_s) for group in micro_batch.groups]
            for micro_batch, busy_s in zip(plan.micro_batches, record["busy_s"], strict=True)
        ],
    }


def weights(cost: CostModel | None) -> dict[str, Any] | None:
    """Return by what a group's seconds are dealt out to its samples: a n^2 + b n, with b by degree; None: by tokens."""
    if cost is None:
        return None
    degrees = [1, *cost.all_to_all_bytes_per_s]
    return {
        "a": cost.attention_s_per_token2,
        "b": {str(degree): cost.linear_s(degree) for degree in degrees},
        "fixed": {str(degree): cost.fixed_s(degree) for degree in degrees},
    }


def table_rows(data: dict[str, Any]) -> list[list[str]]:
    """List the groups of a step, head first: what its picture shows, for those who do not see it."""
    rows = [["micro-batch", "ranks", "degree", "exchange", "samples", "tokens", "longest", "measured, s"]]
    for number, groups in enumerate(data["batches"], 1):
        for first, degree, method, _, _, _, most_s, _, _, samples, tokens in groups:
            ranks = str(first) if degree == 1 else f"{first} to {first + degree - 1}"
            counts = [f"{len(samples):,}", f"{sum(tokens):,}", f"{max(tokens, default=0):,}"]
            rows.append([str(number), ranks, str(degree), METHODS.get(method, "none"), *counts, f"{most_s:.3g}"])
    return rows


def timeline_svg(data: dict[str, Any], degrees: Sequence[int]) -> Html:
    """Draw a step as it was measured."""
    num_ranks = data["ranks"]
    height = TOP + BOTTOM + min(max(24.0 * num_ranks, 60.0), 480.0)
    total = sum(max(group[6] for group in groups) for groups in data["batches"])
    x = Scale(0.0, total or 1.0, LEFT, WIDTH - 8)
    y = Scale(0.0, num_ranks, TOP, height - BOTTOM)
    num_bars = sum(len(group[9]) for groups in data["batches"] for group in groups)
    parts: list[Html] = [_pattern()]
    start = 0.0
    for number, groups in enumerate(data["batches"], 1):
        longest = max(group[6] for group in groups)
        parts.append(_rect(x.at(start), TOP, x.at(start + longest) - x.at(start), y.end - TOP, "waiting"))
        for group in groups:
            parts.extend(_group(group, start, x, y, degrees, num_bars <= MOST_BARS))
        parts.append(element("text", f"micro-batch {number}", x=x.at(start) + 2, y=TOP - 8, class_="tick"))
        start += longest
    for value in axes.round_ticks(0.0, total or 1.0, 9):
        parts.append(element("text", axes.number(value), x=x.at(value), y=y.end + 14, class_="tick middle"))
    every = max(1, num_ranks // 8)
    for rank in range(0, num_ranks, every):
        parts.append(element("text", str(rank), x=LEFT - 6, y=(y.at(rank) + y.at(rank + 1)) / 2 + 4, class_="tick end"))
    parts.append(element("text", "rank", x=0.0, y=TOP - 8, class_="axis"))
    parts.append(element("text", "seconds, as measured", x=x.end, y=height - 3, class_="axis end"))
    words = f"Step {data['step']}: degrees {data['degrees']}, {len(data['batches'])} micro-batches"
    return element("svg", *parts, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=words)


def _group(
    group: Sequence[Any], start: float, x: Scale, y: Scale, degrees: Sequence[int], shows_samples: bool
) -> Iterator[Html]:
    """Draw a group: one bar, on it those of its samples, and its degree where there is room."""
    first, degree, seconds, tokens = group[0], group[1], group[6], group[10]
    if not tokens:
        return
    top, height = y.at(first), y.at(first + degree) - y.at(first)
    stop = colour_of(degree, degrees)
    left, total = x.at(start), sum(tokens)
    width = x.at(start + seconds) - left
    thin = " thin" if height < 4 else ""
    yield _rect(left, top, width, height, f"{stop}{thin}")  # so that nothing shines through between thin bars
    if shows_samples:
        for length in tokens:
            part = width * length / total
            yield _rect(left, top, part, height, f"sample {stop}{thin}")
            left += part
    if height >= 11 and width >= 14:
        yield element("text", str(degree), x=x.at(start) + 5, y=top + 12, class_=f"chip on-{stop}")


def _rect(left: float, top: float, width: float, height: float, kind: str) -> Html:
    return element("rect", x=left, y=top, width=width, height=height, class_=kind)


def _pattern() -> Html:
    """Return the hatching of ranks that wait."""
    lines = element("path", d="M0 6L6 0", class_="hatch")
    return element(
        "defs", element("pattern", lines, id="waiting-static", width=6, height=6, patternUnits="userSpaceOnUse")
    )


def _by_interest(rows: Sequence[StepRow]) -> Iterator[tuple[StepRow, str]]:
    """Give steps, and why, those that show most first; each once."""
    measured = [row for row in rows if not row.is_lockstep]
    off = [row for row in rows if row.planned_s > 0]
    chosen = [
        (max(rows, key=lambda row: row.variety), "most degrees"),
        (rows[0], "first"),
        (rows[-1], "last"),
        (max(rows, key=lambda row: row.seconds), "slowest"),
        *([(max(measured, key=lambda row: row.idle_share), "most waiting")] if measured else []),
        *([(max(off, key=lambda row: row.seconds / row.planned_s), "furthest above its plan")] if off else []),
        (max(rows, key=lambda row: row.longest), "longest sample"),
        (max(rows, key=lambda row: row.tokens_per_s), "most tokens a second"),
    ]
    seen: dict[int, str] = {}
    for row, why in chosen:
        if row.step not in seen:
            seen[row.step] = why
            yield row, why
    # halves of halves: wherever the room ends, what was given lies evenly over the run
    size = 1 << (len(rows) - 1).bit_length()
    while size:
        for place in range(0, len(rows), size):
            if rows[place].step not in seen:
                seen[rows[place].step] = ""
                yield rows[place], ""
        size //= 2


def _short(seconds: float) -> float:
    """Round to four digits."""
    return float(f"{seconds:.4g}")
