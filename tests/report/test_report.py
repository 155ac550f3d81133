"""Pictures show the plan and nothing else; pages carry everything they need; numbers are those of the records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_hetero import CostModel, Group, HeteroError, MicroBatch, Plan
from hf_hetero.callbacks.plan_metrics import to_record
from hf_hetero.errors import ConfigError
from hf_hetero.plan import StepReport, idle_share
from hf_hetero.report import draw_plan, most_mixed, read_records, summarise, write_report
from hf_hetero.report.plan_picture import plan_figure

LENGTHS = (4000, 900, 800, 3000, 10, 1)
COST = CostModel(
    attention_s_per_token2=1e-8,
    linear_s_per_token=1e-4,
    micro_batch_s=0.02,
    all_to_all_bytes_per_token=1000,
    all_to_all_bytes_per_s={2: 1e8, 4: 1e8},
    all_to_all_latency_s={2: 0.01, 4: 0.02},
    activation_bytes_per_token=1.0,
    model_state_bytes_per_rank=0.0,
    memory_bytes_per_rank=5000.0,
)


def mixed_plan(**numbers: Any) -> Plan:
    """Degrees 2 and 1, then 4; one group without samples."""
    first = MicroBatch((Group((0, 1), (0, 5)), Group((2,), (2, 1)), Group((3,), ())))
    return Plan(4, (first, MicroBatch((Group((0, 1, 2, 3), (3, 4)),))), **numbers)


def homogeneous_plan() -> Plan:
    return Plan(4, (MicroBatch(tuple(Group((rank,), (rank,)) for rank in range(4))),), seconds=0.5)


def run_of_three_steps() -> list[dict[str, Any]]:
    mixed, plain = mixed_plan(seconds=0.8, lower_bound_s=0.7, planning_s=0.01), homogeneous_plan()
    reports = [
        StepReport(1, plain, (5, 6, 7, 8), 20, 1.0, ((1.0, 0.5, 0.5, 0.5),), 0.25),
        StepReport(2, mixed, LENGTHS, 8000, 1.6, ((0.6, 0.6, 0.4, 0.1), (0.9, 0.9, 0.9, 0.9)), 0.0),
        StepReport(3, plain, (9, 9, 9, 2000), 2000, 2.0, ((2.0, 1.0, 1.0, 1.0),), 0.05),
    ]
    return [json.loads(json.dumps(to_record(report))) for report in reports]


@pytest.mark.parametrize("busy_s", [None, ((0.6, 0.6, 0.4, 0.1), (0.9, 0.9, 0.9, 0.9))], ids=["predicted", "measured"])
def test_an_svg_holds_one_bar_for_each_sample(tmp_path: Path, busy_s: Any) -> None:
    """Each sample of the plan is drawn exactly once, also beside groups without samples, in well-formed XML."""
    draw_plan(mixed_plan(), LENGTHS, COST, tmp_path / "step.svg", busy_s)
    tree = ElementTree.parse(tmp_path / "step.svg")
    ids = [e.get("id") for e in tree.iter() if (e.get("id") or "").startswith("sample-")]
    assert sorted(ids) == [f"sample-{sample}" for sample in range(len(LENGTHS))]


@pytest.mark.parametrize("name", ["step.png", "step.svg"])
def test_the_same_plan_gives_the_same_file(tmp_path: Path, name: str) -> None:
    """A picture depends on nothing but the plan: no date, no random ids."""
    files = [tmp_path / "a" / name, tmp_path / "b" / name]
    for file in files:
        file.parent.mkdir()
        draw_plan(mixed_plan(), LENGTHS, COST, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def bars(figure: Any) -> dict[int, Any]:
    found = {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid()}
    return {int(gid.removeprefix("sample-")): patch for gid, patch in found.items()}


def test_bars_stand_where_the_cost_model_puts_them() -> None:
    """A bar spans its group's ranks; the last bar of a group ends at the group's predicted seconds."""
    plan = mixed_plan()
    drawn = bars(plan_figure(plan, LENGTHS, COST))
    start = 0.0
    for micro_batch in plan.micro_batches:
        for group in micro_batch.groups:
            for sample in group.samples:
                assert drawn[sample].get_height() == group.degree
                assert drawn[sample].get_y() == group.ranks[0] - 0.5
                assert drawn[sample].get_width() == pytest.approx(
                    COST.work(LENGTHS[sample], group.degree) / group.degree
                )
            if group.samples:
                end = max(drawn[sample].get_x() + drawn[sample].get_width() for sample in group.samples)
                assert end == pytest.approx(start + COST.group_seconds(group, LENGTHS))
        start += max(COST.group_seconds(group, LENGTHS) for group in micro_batch.groups)
    assert start == pytest.approx(COST.plan_seconds(plan, LENGTHS))


def test_the_title_says_seconds_idle_share_and_gap() -> None:
    """The numbers in a title are the plan's: seconds by the cost model, idle rank-seconds, distance to the bound."""
    seconds = COST.plan_seconds(mixed_plan(), LENGTHS)
    plan = mixed_plan(seconds=seconds, lower_bound_s=seconds / 1.25)
    busy = [[COST.group_seconds(m.group_of(rank), LENGTHS) for rank in range(4)] for m in plan.micro_batches]
    title = plan_figure(plan, LENGTHS, COST).axes[0].get_title(loc="left")
    assert f"predicted {seconds:.3g} s" in title
    assert f"idle {idle_share(busy):.0%}" in title
    assert "within 25.0 % of optimal" in title
    unknown = plan_figure(mixed_plan(), LENGTHS, COST).axes[0].get_title(loc="left")
    assert "optimal" not in unknown, "a plan without a bound claims nothing"


