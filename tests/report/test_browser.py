"""The page in a real browser: it complains of nothing, can be read with mouse, keys or neither, and runs no name.

Skipped where there is no Chromium (`tests/browser.py` says where it is looked for).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser_path, browsing
from runs_to_report import HOSTILE, data_of, many_steps, named, page_of, records_of, write_run

from hf_hetero.report.page.page import make_page
from hf_hetero.report.report import summary

CHROMIUM = browser_path()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert CHROMIUM is not None
    with browsing(CHROMIUM) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.errors.clear()
    browser.requests.clear()
    return browser


def tip(page: Page, where: str) -> str:
    """What is said over a chart or the timeline; empty where nothing is."""
    return page.run(f"(t => t && !t.hidden ? t.textContent : '')(document.querySelector('{where} .tip'))")


def focus(page: Page, where: str) -> None:
    page.run(f"document.querySelector('{where}').focus()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_loads_without_a_complaint(page: Page, tmp_path: Path, scheme: str, width: int) -> None:
    """No error, no request but the file itself, nothing wider than the window, and text that can be seen."""
    write_run(tmp_path, records_of(), settings={"Model": {"name": "tiny"}}, num_steps=9, has_ended=False)
    page_of(tmp_path)
    page.look(width, 900, scheme)
    page.open(tmp_path / "report.html")
    assert page.errors == []
    assert [url.rpartition("/")[2] for url in page.requests] == ["report.html"]
    assert page.run("document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.body)"
    assert page.run(f"{style}.backgroundColor") == ("rgb(250, 249, 246)" if scheme == "light" else "rgb(19, 23, 27)")
    assert page.run("document.querySelectorAll('#timeline .sample').length") == len(records_of()[1]["lengths"])
    clipped = "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().left < 0).length"
    assert page.run(clipped) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_it_is_light(page: Page, tmp_path: Path, scheme: str) -> None:
    """Dark colours are of screens: they would print as a black sheet. What can only be clicked is left out."""
    write_run(tmp_path, records_of())
    page_of(tmp_path)
    page.look(1200, 900, scheme)
    page.open(tmp_path / "report.html")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", media="print", features=features)
    try:
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 246)"
        bar = "getComputedStyle(document.querySelector('#timeline .sample')).fill"
        on_paper = page.run(bar)
        assert page.run("document.getElementById('controls').offsetHeight") == 0
        assert page.run("document.querySelectorAll('#timeline .sample').length") == len(records_of()[1]["lengths"])
        page.call("Emulation.setEmulatedMedia", media="", features=features)
        assert (page.run(bar) == on_paper) == (scheme == "light")
    finally:
        page.call("Emulation.setEmulatedMedia", media="", features=[])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_page_of_a_run_that_goes_on(page: Page, tmp_path: Path, share: float) -> None:
    """The last record is written only in part: the steps before are shown, and that the run has not ended."""
    folder = write_run(tmp_path, records_of(), num_steps=9, has_ended=False)
    text = (folder / "plans.jsonl").read_text()
    last = text.splitlines()[-1]
    (folder / "plans.jsonl").write_text(text[: -1 - round(len(last) * (1 - share))])
    page_of(folder)
    page.look(1200, 900)
    page.open(folder / "report.html")
    shown = page.run("document.body.innerText")
    assert "in progress, or cut short" in shown
    assert "up to step 2 of 9" in shown
    assert page.run("document.querySelectorAll('#step option').length") == 2
    assert page.errors == []


def test_the_mouse_reads_values(page: Page, tmp_path: Path) -> None:
    """Over a chart stand a step's values, over the timeline a sample with its group; beside them nothing."""
    write_run(tmp_path, records_of()[2:])
    page_of(tmp_path)
    page.look(1200, 2600)
    page.open(tmp_path / "report.html")
    where = "(b => [b.x, b.y, b.width, b.height])(document.querySelector('[data-chart=loss]').getBoundingClientRect())"
    x, y, width, height = page.run(where)
    page.point_at(x + width - 15, y + height / 2)
    assert tip(page, "[data-chart=loss]") == "step 3\nloss 6"
    page.run("window.widthOf = e => e.width.baseVal.value")
    widest = "[...document.querySelectorAll('#timeline .sample')].sort((a, b) => widthOf(b) - widthOf(a))[0]"
    x, y, width, height = page.run(f"(b => [b.x, b.y, b.width, b.height])({widest}.getBoundingClientRect())")
    page.point_at(x + width / 2, y + height / 2)
    assert tip(page, "[data-chart=loss]") == ""
    lines = tip(page, "#timeline").splitlines()
    assert lines[0].startswith("sample 0: 4,000 tokens, ")
    (group,) = [g for m in records_of()[2]["plan"]["micro_batches"] for g in m["groups"] if 0 in g["samples"]]
    assert lines[1].startswith(f"degree {len(group['ranks'])}, ranks {group['ranks'][0]} to {group['ranks'][-1]}, ")
    assert lines[2].startswith(f"{group['method']}: ")
    assert "samples" in lines[-1]
    assert "predicted" in lines[-1]
    page.point_at(5, 5)
    assert tip(page, "#timeline") == ""


