"""The page of a run: numbers stand where they belong, text stays text, and a long run on many ranks stays small."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs_to_report import BATCHES, COST, HOSTILE, data_of, many_steps, named, page_of, records_of, write_run

from hf_hetero import Planner
from hf_hetero.plan import METHODS, Group, MicroBatch, Plan
from hf_hetero.report import read_records
from hf_hetero.report.page import axes, palette, timeline
from hf_hetero.report.page.charts import Line, bars_chart, buckets, lengths_chart, lines_chart
from hf_hetero.report.page.markup import Html, data_block, element
from hf_hetero.report.page.page import make_page
from hf_hetero.report.report import summary
from hf_hetero.report.rows import bin_start, length_bin, row_of
from hf_hetero.report.run import Run, read_run, run_of
from hf_hetero.report.static_runs import knows, static_runs
from hf_hetero.what_if.simulate import simulate

# ------------------------------------------------------------------------------------------------------- text is text


class Tags(HTMLParser):
    """Collects the elements of a page, with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, sorted(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    """Whatever a model, setting, column or cost model is called, the page has the elements that it has otherwise."""
    harmless, hostile = Tags(named("harmless", tmp_path / "a")), Tags(named(HOSTILE, tmp_path / "b"))
    assert hostile.found == harmless.found
    assert HOSTILE.replace("\u2028", "") in hostile.text.replace("\u2028", ""), "and shows it as it is called"


def test_markup_would_be_noticed() -> None:
    """An element that is put in as text is one more."""
    assert Tags("<p>a</p>").found != Tags(f"<p>{HOSTILE}</p>").found


def test_elements_escape_text_only() -> None:
    """Elements are kept, text and attributes are escaped, data cannot end their block."""
    inner = element("b", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert element("p", inner, "<i>", title='"<') == '<p title="&quot;&lt;"><b>&lt;i&gt;</b>&lt;i&gt;</p>'
    assert isinstance(inner, Html)
    assert element("rect", x=0.12345, y=2.0, class_="a", stroke_width=None) == '<rect x="0.12" y="2" class="a"/>'
    block = data_block("data", [HOSTILE])
    assert block.count("<") == 2
    assert json.loads(block[block.index(">") + 1 : block.rindex("<")]) == [HOSTILE]


# ------------------------------------------------------------------------------------------------ what a run has said


def test_the_page_says_what_the_run_said(tmp_path: Path) -> None:
    """Model, settings, loss, memory and status come from what lies beside the records."""
    settings = {"Model": {"name": "tiny-llama"}, "Training": {"learning_rate": 0.02}, "Versions": {"torch": "2.13"}}
    page = page_of(write_run(tmp_path, records_of(), settings=settings, num_steps=40, has_ended=False))
    text = Tags(page).text
    for words in ("tiny-llama", "learning_rate", "0.02", "2.13", "in progress, or cut short", "step 3 of 40"):
        assert words in text, words
    assert "8 at step 1, 6 at 3" in text
    assert "3 GiB at most" in text
    assert {"loss", "memory", "speed", "seconds", "samples", "tokens"} <= data_of(page)["charts"].keys()
    ended = page_of(write_run(tmp_path, records_of(), settings=settings, num_steps=3, has_ended=True))
    assert "in progress" not in Tags(ended).text


@pytest.mark.parametrize("cut", [0, 40, 400])
def test_a_run_in_progress_has_a_page(tmp_path: Path, cut: int) -> None:
    """While a line is being written, the steps before it are shown, with or without the other files."""
    folder = write_run(tmp_path, records_of(), num_steps=40, has_ended=False)
    whole = (folder / "plans.jsonl").read_text()
    with (folder / "plans.jsonl").open("a") as file:
        file.write(whole[:cut])
    assert data_of(page_of(folder))["steps"][-1]["step"] == 3
    (folder / "run.json").unlink()
    (folder / "logs.jsonl").unlink()
    page = page_of(folder)
    assert len(data_of(page)["steps"]) == 3
    assert "in progress" not in Tags(page).text, "nobody said so"


ODD = [None, True, -1, 1.5, 10**400, "x", [], [[]], {}, {"a": 1}, {"a": {"b": [1]}}, {"a": {}}]


@pytest.mark.parametrize("name", ["format", "settings", "num_steps", "has_ended", "cost_model"])
def test_odd_files_beside_the_records_cost_no_page(tmp_path: Path, name: str) -> None:
    """Whatever the other files hold, there is a page of the steps."""
    for value in ODD:
        folder = write_run(tmp_path, records_of(), **{name: value})
        (folder / "logs.jsonl").write_text(f'{json.dumps({"step": value, "loss": value})}\n[]\n{{"step": 1\n')
        assert len(data_of(page_of(folder))["steps"]) == 3
    for content in ("[]", "{", "", "nan", "\0", "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        (tmp_path / "logs.jsonl").write_text(content)
        assert len(data_of(page_of(tmp_path))["steps"]) == 3


def test_a_run_is_read_as_its_records_are(tmp_path: Path) -> None:
    """Reading a row a step gives the numbers of whole records; of a step trained twice, the last counts."""
    records = records_of()
    again = {**records[1], "seconds": 7.0}
    run = read_run(write_run(tmp_path, [*records, again]))
    expected = read_records(tmp_path)
    assert list(run.rows) == [row_of(record) for record in expected]
    assert run.rows[1].seconds == 7.0
    assert [run.record_of(step) for step in (1, 2, 3)] == expected


# ------------------------------------------------------------------------------------------------------ charts, scales


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (1, 40), (0, 9999), (0, 3e-7), (5, 5), (0, 1e12), (3, 4)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    """They lie within the range, evenly, at multiples of their distance; whole ones are whole."""
    for least_step in (0.0, 1.0):
        ticks = axes.round_ticks(low, high, 5, least_step)
        assert 1 <= len(ticks) <= 7 or high == low
        assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in ticks)
        steps = {float(f"{b - a:.6g}") for a, b in pairwise(ticks)}
        assert len(steps) <= 1
        if least_step:
            assert all(tick == round(tick) for tick in ticks)


def test_numbers_are_short() -> None:
    """Three digits and a unit; lengths in thousands of 1024; seconds by what is read most easily."""
    assert [axes.number(v) for v in (0, 0.01234, 9.5, 99.96, 999.7, 12148, 1.44e6, 3e9)] == [
        *("0", "0.0123", "9.5", "100", "1K", "12.1K", "1.44M", "3G")
    ]
    assert [axes.tokens(n) for n in (1, 1023, 1024, 1536, 3 << 20)] == ["1", "1023", "1K", "1.5K", "3M"]
    assert [axes.duration(s) for s in (0.0123, 5.25, 245, 25920)] == ["12.3 ms", "5.25 s", "4:05 min", "7:12 h"]


def test_buckets_hold_every_point_once() -> None:
    """Neighbours are joined to their mean and range; nothing is dropped."""
    points = [(step, float(step % 7)) for step in range(1, 1001)]
    joint = buckets(points, 300)
    assert len(joint) <= 300
    assert [joint[0].first, joint[-1].last] == [1, 1000]
    assert all(a.last + 1 == b.first for a, b in pairwise(joint))
    total = sum(bucket.mean * (bucket.last - bucket.first + 1) for bucket in joint)
    assert total == pytest.approx(sum(value for _, value in points))
    assert (min(b.low for b in joint), max(b.high for b in joint)) == (0, 6)
    assert len(buckets(points, 5000)) == 1000


def test_a_line_goes_through_its_points() -> None:
    """A value stands at its share of the axis, whose top is a round number."""
    chart = lines_chart("a", "A", "words", [Line("a", "measured", [(1, 0.0), (2, 50.0), (3, 100.0)])], "s")
    (path,) = re.findall(r'<path d="M([^"]*)" class="line measured"', chart.picture)
    places = [tuple(map(float, point.split(","))) for point in path.split()]
    left, right, bottom = axes.LEFT, axes.WIDTH - axes.RIGHT, axes.HEIGHT - axes.BOTTOM
    assert places == [(left, bottom), ((left + right) / 2, (bottom + axes.TOP) / 2), (right, axes.TOP)]
    assert [words for _, words in chart.stops] == ["step 1\na 0 s", "step 2\na 50 s", "step 3\na 100 s"]
    assert chart.table == [["steps", "a, s"], ["1", "0"], ["2", "50"], ["3", "100"]]


def test_values_below_zero_have_their_place() -> None:
    """A loss may be negative: the axis goes down to a round number, and 0 has its line."""
    chart = lines_chart("a", "A", "words", [Line("a", "measured", [(1, -4.0), (2, 4.0)])], "s")
    (path,) = re.findall(r'<path d="M([^"]*)" class="line measured"', chart.picture)
    (_, low), (_, high) = (map(float, point.split(",")) for point in path.split())
    (zero,) = re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="base"', chart.picture)
    assert (low + high) / 2 == pytest.approx(float(zero))
    assert axes.upwards(-1.0, -3.0).high == 0
    assert axes.upwards(-1.0, -3.0).low <= -3


def test_stacked_bars_are_as_high_as_their_counts() -> None:
    """Heights are in the ratio of the counts, each in the colour of its degree."""
    chart = lengths_chart("a", "A", "words", {(1, 20): 30, (4, 20): 10, (1, 22): 20}, "samples", [1, 2, 4])
    bars = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="bar (ramp-\d+)"', chart.picture)
    heights = [float(height) for _, height, _ in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 1 / 3, 2 / 3], abs=1e-3)
    assert [colour for *_, colour in bars] == [palette.colour_of(degree, [1, 2, 4]) for degree in (1, 4, 1)]
    assert float(bars[1][0]) + heights[1] == pytest.approx(float(bars[0][0])), "one upon the other"
    assert bin_start(length_bin(1024)) == 1024


def test_bars_are_as_long_as_their_values() -> None:
    """And say by how much they are longer than the one they are compared with."""
    chart = bars_chart("a", "A", "words", [("ours", "ours", 2.0), ("theirs", "other", 3.0)], "s", 2.0)
    ours, theirs = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart.picture))
    assert theirs / ours == pytest.approx(1.5, abs=1e-3)
    assert "3 s   1.50x" in chart.picture


