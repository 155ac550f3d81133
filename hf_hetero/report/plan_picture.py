"""This module draws one step, as PNG or SVG: ranks as rows, samples as bars, waiting in grey (`drawing`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hetero.costs import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Group, Plan, idle_share
from hf_hetero.report.drawing import FIXED, IDLE, INK, LENGTH_COLOURS, new_figure, short, write_picture
from hf_hetero.what_if.simulate import busy_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Busy = Sequence[Sequence[float]]
"""Seconds of each micro-batch (outer) on each rank (inner)."""


def draw_plan(
    plan: Plan,
    lengths: Sequence[int],
    cost_model: CostModel | None,
    path: str | Path,
    busy_s: Busy | None = None,
) -> None:
    """Draw one step: ranks as rows, time from left to right, a bar for each sample, light grey where a rank waits.

    Args:
        plan, lengths: of the step, and the tokens of each of its samples.
        cost_model: predicts the seconds of each group, and each sample's part in them.
        path: a .png or .svg file. In an SVG a sample's bar has the id `sample-<position in the global batch>`.
        busy_s: measured seconds of each micro-batch (outer) on each rank (inner); drawn instead of predicted ones.

    Raises:
        HeteroError: neither a cost model nor measured seconds, another kind of file, or no matplotlib.
    """
    if busy_s is None and cost_model is None:
        raise HeteroError("A plan is drawn from a cost model's seconds or from measured ones; neither was given.")
    write_picture(lambda: plan_figure(plan, lengths, cost_model, busy_s), path)


def plan_figure(
    plan: Plan, lengths: Sequence[int], cost: CostModel | None, busy_s: Busy | None = None, is_lockstep: bool = False
) -> Figure:
    """Draw the picture that `draw_plan` writes; under `is_lockstep` without the idle share, which nobody measured."""
    if busy_s is not None:
        # measured seconds have no fixed part, and no bound that was made for them
        cost, words = None, ["measured {:.3g} s", *([] if is_lockstep else ["idle {:.0%}"])]
    else:
        assert cost is not None
        bound = [f"within {100 * plan.gap:.1f} % of optimal"] if plan.lower_bound_s > 0 else []
        words = ["predicted {:.3g} s", "idle {:.0%}", *bound]
        busy_s = busy_seconds(plan, lengths, cost)
    total = sum(map(max, busy_s))
    figure, axes = new_figure(10, 1.4 + min(max(0.36 * plan.num_ranks, 1.4), 9))
    colours = _length_colours(figure, axes, lengths)
    start = 0.0
    for micro_batch, seconds in zip(plan.micro_batches, busy_s, strict=True):
        axes.broken_barh([(start, max(seconds))], (-0.5, plan.num_ranks), facecolors=IDLE)
        for group in micro_batch.groups:
            # ranks of a group wait for each other inside every layer, so that the slowest one's seconds are the group's
            parts = _parts(group, lengths, cost, max(seconds[rank] for rank in group.ranks))
            _draw_group(axes, group, parts, lengths, start, total, colours)
        start += max(seconds)
        axes.axvline(start, color=INK, linewidth=0.8)
    rows = range(0, plan.num_ranks, max(1, plan.num_ranks // 16))
    axes.set(xlim=(0, total or 1), ylim=(plan.num_ranks - 0.5, -0.5), ylabel="rank", yticks=rows)
    grey = "Light grey: waiting." if cost is None else "Light grey: waiting; darker: fixed cost."
    axes.set_xlabel(f"seconds.   In a group's corner: its degree, the ranks that share its samples.   {grey}")
    title = "     ".join(words).format(total, idle_share(busy_s))
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return figure


def _parts(group: Group, lengths: Sequence[int], cost_model: CostModel | None, seconds: float) -> list[float]:
    """Return the seconds before the first sample, then of each sample, of a group that takes `seconds`."""
    tokens = [lengths[sample] for sample in group.samples]
    if cost_model is None:
        return [0.0, *(seconds * length / sum(tokens) for length in tokens)]
    return [cost_model.fixed_s(group.degree), *(cost_model.work(n, group.degree) / group.degree for n in tokens)]


def _draw_group(
    axes: Axes, group: Group, parts: list[float], lengths: Sequence[int], start: float, total: float, colours: Any
) -> None:
    """Draw a group from `start` seconds on: its fixed part, a bar for each sample, a frame, and its degree."""
    first, degree, left = group.ranks[0] - 0.5, group.degree, start + parts[0]
    axes.broken_barh([(start, parts[0])], (first, degree), facecolors=FIXED)
    # the longest first, where the eye begins
    for sample, seconds in sorted(zip(group.samples, parts[1:], strict=True), key=lambda item: -lengths[item[0]]):
        face = colours.to_rgba(lengths[sample])
        bar = axes.barh(first + degree / 2, seconds, degree, left, color=face, edgecolor="white", linewidth=0.6)[0]
        bar.set_gid(f"sample-{sample}")
        if seconds > 0.06 * total:  # in a narrower bar the words would overlap
            ink = "white" if sum(face[:3]) < 1.7 else INK  # what can be read on this colour
            middle = (left + seconds / 2, first + degree / 2)
            axes.text(*middle, short(lengths[sample]), color=ink, ha="center", va="center")
        left += seconds
    axes.broken_barh([(start, left - start)], (first, degree), facecolors="none", edgecolors="white", linewidth=2)
    chip = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": INK, "linewidth": 0.5}
    axes.text(start + 0.006 * total, first + 0.12, str(degree), va="top", fontsize=7, color=INK, bbox=chip)


def _length_colours(figure: Figure, axes: Axes, lengths: Sequence[int]) -> Any:
    """Return the colours of lengths, on a logarithmic scale, and draw the scale beside the axes."""
    from matplotlib import cm, colors

    least, most = min(lengths, default=1), max(lengths, default=1)
    norm = colors.LogNorm(least, max(most, least + 1))
    colours = cm.ScalarMappable(norm, colors.LinearSegmentedColormap.from_list("lengths", LENGTH_COLOURS))
    bar = figure.colorbar(colours, ax=axes, pad=0.01, aspect=25, label="tokens of a sample")
    ticks = sorted({least, most} | {4**k for k in range(16) if 1.6 * least < 4**k < 0.7 * most})
    bar.ax.set_yticks(ticks, [short(tick) for tick in ticks])
    bar.ax.minorticks_off()
    return colours