def test_the_keyboard_reads_values(page: Page, tmp_path: Path) -> None:
    """Tab reaches charts, choices and timeline; arrows go through all values and samples; what is read is also said."""
    write_run(tmp_path, records_of())
    page_of(tmp_path)
    page.look(1200, 900)
    page.open(tmp_path / "report.html")
    reached: set[str] = set()
    for _ in range(60):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.dataset.chart || ''"))
    assert {"speed", "loss", "seconds", "samples", "tokens", "before", "step", "after", "shown", "timeline"} <= reached
    focus(page, "[data-chart=loss]")
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home"):
        page.press(key)
        said.append(tip(page, "[data-chart=loss]").split("\n")[0])
    assert said == ["step 1", "step 2", "step 3", "step 3", "step 2", "step 1"]
    assert page.run("document.querySelector('[data-chart=loss] [aria-live]').textContent").startswith("step 1")
    page.press("Escape")
    assert tip(page, "[data-chart=loss]") == ""
    focus(page, "#timeline")
    samples: set[str] = set()
    for key in ["Home", *["ArrowRight"] * 8, *["ArrowDown"] * 4, *["ArrowLeft"] * 8, *["ArrowUp"] * 4, "End"]:
        page.press(key)
        samples.add(tip(page, "#timeline").split(":")[0])
        assert page.run("document.querySelectorAll('#timeline .here').length") == 1
    assert len(samples) >= 4
    assert all(name.startswith("sample ") for name in samples)
    assert page.errors == []


def test_steps_can_be_chosen(page: Page, tmp_path: Path) -> None:
    """The buttons, Page Down and the list go through the steps; what was planned is drawn beside what was measured."""
    write_run(tmp_path, records_of())
    page_of(tmp_path)
    page.look(1200, 900)
    page.open(tmp_path / "report.html")
    bars = "document.querySelectorAll('#timeline .sample').length"
    assert page.run("document.getElementById('step').value") == "1"
    page.run("document.getElementById('before').click()")
    assert page.run(bars) == 4
    assert page.run("document.getElementById('before').disabled")
    focus(page, "#timeline")
    for count in (4, 6, 6):
        page.press("PageDown")
        assert page.run(bars) == count
    measured = page.run("document.getElementById('facts').textContent")
    page.run("(s => { s.value = 'planned'; s.dispatchEvent(new Event('change')); })(document.getElementById('shown'))")
    planned = page.run("document.getElementById('facts').textContent")
    assert measured != planned
    assert "of the bound" in planned
    ends = page.run("[...document.querySelectorAll('#timeline .axis')].at(-1).textContent")
    assert ends == "seconds, as planned"


