"""The whole page of a run, from its head to its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_hetero.report.page import palette, timeline
from hf_hetero.report.page.axes import duration, number
from hf_hetero.report.page.charts import MOST_POINTS, legend_of, table_of
from hf_hetero.report.page.markup import Html, data_block, element, joined
from hf_hetero.report.page.sections import charts, measured_to_planned
from hf_hetero.report.page.timeline import Timeline
from hf_hetero.report.rows import by_degree, totals
from hf_hetero.report.run import Run
from hf_hetero.report.static_runs import StaticRuns, static_runs

FOLDER = Path(__file__).parent


def make_page(run: Run, numbers: Mapping[str, str]) -> str:
    """Make the page of a run.

    Args:
        run: with a step at least.
        numbers: of the run as a whole, by name, as text.
    """
    kept, static = timeline.timelines(run), static_runs(run)
    degrees = sorted(by_degree(totals(row.samples for row in run.rows)))
    drawn = charts(run, static, degrees)
    data: dict[str, Any] = {
        "charts": {chart.name: chart.data() for chart in drawn if chart.stops},
        "steps": [one.data for one in kept],
        "weights": timeline.weights(run.cost_model),
        "methods": timeline.METHODS,
        "colours": {str(degree): palette.colour_of(degree, degrees) for degree in degrees},
    }
    body = element(
        "main",
        _header(run, static),
        element("h2", "Over the run", id="run"),
        element("p", _how_aggregated(run)),
        element("div", *(chart.to_html() for chart in drawn), class_="charts"),
        *_steps(run, kept, degrees),
        *_settings(run, numbers),
    )
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return _document(
        title_of(run), element("a", "Skip to the timeline", href="#steps", class_="skip"), body, data, script
    )


def title_of(run: Run) -> str:
    """Name a run by its model, if that is known."""
    return run.settings.get("Model", {}).get("name") or "A run"


def _document(title: str, skip: Html, body: Html, data: Mapping[str, Any], script: str) -> str:
    """Put head, body and script together. Nothing but this script may run, and nothing may load."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    ramps = (
        f":root{{{palette.ramp_css(palette.LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{palette.ramp_css(palette.DARK)}}}}}"
    )
    for stop in range(palette.STOPS):
        ramps += f".ramp-{stop}{{fill:var(--ramp-{stop});background:var(--ramp-{stop})}}"
        ramps += f"svg .on-ramp-{stop}{{fill:var(--on-{stop})}}"
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} · hf-hetero"),
        element("style", Html(f"\n{style}{ramps}\n")),
    )
    ending = joined(skip, body, data_block("data", data), Html(f"<script>{script}</script>"))
    return f"<!DOCTYPE html>\n{element('html', head, element('body', ending), lang='en')}\n"


def _header(run: Run, static: StaticRuns | None) -> Html:
    """Say what run this is, how far it is, and what it comes to."""
    rows = run.rows
    tokens = sum(row.num_tokens for row in rows)
    seconds = sum(row.seconds + row.wait_s for row in rows)
    measured = [row.idle_share for row in rows if not row.is_lockstep]
    status = {True: ("ended", "ended"), False: ("open", "in progress, or cut short"), None: ("", "")}[run.has_ended]
    of = f" of {run.num_steps:,}" if run.num_steps else ""
    lead = f"{len(rows):,} steps on {rows[0].num_ranks:,} ranks, up to step {rows[-1].step:,}{of}."
    tiles = [
        (number(tokens / seconds if seconds > 1e-9 else 0), "tokens/s", "of all ranks, waits included"),
        (number(tokens), "tokens", f"in {sum(row.num_samples for row in rows):,} samples"),
        (duration(seconds), "", "of training, waits included"),
        *([(f"{100 * sum(measured) / len(measured):.0f}", "%", "of the rank-seconds waiting")] if measured else []),
        *([(f"{ratio:.2f}", "x", "measured by planned")] if 0 < (ratio := measured_to_planned(rows)) < 1e9 else []),
        *(
            [(f"{static.speedup:.2f}", "x", f"as planned: the best static run (degree {static.best}), predicted")]
            if static
            else []
        ),
    ]
    return element(
        "header",
        element("p", "hf-hetero · report of a run", class_="eyebrow"),
        element("h1", title_of(run)),
        element(
            "p", *([element("span", status[1], class_=f"status {status[0]}")] if status[0] else []), lead, class_="lead"
        ),
        element("br"),
        element(
            "dl",
            *(
                element("div", element("dt", words), element("dd", value, *([element("small", unit)] if unit else [])))
                for value, unit, words in tiles
            ),
            class_="tiles",
        ),
    )


