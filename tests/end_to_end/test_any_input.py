"""Whatever the command line is given: the answer, or status 1 and one line that says what is wrong; no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import TINY
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, Planner
from hf_hetero.cli import main
from hf_hetero.what_if.simulate import busy_seconds

pytestmark = pytest.mark.slow

COST = CostModel.load("llama-8b_8xa100_pcie")
FAST = ["--ranks", "8", "--solver", "fast"]
LENGTHS = [3000, 500, 40, 7]

odd_numbers = st.sampled_from(
    [
        0,
        1,
        2,
        3,
        -1,
        8,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        5e-324,
        1e-30,
        1e30,
        1e308,
        float("nan"),
        float("inf"),
    ]
)
odd_texts = st.sampled_from(
    ["", "$x_$", "$\\frac{$", "{0}", "\ud800", "\0", "\x1b[2J", "<script>", "a" * 3000, "1", "é\n"]
)
scalars = st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=2), max_leaves=4
)


def quick(num_examples: int) -> settings:
    """The same examples each time."""
    return settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


def ends_well(words: list[str]) -> None:
    """Run a command; an exception fails the test by itself."""
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        status = main(words)
    assert status in (0, 1)
    if status == 1 and not printed.getvalue():
        *_, last = said.getvalue().split("\n")[:-1]
        assert last.startswith("hf-hetero: "), last
        assert "hf-hetero: " not in said.getvalue().removesuffix(f"{last}\n")


@contextlib.contextmanager
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "lengths.txt").write_text("\n".join(map(str, LENGTHS)))
        yield Path(name)


def replaced(data: Any, at: list[int], value: object) -> Any:
    """The same JSON with another value at a place: a path of positions, as far as it leads."""
    if not at or not isinstance(data, dict | list) or not data:
        return value
    keys: list[Any] = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[at[0] % len(keys)]
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[key] = replaced(data[key], at[1:], value)
    return copy


paths = st.lists(st.integers(0, 40), min_size=0, max_size=6)


@quick(60)
@given(paths, values)
def test_any_cost_model(at: list[int], value: object) -> None:
    """One value anywhere in a cost model is another."""
    with folder() as here:
        text = json.dumps(replaced(COST.to_dict(), at, value))
        (here / "cost.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        words = [str(here / "lengths.txt"), "--cost", str(here / "cost.json"), *FAST]
        ends_well(["plan", *words])
        ends_well(["simulate", *words, "--batch-size", "2", "--plot", str(here / "picture.svg")])


@quick(40)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(scalars, max_size=5).map(lambda v: "\n".join(map(str, v)).encode("utf-8", "replace")),
    )
)
def test_any_text_of_lengths(content: bytes) -> None:
    """A file of lengths may hold anything, and so may any other file that is read."""
    with folder() as here:
        (here / "any").write_bytes(content)
        any_file = str(here / "any")
        ends_well(["plan", any_file, "--cost", "llama-8b_8xa100_pcie", *FAST])
        ends_well(["plan", str(here / "lengths.txt"), "--cost", any_file, *FAST])
        ends_well(["report", any_file])


@quick(60)
@given(paths, values)
def test_any_record(at: list[int], value: object) -> None:
    """One value anywhere in a run's record is another; what is drawn holds no script."""
    plan = Planner(COST, 8).plan(LENGTHS)
    record = {
        "step": 1,
        "lengths": LENGTHS,
        "plan": plan.to_dict(),
        "seconds": 1.0,
        "wait_s": 0.1,
        "is_lockstep": False,
    }
    with folder() as here:
        odd = replaced({**record, "busy_s": busy_seconds(plan, LENGTHS, COST)}, at, value)
        (here / "plans.jsonl").write_text(json.dumps(odd) + "\n")
        ends_well(["report", str(here)])
        page = here / "report.html"
        assert not page.exists() or page.read_text().count("<script") == 2  # the page's own, and its data


@quick(25)
@given(st.sampled_from(["length", "input_ids", "attention_mask", "text"]), st.lists(values, min_size=1, max_size=2))
def test_any_table(column: str, cells: list[object]) -> None:
    """A column of a table may hold anything."""
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "cache"))
        rows = [{"input_ids": [1, 2], column: cell} for cell in cells]
        (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ends_well(["plan", str(here / "data.jsonl"), "--cost", "llama-8b_8xa100_pcie", *FAST])


@quick(25)
@given(st.sampled_from(sorted(TINY)), values)
def test_any_config(name: str, value: object) -> None:
    """One field of a model's config is another."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY, name: value}
    with folder() as here:
        (here / "config.json").write_text(json.dumps(config))
        ends_well(["check", str(here), "--max-degree", "4"])


OPTIONS = ["--ranks", "--batch-size", "--steps", "--context", "--seed", "--max-degree", "--max-length"]
numbers = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 5000, 2**31, 2**63, 10**12, 10**30])


@quick(60)
@given(st.dictionaries(st.sampled_from(OPTIONS), numbers, max_size=2), st.booleans())
def test_any_number(options: dict[str, int], is_mix: bool) -> None:
    """Any two options at any size, of a file or a mix."""
    with folder() as here:
        source = "web" if is_mix else str(here / "lengths.txt")
        given_ = {"--ranks": 8, "--batch-size": 2, "--steps": 1, **options}
        words = [str(word) for pair in given_.items() for word in pair]
        ends_well(["simulate", source, "--cost", "llama-8b_8xa100_pcie", "--solver", "fast", *words])


@pytest.mark.parametrize("gib", ["nan", "inf", "-inf", "-5", "0", "1e-320", "1e308"])
def test_any_memory(gib: str, tmp_path: Path) -> None:
    """A card has some memory."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    ends_well(["check", str(tmp_path), f"--memory-gib={gib}"])


@pytest.mark.parametrize(
    "name", ["", ".", "/", "~", "a/b", "y" * 5000, "y" * 5000 + ".jsonl", "nowhere.txt", "\udcff", "/dev/null"]
)
def test_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may be of nothing, or of something else, wherever one is given."""
    monkeypatch.chdir(tmp_path)
    Path("lengths.txt").write_text("5\n6\n")
    cost = ["--cost", "llama-8b_8xa100_pcie", *FAST]
    ends_well(["plan", name, *cost])
    ends_well(["plan", "lengths.txt", "--cost", name, *FAST])
    ends_well(["plan", "lengths.txt", *cost, "--plot", f"{name}.svg"])
    ends_well(["report", name])
    ends_well(["report", name, "-o", name])
    ends_well(["costs", name])
    ends_well(["check", name])