def test_bars_stand_where_the_cost_model_puts_them(page: Page, tmp_path: Path) -> None:
    """As planned, a sample is as wide as the seconds that it adds to its group; a group ends at its seconds."""
    record = records_of()[1]
    write_run(tmp_path, [record])
    data = data_of(page_of(tmp_path))
    page.look(1200, 900)
    page.open(tmp_path / "report.html")
    page.run("(s => { s.value = 'planned'; s.dispatchEvent(new Event('change')); })(document.getElementById('shown'))")
    drawn: list[Any] = page.run(
        "[...document.querySelectorAll('#timeline .sample')].map(e => [e.x.baseVal.value, e.width.baseVal.value])"
    )
    total = sum(max(group[7] for group in groups) for groups in data["steps"][0]["batches"])
    scale = (page.run("document.getElementById('timeline').clientWidth") - 44 - 8) / total
    expected: list[list[float]] = []
    start = 0.0
    for groups in data["steps"][0]["batches"]:
        for group in groups:
            degree, predicted, tokens = str(group[1]), group[7], group[10]
            weights = data["weights"]
            x = start + weights["fixed"][degree]
            work = [weights["a"] * n * n + weights["b"][degree] * n for n in tokens]
            for part in work:
                seconds = (predicted - weights["fixed"][degree]) * part / sum(work)
                expected.append([44 + scale * x, scale * seconds])
                x += seconds
        start += max(group[7] for group in groups)
    for (x, width), (want_x, want_width) in zip(sorted(drawn), sorted(expected), strict=True):
        assert (x, width) == pytest.approx((want_x, want_width), abs=0.5)


def test_it_can_be_read_without_a_script(page: Page, tmp_path: Path) -> None:
    """Charts, their numbers and the picture of one step are there; controls that would do nothing are not."""
    write_run(tmp_path, records_of())
    page_of(tmp_path)
    page.look(1200, 900, scripts=False)
    page.open(tmp_path / "report.html", ready="true")
    try:
        assert page.run("document.querySelectorAll('figure svg').length") >= 8
        assert page.run("document.querySelectorAll('#timeline .sample').length") == 4
        assert page.run("document.getElementById('controls').offsetHeight") == 0
        assert page.run("document.querySelectorAll('details table').length") >= 8
    finally:
        page.look(scripts=True)


def test_no_name_runs_script(page: Page, tmp_path: Path) -> None:
    """A run whose every text would be script shows it, complains of nothing, and no dialog opens."""
    named(HOSTILE, tmp_path)
    page.look(1200, 900)
    page.open(tmp_path / "report.html")
    focus(page, "#timeline")
    page.press("ArrowRight")
    assert page.errors == []
    assert [url.rpartition("/")[2] for url in page.requests] == ["report.html"]
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.querySelector('h1').textContent").startswith("</script><img")


def test_script_would_be_noticed_and_stopped(page: Page, tmp_path: Path) -> None:
    """Were a name put in as markup, the browser would refuse to run it, and say so."""
    write_run(tmp_path, records_of())
    text = page_of(tmp_path).replace("<h1>", "<h1><img src='x' onerror='document.title = 1'>")
    (tmp_path / "report.html").write_text(text)
    page.look(1200, 900)
    page.open(tmp_path / "report.html")
    assert any("Content Security Policy" in error for error in page.errors)
    assert page.run("document.title") != "1"


def test_a_long_run_on_many_ranks_can_be_used(page: Page, tmp_path: Path) -> None:
    """Ten thousand steps on 1,024 ranks: the page comes up, and its timeline can be read part by part."""
    run = many_steps(10_000, 1024, 4096)
    (tmp_path / "report.html").write_text(make_page(run, summary(run.rows)))
    page.look(1200, 900)
    seconds = sorted(page.open(tmp_path / "report.html") for _ in range(3))
    print(f"{(tmp_path / 'report.html').stat().st_size:,} bytes, opened in {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    assert page.errors == []
    assert page.run("document.querySelectorAll('#ranks option').length") == 17
    page.run("(s => { s.value = '64-128'; s.dispatchEvent(new Event('change')); })(document.getElementById('ranks'))")
    focus(page, "#timeline")
    page.press("ArrowRight")
    assert tip(page, "#timeline").startswith("sample ")
    assert page.errors == []
