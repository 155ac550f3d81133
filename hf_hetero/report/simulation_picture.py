"""This module draws a simulation: seconds of a step in each way beside the bound, and where samples and tokens are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hetero.report.drawing import (
    ACCENT,
    DEGREE_COLOURS,
    IDLE,
    INK,
    LENGTH_COLOURS,
    new_figure,
    printable,
    short,
    write_picture,
)
from hf_hetero.what_if.simulate import WAYS, Simulation, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TIMES = 4
"""Bars are drawn whole up to so many times ours; a longer one leaves the picture, so that the others can be told."""
BEHIND_TEXT: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def draw_simulation(simulation: Simulation, path: str | Path, title: str = "") -> None:
    """Draw a simulation into a .png or .svg file, under this title.

    Raises:
        HeteroError: another kind of file, or no matplotlib.
    """
    write_picture(lambda: simulation_figure(simulation, title), path)


def simulation_figure(simulation: Simulation, title: str = "") -> Figure:
    """Draw two panels. In an SVG a way's bar has the id `way-<name>`, and the bound's line `bound`."""
    figure, ways = new_figure(10, 1.5 + 0.42 * len(simulation.ways), (1, 2), width_ratios=(3, 2))
    _draw_ways(ways, simulation)
    _draw_lengths(figure.axes[1], simulation)
    if title:
        options: dict[str, Any] = {"parse_math": False}  # a `$` in a file's name is no formula
        figure.suptitle(printable(title), x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK, **options)
    return figure


def _draw_ways(axes: Axes, simulation: Simulation) -> None:
    """Draw a bar for each way, its idle part in light grey."""
    steps = simulation.num_steps
    adaptive = sum(simulation.ways["adaptive"].seconds)
    gap = ratio(adaptive, sum(simulation.bound_s)) - 1
    slowest = max(min(sum(way.seconds), MOST_TIMES * adaptive) for way in simulation.ways.values()) / steps
    for row, (name, way) in enumerate(simulation.ways.items()):
        seconds, idle = sum(way.seconds) / steps, way.idle_share
        axes.barh(row, seconds, 0.66, color=IDLE)
        busy = axes.barh(row, seconds * (1 - idle), 0.66, color=ACCENT if name == "adaptive" else DEGREE_COLOURS[1])[0]
        busy.set_gid(f"way-{name}")
        note = f"  ({way.note})" if way.note else ""
        words = (
            f",  {ratio(seconds * steps, adaptive):.2f}x{note}"
            if name != "adaptive"
            else f",  within {gap:.1%} of optimal"
        )
        text = f"{f'{seconds:#.3g}'.rstrip('.')} s{words}"
        end = min(seconds, slowest) + 0.015 * slowest  # a bar that leaves the picture has its text on it
        axes.text(end, row, text, va="center", fontsize=8, color=INK, clip_on=True, bbox=BEHIND_TEXT)
    bound, right = sum(simulation.bound_s) / steps, 1.8 * slowest or 1
    axes.axvline(bound, color=INK, linewidth=1, linestyle=(0, (4, 2))).set_gid("bound")
    axes.text(bound + 0.01 * right, -0.68, f"no way takes less than {bound:#.3g} s", va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, right), ylim=(len(simulation.ways) - 0.4, -1.05))
    axes.set_yticks(range(len(simulation.ways)), [WAYS[name] for name in simulation.ways])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("predicted seconds a step.   Light grey: ranks that wait")


def _draw_lengths(axes: Axes, simulation: Simulation) -> None:
    """Draw the shares of samples and of tokens by length, in powers of two."""
    places = range(len(simulation.bins))
    samples = [100 * length_bin.num_samples / simulation.num_samples for length_bin in simulation.bins]
    tokens = [100 * length_bin.num_tokens / simulation.num_tokens for length_bin in simulation.bins]
    axes.bar([place - 0.2 for place in places], samples, 0.4, color=LENGTH_COLOURS[1], label="samples")
    axes.bar([place + 0.2 for place in places], tokens, 0.4, color=LENGTH_COLOURS[3], label="tokens")
    names = [short(length_bin.most_tokens) for length_bin in simulation.bins]
    every = -(-len(names) // 9)  # more names than nine would overlap
    axes.set_xticks(places[::every], names[::every])
    axes.set(xlabel="tokens of a sample, at most", ylabel="% of all", ylim=(0, 1.2 * max(*samples, *tokens)))
    axes.legend(loc="upper left", ncols=2)