def test_measured_seconds_replace_predicted_ones() -> None:
    """With measured seconds the axis ends at their sum, and the samples of a group share its time by their tokens."""
    figure = plan_figure(mixed_plan(), LENGTHS, None, ((0.6, 0.6, 0.4, 0.1), (0.9, 0.9, 0.9, 0.9)))
    assert figure.axes[0].get_xlim() == (0.0, pytest.approx(1.5))
    assert bars(figure)[2].get_width() == pytest.approx(0.4 * 800 / 1700)


@pytest.mark.parametrize("lengths", [(7,), (64, 64)])
def test_equal_lengths_are_drawn(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """A step whose samples are all equally long has a picture like any other."""
    plan = Plan(1, (MicroBatch((Group((0,), tuple(range(len(lengths)))),)),))
    draw_plan(plan, lengths, COST, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


@pytest.mark.parametrize("cost", [COST, None], ids=["cost model", "measured only"])
def test_the_page_loads_nothing(tmp_path: Path, cost: CostModel | None) -> None:
    """A report can be mailed: every picture is inside it, well-formed, and its policy lets nothing load."""
    write_report(run_of_three_steps(), tmp_path / "report.html", cost)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) == ["#steps"]
    assert not re.search(r"<(link|iframe|img|object|embed)|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert all(where.startswith("#") for where in re.findall(r"url\(([^)]*)", page))
    assert "default-src &#x27;none&#x27;" in page
    pictures = re.findall(r"<svg.*?</svg>", page)
    assert len(pictures) == (8 if cost else 7)  # speed, seconds, against, samples, tokens, waiting, static, the step
    for picture in pictures:
        assert ElementTree.fromstring(picture).tag == "svg"


def test_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    """Sums, means, shares and the median ratio, computed here by hand."""
    records = run_of_three_steps()
    run = summarise(records)
    assert run["steps"] == "3"
    assert run["samples"] == "14"
    assert run["tokens"] == f"{26 + sum(LENGTHS) + 2027:,}"
    assert run["seconds, waits included"] == "4.9"
    assert run["tokens a second"] == f"{(26 + sum(LENGTHS) + 2027) / 4.9:,.0f}"
    assert run["samples at degree 1"] == "71%"  # 10 of 14
    assert run["samples at degree 2"] == "14%"
    assert run["samples at degree 4"] == "14%"
    assert run["micro-batches a step"] == "1.3"
    # step 1: 1.5 of 4 rank-seconds, step 2: 0.7 of 6, step 3: 3 of 8
    assert run["idle share of the rank-seconds"] == f"{(1.5 / 4 + 0.7 / 6 + 3 / 8) / 3:.0%}"
    assert run["measured over planned seconds, median"] == "2.00"  # of 2, 2 and 4
    assert run["planning a step, in the background"] == "3.3 ms"
    assert run["waited for plans and data"] == "0.30 s"
    write_report(records, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (table,) = re.findall("<caption>Numbers</caption>.*?</table>", page)
    assert dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', table)) == run


def test_a_run_without_predictions_has_a_page(tmp_path: Path) -> None:
    """Plans made by hand predict no seconds; the report is written all the same."""
    records = run_of_three_steps()
    for record in records:
        record["plan"]["seconds"] = 0.0
    write_report(records, tmp_path / "report.html")
    assert summarise(records)["measured over planned seconds, median"] == "0.00"


def test_the_most_mixed_step_is_shown() -> None:
    """The step that is drawn is the one with the most different degrees."""
    assert most_mixed(run_of_three_steps())["step"] == 2


def test_records_are_read_once_and_in_order(tmp_path: Path) -> None:
    """A step trained twice, after a resume, counts once, as it went the last time; a folder stands for its file."""
    records = run_of_three_steps()
    again = {**records[1], "seconds": 9.0}
    file = tmp_path / "plans.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, again]), encoding="utf-8")
    found = read_records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 3]
    assert found[1]["seconds"] == 9.0
    assert found == read_records(file)


@pytest.mark.parametrize(
    ("text", "message"), [('{"step": 1}\n', "line 1"), ("not json\n", "line 1"), ("[]\n", "line 1"), ("", "no step")]
)
def test_what_is_no_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    """A damaged file is refused with the line that is wrong."""
    file = tmp_path / "plans.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_records(file)


def test_a_line_that_was_cut_costs_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a full disk or a kill leaves of a line is passed over with a word, also where a line was joined to it."""
    lines = [json.dumps(record) for record in run_of_three_steps()]
    file = tmp_path / "plans.jsonl"
    for name, text, steps in (
        ("at the end", "\n".join([*lines, lines[0][:200]]), [1, 2, 3]),
        ("amid", "\n".join([lines[0], lines[1][:200], lines[2], ""]), [1, 3]),
        ("joined", "\n".join([lines[0], lines[1][:200] + lines[2], lines[1], ""]), [1, 2]),
        ("nulls", "\n".join([*lines, "\0" * 50]), [1, 2, 3]),
        ("deep", "\n".join([*lines, "[" * 100_000]), [1, 2, 3]),
    ):
        caplog.clear()
        file.write_text(text, encoding="utf-8")
        assert [record["step"] for record in read_records(file)] == steps, name
        assert "cut short and are left out" in caplog.text, name


def test_lockstep_survives(tmp_path: Path) -> None:
    """Of ranks that waited in every layer nobody knows how idle they were: the page claims no share."""
    records = [{**record, "is_lockstep": True} for record in run_of_three_steps()]
    (tmp_path / "plans.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_records(tmp_path)
    assert all(record["is_lockstep"] for record in found)
    assert summarise(found)["idle share of the rank-seconds"].startswith("not measured")
    write_report(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert 'id="speed"' in page
    assert 'id="waiting"' not in page
    assert "of the rank-seconds waiting" not in page
    step = found[1]
    figure = plan_figure(Plan.from_dict(step["plan"]), step["lengths"], None, step["busy_s"], True)
    assert figure.axes[0].get_title(loc="left") == "measured 1.5 s"


ODD = [None, True, -1, 1.5, 10**400, float("nan"), float("inf"), 1e300, "x", "<script>", [], [[]], {}, {"a": 1}]


@pytest.mark.parametrize(
    "path", ["step", "lengths", "planned_lengths", "plan", "seconds", "busy_s", "wait_s", "is_lockstep", "*"]
)
def test_odd_records_are_named(tmp_path: Path, path: str) -> None:
    """Any value in any field is refused with its line and field, unless it is one that a step may have."""
    record = run_of_three_steps()[1]
    right = {"step": (), "seconds": (1.5,), "wait_s": (1.5,), "is_lockstep": (True,)}.get(path, ())
    for value in ODD:
        odd = value if path == "*" else {**record, path: value}
        (tmp_path / "plans.jsonl").write_text(json.dumps(odd) + "\n")
        if value in right:
            write_report(read_records(tmp_path), tmp_path / "report.html")
        else:
            with pytest.raises(ConfigError, match="line 1"):
                read_records(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["format", "num_ranks", "micro_batches", "seconds", "lower_bound_s", "planning_s", "group", "ranks", "samples"],
)
def test_odd_plans_are_named(tmp_path: Path, path: str) -> None:
    """The same within a step's plan."""
    for value in ODD:
        record = run_of_three_steps()[1]
        groups = record["plan"]["micro_batches"][0]["groups"]
        if path == "group":
            groups[0] = value
        elif path in ("ranks", "samples"):
            groups[0][path] = value
        else:
            record["plan"][path] = value
        (tmp_path / "plans.jsonl").write_text(json.dumps(record) + "\n")
        if path in ("seconds", "lower_bound_s", "planning_s") and value == 1.5:
            read_records(tmp_path)  # which such numbers may be
            continue
        with pytest.raises(ConfigError, match="line 1"):
            read_records(tmp_path)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder of that name, or none to write into, is said in words."""
    for path in (tmp_path, tmp_path / "absent" / "report.html"):
        with pytest.raises(HeteroError, match=f"Cannot write '{path}'"):
            write_report(run_of_three_steps(), path)
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(HeteroError, match=r"taken\.svg: there is a folder of this name"):
        draw_plan(mixed_plan(), LENGTHS, COST, tmp_path / "taken.svg")


def test_a_run_that_took_no_time_has_a_page(tmp_path: Path) -> None:
    """Records that say 0 seconds everywhere are drawn all the same."""
    records = run_of_three_steps()
    for record in records:
        record |= {"seconds": 0.0, "wait_s": 0.0, "busy_s": [[0.0] * len(ranks) for ranks in record["busy_s"]]}
        record["plan"]["seconds"] = 0.0
    write_report(records, tmp_path / "report.html")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path that could not be read is in the message."""
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    """Another kind of file, or a plan without any seconds, is an error that says what is missing."""
    with pytest.raises(HeteroError, match=r"\.png or \.svg"):
        draw_plan(mixed_plan(), LENGTHS, COST, tmp_path / "step.pdf")
    with pytest.raises(HeteroError, match="neither"):
        draw_plan(mixed_plan(), LENGTHS, None, tmp_path / "step.png")


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib is an extra: without it the message says how to get it, importing works, and so does the page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HeteroError, match=r"pip install hf-hetero\[report\]"):
        draw_plan(mixed_plan(), LENGTHS, COST, tmp_path / "step.png")
    write_report(run_of_three_steps(), tmp_path / "report.html")  # which is drawn without it


def test_importing_the_module_is_cheap() -> None:
    """Neither matplotlib nor torch is imported before the first picture."""
    code = "import sys, hf_hetero.report; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
