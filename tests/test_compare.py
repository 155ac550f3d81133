"""The comparison compares what it says: all ways learn from real tokens, and its ratios are those of its turns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from hf_hetero import HeteroConfig, HeteroError
from hf_hetero.report.drawing import write_picture

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "compare" / "train.yaml"


@pytest.fixture(scope="module")
def compare() -> Any:
    """The script, with the others of its folder where it looks for them."""
    loaded: dict[str, ModuleType] = {}
    for name in ("sft", "turns", "compare"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = loaded[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    return loaded["compare"]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], **changes)


def test_its_file_parses(compare: Any, tmp_path: Path) -> None:
    """Each key is one of the dataclasses', with a value that it takes; a key of nobody is refused by name."""
    kinds = (compare.RecipeArguments, compare.CompareArguments, TrainingArguments, HeteroConfig)
    parsed = compare.parse_settings(["--config", str(CONFIG), "--output_dir", str(tmp_path)], kinds, "x")
    values = {name: value for one in parsed for name, value in vars(one).items()}
    said = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    unlike = {"output_dir", "report_to", "save_strategy", "lr_scheduler_type"}  # turned into other types
    assert all(values[key] == value for key, value in said.items() if key not in unlike)
    with pytest.raises(HeteroError, match=r"unknown key 'round'. Did you mean 'rounds'"):
        compare.parse_settings(["--round", "3", "--use_cpu", "true"], kinds, "x")


def test_every_way_has_a_step_of_the_same_size(compare: Any, tmp_path: Path) -> None:
    """Stock ways, one degree and adaptive take as many samples a step; what does not fit or run here says why."""
    args = arguments(tmp_path, per_device_train_batch_size=4)
    ways = {way.name: way for way in compare.ways_of(args, 16, None, longest=8000, most_tokens=6000)}
    for way in ways.values():
        if way.is_same and not way.why_not:
            rows, parts = (way.arguments[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
            assert rows * parts * args.world_size == 16, way.name
    assert {name for name, way in ways.items() if way.why_not} == {
        "torch CP (FSDP2)",
        "DeepSpeed Ulysses",
        "static degree 1",
    }
    assert "a group holds 6,000 tokens, the longest sample has 8,000" in ways["static degree 1"].why_not
    with pytest.raises(HeteroError, match="global_batch=10: it must be a multiple of 4 rows"):
        compare.ways_of(args, 10, None, 8000, 6000)


def turn(compare: Any, tokens_per_s: float, losses: list[float], mib: int = 100) -> Any:
    return compare.Turn(seconds=2.0, tokens=int(2 * tokens_per_s), losses=losses, peak_bytes=mib << 20)


def test_a_row_by_hand(compare: Any) -> None:
    """Medians over rounds; each ratio is to the reference in the same round; losses beside the reference's."""
    turns = {
        compare.PADDED: [turn(compare, s, [8.0, 7.0]) for s in (100, 200, 50)],
        "ours": [turn(compare, s, [8.0, 7.0007], mib=40 + s) for s in (300, 400, 200)],
        "other": [turn(compare, 70, [1.0, 2.0])],
        "none": [],
    }
    row = compare.as_row(compare.Way("ours"), turns, "", compare.PADDED)
    assert row["tokens/s"] == 300
    assert row["range"] == [200, 400]
    assert row["times"] == [3, 2, 4]
    assert row["peak (MiB)"] == 440
    assert row["loss differs by"] == pytest.approx(1e-4)
    assert compare.as_row(compare.Way("ours"), turns, "", "ours")["times"] == [1, 1, 1]
    others = compare.as_row(compare.Way("other", is_same=False), turns, "", compare.PADDED)
    assert others["loss differs by"] is None
    none = compare.as_row(compare.Way("none"), turns, "needs a GPU", compare.PADDED)
    table = compare.as_table([row, others, none], compare.PADDED)
    assert "| times `Trainer, padded` (range) |" in table
    assert "| ours | 300 | 3.00 (2.00 to 4.00) | 440 | 1.0e-04 |" in table
    assert "| other | 70 | 0.70 (0.70 to 0.70) | 100 | other batches |" in table
    assert "| none | needs a GPU | | | |" in table


def test_bars(compare: Any, tmp_path: Path) -> None:
    """A bar for each way that was tried, and none for others; its text has speed and ratio."""
    turns = {compare.PADDED: [turn(compare, 100, [8.0])], "none": [], "a plan a step": [turn(compare, 250, [8.0])]}
    rows = [compare.as_row(compare.Way(name), turns, "", compare.PADDED) for name in turns]
    path = tmp_path / "bars.svg"
    write_picture(lambda: compare.bars(rows, "Title"), path)
    drawn = path.read_text(encoding="utf-8")
    assert [f'id="way-{place}"' in drawn for place in range(3)] == [True, True, False]


def test_memory_of_a_way_is_its_own(compare: Any) -> None:
    """What is allocated meanwhile counts, also when it is freed at once; what was held before does not."""
    turns, device = sys.modules["turns"], torch.device("cpu")
    if turns.memory_bytes("VmHWM") is None:
        pytest.skip("this system does not say what a process holds")
    kept = torch.ones(16 << 18)  # 16 MiB
    held = turns.start_peak(device)
    torch.ones(64 << 18).sum()
    most = turns.peak_bytes(device, held)
    assert 60 << 20 < most < 90 << 20
    assert turns.peak_bytes(device, turns.start_peak(device)) < 30 << 20
    assert kept.sum() == 16 << 18


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_shrunk_comparison_on_two_ranks(tmp_path: Path) -> None:
    """The command of its README, cut to two rounds of one step: each way learns, those of the same samples the same.

    Tokens are those of samples: as many in every way of the same samples, however they are padded or packed.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    script = ["--num_processes", "2", "recipes/compare.py", "--config", str(CONFIG)]
    short = ["--max_length", "256", "--rounds", "2", "--steps", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*launch, *script, *short], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "256" / "results.json").read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in found["rows"]}
    skipped = {name for name, row in rows.items() if "why not" in row}
    assert skipped == {"torch CP (FSDP2)", "DeepSpeed Ulysses", "static degree 1"}, rows
    assert all(len(turns) == 2 for name, turns in found["turns"].items() if name not in skipped)
    same = [name for name, row in rows.items() if name not in skipped and row["loss differs by"] is not None]
    assert {"Trainer, padded", "flattened", "static degree 2", "a plan a step"} <= set(same)
    assert all(rows[name]["loss differs by"] < 1e-5 for name in same)
    assert len({found["turns"][name][0]["tokens"] for name in same}) == 1
    assert "Wrote" in done.stdout
    assert {"table.md", "bars.png", "bars.svg", "cost_model.json"} <= {p.name for p in (tmp_path / "256").iterdir()}