def _how_aggregated(run: Run) -> str:
    """Say how a chart shows the steps, and how it is read."""
    every = -(-len(run.rows) // MOST_POINTS)
    joint = f" Each point of a line is the mean of {every} steps, the band behind it their range." if every > 1 else ""
    return f"Each chart's numbers are below it; point at it, or focus it and use the arrow keys, to read them.{joint}"


def _steps(run: Run, kept: Sequence[Timeline], degrees: Sequence[int]) -> list[Html]:
    """Show the steps that are kept whole: controls, which only the script can serve, and the picture of one."""
    show = max(kept, key=lambda one: (one.why == "most degrees", -one.step))
    whole = (
        f"All {len(kept):,} steps are kept on this page."
        if len(kept) == len(run.rows)
        else f"{len(kept):,} of {len(run.rows):,} steps are kept whole on this page: those that stand out, which are "
        "named, and others evenly over the run."
    )
    weights = "predicted work" if run.cost_model is not None else "tokens"
    words = (
        "Ranks from top to bottom, seconds from left to right; a block is a group's sample, its colour the degree: the "
        f"ranks that share it. Samples share their group's seconds by their {weights}. {whole}"
    )
    options = [
        element(
            "option",
            f"{one.step:,}{f' · {one.why}' if one.why else ''}",
            value=str(place),
            selected="selected" if one is show else None,
        )
        for place, one in enumerate(kept)
    ]
    planned = [element("option", "as measured", value="measured"), element("option", "as planned", value="planned")]
    controls = element(
        "div",
        element("button", "← earlier", id="before", type="button"),
        element("label", "step ", element("select", *options, id="step")),
        element("button", "later →", id="after", type="button"),
        element("label", "seconds ", element("select", *planned, id="shown")),
        element("label", "ranks ", element("select", element("option", "all", value="all"), id="ranks")),
        class_="steps",
        id="controls",
        hidden="hidden",
    )
    keys = ("Tab", "to the timeline, "), ("← ↑ → ↓", "from sample to sample, "), ("Page Down", "to the next step.")
    legend = [(f"block {palette.colour_of(degree, degrees)}", f"degree {degree}") for degree in degrees]
    legend.append(("waiting", "waiting for the slowest group"))
    if run.cost_model is not None:
        legend.append(("fixed", "fixed part of a group, predicted"))
    return [
        element("h2", "Step by step", id="steps"),
        element("p", words),
        element(
            "figure",
            controls,
            element("p", f"Step {show.step:,}: {show.data['degrees']}", class_="facts", id="facts"),
            legend_of(legend),
            element("div", timeline.timeline_svg(show.data, degrees), class_="timeline", id="timeline"),
            element(
                "p",
                *(joined(element("kbd", key), f" {what}") for key, what in keys),
                class_="hint",
                id="hint",
                hidden="hidden",
            ),
            table_of(timeline.table_rows(show.data)[:400], f"Groups of step {show.step:,}"),
        ),
    ]


def _settings(run: Run, numbers: Mapping[str, str]) -> list[Html]:
    """List what is known of the run, as tables."""

    def listed(heading: str, values: Mapping[str, str]) -> Html:
        rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in values.items()]
        return element("table", element("caption", heading), element("tbody", *rows))

    tables = [listed("Numbers", numbers), *(listed(name, values) for name, values in run.settings.items())]
    if run.cost_model is not None:
        cost = run.cost_model
        about = {
            "name": cost.name or "unnamed",
            "seconds": cost.provenance or "not said",
            "source": cost.source or "not said",
            "tokens a rank": f"{cost.capacity_tokens:,}",
            "memory a rank": f"{cost.memory_bytes_per_rank / 2**30:.3g} GiB",
        }
        tables.append(listed("Cost model", about))
    return [
        element("h2", "Settings and numbers", id="settings"),
        element("p", "What was set, what it ran on, and the run in numbers."),
        element("div", *tables, class_="settings"),
    ]
