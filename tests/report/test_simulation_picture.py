"""The picture shows the simulation's numbers and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from what_if.test_simulate import BATCHES, simulated

from hf_hetero import CostModel, Planner
from hf_hetero.report.simulation_picture import draw_simulation, simulation_figure
from hf_hetero.what_if.simulate import WAYS, simulate


def bars(figure: Any) -> dict[str, float]:
    """Width of each way's busy part, by the way's name."""
    return {p.get_gid().removeprefix("way-"): p.get_width() for p in figure.axes[0].patches if p.get_gid()}


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[1:2]], ids=["without padded", "with padded"])
def test_bars_are_seconds(batches: list[list[int]]) -> None:
    """Each way has one bar, its coloured part as long as its ranks compute, and the bound stands where it is."""
    simulation = simulated(batches)
    figure = simulation_figure(simulation, "a title")
    steps = len(batches)
    assert list(bars(figure)) == list(simulation.ways)
    for name, way in simulation.ways.items():
        assert bars(figure)[name] == pytest.approx(sum(way.seconds) / steps * (1 - way.idle_share))
    (line,) = (line for line in figure.axes[0].lines if line.get_gid() == "bound")
    assert line.get_xdata()[0] == pytest.approx(sum(simulation.bound_s) / steps)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [WAYS[w] for w in simulation.ways]


def test_every_way_has_its_bar() -> None:
    """Where every way is there is to be compared, padding, heads alone and unknown speeds too, each is drawn."""
    cost = replace(CostModel.load("llama-8b_8xh200_nvlink"), rank_speeds={3: 0.8})
    simulation = simulate([[4000, 300, 20], [90] * 9], Planner(cost, 8))
    assert list(simulation.ways) == list(WAYS)
    figure = simulation_figure(simulation)
    assert list(bars(figure)) == list(WAYS)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(WAYS.values())


def test_words_are_the_ratios() -> None:
    """Every other way says how many times as long it takes; ours how far from optimal it may be."""
    simulation = simulated(BATCHES)
    data = simulation.to_dict()["ways"]
    words = [text.get_text() for text in simulation_figure(simulation).axes[0].texts]
    for name, way in data.items():
        expected = f"{way['speedup_of_adaptive']:.2f}x"
        if name == "adaptive":
            expected = f"within {way['ratio_to_bound'] - 1:.1%} of optimal"
        assert any(expected in text for text in words)
    assert any("(degree 4)" in text for text in words)


def test_lengths_add_up() -> None:
    """Both histograms hold everything: 100 % of the samples and 100 % of the tokens."""
    figure = simulation_figure(simulated(BATCHES))
    for shares in figure.axes[1].containers:
        assert sum(bar.get_height() for bar in shares) == pytest.approx(100)


def test_file(tmp_path: Path) -> None:
    """An SVG is well-formed and names its bars."""
    draw_simulation(simulated(BATCHES), tmp_path / "simulation.svg")
    ids = {element.get("id") for element in ElementTree.parse(tmp_path / "simulation.svg").iter()}
    assert ids >= {"bound", "way-adaptive", "way-static", "way-batch-static", "way-dynamic-cp"}