@pytest.mark.parametrize("anchors", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart_and_read_upon(anchors: tuple[str, ...]) -> None:
    """Lightness goes one way along the ramp, so that it is an order for all eyes; text on it has a contrast of 4.5."""
    css = palette.ramp_css(anchors)
    ramp = [re.findall(rf"--ramp-{k}:(#\w+)", css)[0] for k in range(palette.STOPS)]
    ground = "#ffffff" if anchors == palette.LIGHT else "#1a1f25"
    against = [palette.contrast(colour, ground) for colour in ramp]
    assert against == sorted(against)
    texts = [re.findall(rf"--on-{k}:(#\w+)", css)[0] for k in range(palette.STOPS)]
    assert min(map(palette.contrast, ramp, texts)) >= 4.5
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    for number in range(2, 12):
        degrees = [2**k for k in range(number)]
        assert len({palette.colour_of(degree, degrees) for degree in degrees}) == number


# ------------------------------------------------------------------------------------------------------------ timeline


def test_a_timeline_holds_the_step(tmp_path: Path) -> None:
    """Each sample is there once with its tokens, under its group's ranks, method and seconds."""
    record = records_of()[0]
    plan, lengths = Plan.from_dict(record["plan"]), record["lengths"]
    data = timeline.timeline(record, COST)
    assert [len(groups) for groups in data["batches"]] == [len(m.groups) for m in plan.micro_batches]
    seen: dict[int, int] = {}
    for groups, micro_batch, busy in zip(data["batches"], plan.micro_batches, record["busy_s"], strict=True):
        for drawn, group in zip(groups, micro_batch.groups, strict=True):
            first, degree, method, _, _, least, most, predicted, exchange, samples, tokens = drawn
            assert (first, degree) == (group.ranks[0], group.degree)
            assert method == (group.method if group.degree > 1 else "")
            assert [least, most] == pytest.approx([f(busy[r] for r in group.ranks) for f in (min, max)], rel=1e-3)
            assert predicted == pytest.approx(COST.group_seconds(group, lengths), rel=1e-3)
            assert exchange == pytest.approx(COST.charges(group, lengths).exchange_s, rel=1e-3)
            seen |= dict(zip(samples, tokens, strict=True))
    assert seen == dict(enumerate(lengths))


def test_a_cost_model_that_knows_no_such_plan_predicts_nothing() -> None:
    """A degree that it lacks is drawn as measured; nothing is compared with static runs."""
    other = replace(COST, all_to_all_bytes_per_s={2: 1e8})
    record = records_of()[0]
    assert max(group[1] for groups in timeline.timeline(record, COST)["batches"] for group in groups) == 4
    assert {group[7] for groups in timeline.timeline(record, other)["batches"] for group in groups} == {None}
    run = Run([row_of(record)], lambda step: record, cost_model=other)
    assert static_runs(run) is None
    assert make_page(run, summary(run.rows))


def test_plans_of_every_method_are_drawn() -> None:
    """Each has its words; a cost model that does not know of queries cannot tell what lending them takes."""
    assert tuple(timeline.METHODS) == METHODS
    knowing = replace(COST, kv_bytes_per_token=8.0, query_bytes_per_token=4.0)
    plan = Plan(2, (MicroBatch((Group((0, 1), (0,), "token_ring"),)),))
    assert knows(knowing, plan)
    assert not knows(replace(knowing, query_bytes_per_token=None), plan)
    assert knows(COST, Plan(2, (MicroBatch((Group((0,), (0,), "token_ring"), Group((1,), ()))),)))


def test_the_picture_without_a_script_has_each_sample() -> None:
    """Widths are tokens' shares of the measured seconds; a step of very many samples shows its groups."""
    record = records_of()[1]
    data = timeline.timeline(record, None)
    svg = timeline.timeline_svg(data, [1, 2, 4])
    assert svg.count('class="sample') == len(record["lengths"])
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="[\d.]+" class="sample', svg)]
    groups = [group for groups in data["batches"] for group in groups if group[9]]
    total = sum(max(group[6] for group in groups) for groups in data["batches"])
    expected = [g[6] * n / sum(g[10]) for g in groups for n in g[10]]
    scale = (timeline.WIDTH - 8 - timeline.LEFT) / total
    assert widths == pytest.approx([scale * seconds for seconds in expected], abs=0.02)


def test_ten_thousand_steps_on_a_thousand_ranks_are_small() -> None:
    """The page stays under 5 MB, says how many steps it keeps whole, and keeps the first and the last."""
    run = many_steps(10_000, 1024, 4096)
    page = make_page(run, summary(run.rows))
    assert len(page.encode()) < 5_000_000
    kept = [step["step"] for step in data_of(page)["steps"]]
    assert f"{len(kept)} of 10,000 steps are kept whole" in page
    assert len(kept) >= 10
    assert {1, 10_000} <= set(kept)
    assert max(b - a for a, b in pairwise(kept)) < 3000, "and others evenly over the run"


def test_a_short_run_is_kept_whole() -> None:
    """Any of its steps can be looked at."""
    run = many_steps(150, 8, 64)
    page = make_page(run, summary(run.rows))
    assert [step["step"] for step in data_of(page)["steps"]] == list(range(1, 151))
    assert "All 150 steps are kept on this page" in page


# -------------------------------------------------------------------------------------------------------- static runs


def test_static_runs_are_those_of_a_simulation(tmp_path: Path) -> None:
    """What a static run would have cost is what `simulate` predicts of the same batches, on the same machine."""
    run = read_run(write_run(tmp_path, records_of()))
    found = static_runs(run)
    assert found is not None
    expected = simulate(BATCHES, Planner(COST, 4))
    assert found.by_degree == pytest.approx(expected.static_s)
    assert found.planned_s == pytest.approx(sum(expected.ways["adaptive"].seconds))
    assert found.by_degree[found.best] == pytest.approx(sum(expected.ways["static"].seconds))
    assert 1 not in found.by_degree, "one rank does not hold the longest sample"
    page = page_of(tmp_path)
    assert f"{found.speedup:.2f} x as long" in page
    assert "one cost model (a machine, measured)" in page


def test_images_are_predicted_as_they_were_planned() -> None:
    """Seconds of groups, and of runs with one degree, are of planned lengths; tokens stay those of the samples."""
    [record] = records_of([[4000, 900, 800, 3000]])
    as_text = [4000, 2900, 800, 3000]
    plan = Planner(COST, 4).plan(as_text)
    seeing = {**record, "plan": plan.to_dict(), "planned_lengths": as_text}
    seeing["busy_s"] = [[1.0] * 4 for _ in plan.micro_batches]
    drawn = timeline.timeline(seeing, COST)
    predicted = [group[7] for groups in drawn["batches"] for group in groups]
    assert predicted == pytest.approx([COST.group_seconds(group, as_text) for group in plan.groups], rel=1e-3)
    assert sorted(n for groups in drawn["batches"] for group in groups for n in group[10]) == [800, 900, 3000, 4000]
    found = static_runs(run_of([seeing], COST))
    assert found is not None
    assert found.planned_s == pytest.approx(plan.seconds)
    best = Planner(COST, 4).static(as_text)
    assert found.by_degree[found.best] == pytest.approx(best.seconds)
