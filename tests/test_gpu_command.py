"""`make gpu`: its stages run, one that fails costs only itself, and what they hand over by hand is what ranks send."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.plan import METHODS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
MODULES = ("page", "run", "exchange_by_hand", "stage", "shapes", "measure_predictions")
LENGTHS = [37, 3, 1, 20, 11]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's modules, by name, which nothing else finds afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_of_it_in_miniature(tmp_path: Path) -> None:
    """Without a GPU every stage comes to its end, and the page has a number of each."""
    command = ["make", "gpu", "DEVICE=cpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    log = (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-3000:]}"
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [found["state"] for found in stages.values()] == ["done"] * 9
    assert all(found["facts"] or found["tables"] for found in stages.values())
    assert not [note for found in stages.values() for note in found["notes"] if " failed: " in note]
    exactness = next(rows for title, rows in stages["ranks"]["tables"].items() if title.startswith("Error"))
    assert len(exactness) == 3 * len(METHODS)
    assert {row["equal"] for row in exactness} == {"yes"}
    assert {row["equal"] for row in stages["jobs"]["tables"]["Learning over NCCL"][1:]} == {"yes"}
    page = (tmp_path / "gpu.md").read_text()
    assert "not measured yet" not in page
    assert len(list(tmp_path.iterdir())) == 3


def test_make_installs_nothing() -> None:
    """A machine with a GPU may have no network: the target is one command of the interpreter that is named."""
    options = ["PYTHON=my-python", "OUT=some where", "STAGES=machine ranks"]
    done = subprocess.run(["make", "--dry-run", "gpu", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    command = 'my-python benchmarks/gpu/run.py --output "some where" --device cuda --stages machine ranks'
    assert [line.strip() for line in done.stdout.splitlines() if "make" not in line] == [command]


STAGE = """
import json, subprocess, sys, time
def note(**facts):
    with open(sys.argv[sys.argv.index("--output") + 1], "w") as file:
        json.dump({{"facts": facts}}, file)
note(answer={answer})
{then}
"""


def fake_stage(run: Any, folder: Path, name: str, then: str, limit_s: int = 60) -> Any:
    """A stage that says something, then does something else."""
    script = folder / f"{name}.py"
    script.write_text(STAGE.format(answer=len(name), then=then))
    return run.Kind(str(script), f"The stage {name}", limit_s, limit_s)


def test_a_stage_that_fails_costs_only_itself(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One raises, one hangs with a child: what they found is kept, the page says how they ended, the next one runs."""
    run = gpu("run")
    child = "note(answer=5, child=subprocess.Popen(['sleep', '300']).pid); time.sleep(300)"
    stages = {
        "raises": fake_stage(run, tmp_path, "raises", "raise ValueError('out of luck')"),
        "hangs": fake_stage(run, tmp_path, "hangs", child, limit_s=3),
        "fine": fake_stage(run, tmp_path, "fine", ""),
    }
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(run, "GRACE_S", 0)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)  # this process is not the command's
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert run.main() == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert [found[name]["state"].split(" ")[0] for name in stages] == ["failed", "out", "done"]
    assert [found[name]["facts"].get("answer") for name in stages] == [6, 5, 4]
    assert "out of luck" in " ".join(found["raises"]["notes"])
    assert has_ended(found["hangs"]["facts"]["child"])
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert all(f"## The stage {name}" in page for name in stages)
    assert "failed with exit code 1" in page
    assert "hangs: out of time" in capsys.readouterr().out


def test_a_command_that_is_ended_keeps_what_it_had(tmp_path: Path) -> None:
    """Ended from outside, it ends the stage underway, and the page says so."""
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--output", str(tmp_path)]
    with subprocess.Popen([*command, "--stages", "machine", "kernels"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("machine:"):
            assert process.poll() is None
        process.terminate()
    assert process.returncode == 143
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {name: found["state"] for name, found in stages.items()} == {"machine": "interrupted"}
    assert "| machine | interrupted |" in (tmp_path / "gpu.md").read_text()


def has_ended(process: int) -> bool:
    """Whether a process is gone, or only waits for somebody to ask how it ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_results_of_two_calls_are_one_page(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is not run again keeps what was found before; files of other machines join."""
    run = gpu("run")
    found = {"state": "done", "seconds": 1, "device": "A", "date": "D", "versions": {}, "notes": [], "tables": {}}
    for name, stage in (("a", "machine"), ("b", "steps")):
        run.Keeper(tmp_path / name).keep(stage, {**found, "facts": {"from": name}})
    both = [str(tmp_path / name / "gpu.json") for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(tmp_path / "c"), "--merge", *both])
    assert run.main() == 0
    page = (tmp_path / "c" / "gpu.md").read_text()
    assert "| from | a |" in page
    assert "| from | b |" in page
    assert "| kernels | not measured yet |" in page
    run.Keeper(tmp_path / "c").keep("kernels", {**found, "facts": {"from": "a | b"}})
    page = (tmp_path / "c" / "gpu.md").read_text()
    assert "| from | a |" in page
    assert "| from | a / b |" in page


def test_what_is_missing_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package that all stages need, or a GPU, there is a word and no start."""
    run = gpu("run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "DEVICE=cpu" in run.missing("cuda")
    assert run.missing("cpu") is None
    monkeypatch.setattr(run, "NEEDED", ("torch", "no_such_package"))
    assert "lacks no_such_package" in run.missing("cpu")


# ------------------------------------------------------------------------------------------------------ virtual ranks


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_by_hand_as_one_rank(gpu: Any, method: str, degree: int) -> None:
    """In fp64 a group of virtual ranks gives the attention and the gradients of one rank, once messages are right."""
    by_hand = gpu("exchange_by_hand")
    pack = by_hand.Pack.random(LENGTHS, (8, 4, 8), torch.device("cpu"), torch.float64)
    expected = by_hand.VirtualGroup(pack, 1, "ulysses", PLAIN).go_round(1)
    group = by_hand.VirtualGroup(pack, degree, method, CPU)
    found = group.go_round()
    assert group.num_changed == 0
    assert worst(found, expected) < 1e-12
    with group.settled():  # as it is timed: one rank alone, with the others' messages at hand
        for rank in range(degree):
            assert group.compute(rank)[0].shape[0] == group.layout.rank_tokens[rank]
            assert torch.equal(group.compute(rank)[0], found[0][by_hand.rows_of(group.layout, rank)])


@pytest.mark.parametrize("method", METHODS)
def test_a_round_too_few_would_be_noticed(gpu: Any, method: str) -> None:
    """After one round, in which most messages are not there yet, the result is another."""
    by_hand = gpu("exchange_by_hand")
    pack = by_hand.Pack.random(LENGTHS, (8, 4, 8), torch.device("cpu"), torch.float64)
    expected = by_hand.VirtualGroup(pack, 1, "ulysses", PLAIN).go_round(1)
    assert worst(by_hand.VirtualGroup(pack, 4, method, CPU).go_round(1), expected) > 1e-3


def worst(found: Any, expected: Any) -> float:
    """Largest difference of outputs and gradients."""
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ numbers


def test_operations_of_a_model(gpu: Any) -> None:
    """Six operations a weight and token that trains, four that is frozen; attention by the square of each length."""
    shapes = gpu("shapes")
    full, lora = (shapes.MINIATURES[name] for name in ("tiny-qwen3", "tiny-qwen3-lora"))
    model = shapes.make_model(full, torch.device("cpu"))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    square = 6 * 8 * 16 * 2
    assert shapes.model_flops(model, full, [10, 3]) == 6 * linear * 13 + square * (100 + 9)
    adapted = shapes.make_model(lora, torch.device("cpu"))
    thin = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert thin
    assert shapes.model_flops(adapted, lora, [10]) == (4 * linear + 6 * thin) * 10 + square * 100


def test_adapters_start_as_the_model(gpu: Any) -> None:
    """An adapter adds nothing at first, and learns."""
    shapes = gpu("shapes")
    base = torch.nn.Linear(6, 5)
    adapter, x = shapes.Adapter(base), torch.randn(3, 6)
    assert torch.equal(adapter(x), base(x))
    adapter(x).sum().backward()
    assert base.weight.grad is None
    assert adapter.up.weight.grad.abs().max() > 0


def test_packs_have_the_tokens_asked_for(gpu: Any) -> None:
    """Lengths add up exactly, each at least 1, the longest at most the limit."""
    shapes = gpu("shapes")
    for mix in ("github", "wiki-192k"):
        lengths = shapes.mix_pack(mix, 5000, 900)
        assert sum(lengths) == 5000
        assert min(lengths) >= 1
        assert max(lengths) <= 900


def test_rank_correlation(gpu: Any) -> None:
    """One where the order is the same, minus one where it is reversed, whatever the values."""
    of = gpu("measure_predictions").rank_correlation
    a = torch.tensor([1.0, 5.0, 2.0, 100.0]).numpy()
    assert of(a, a**3) == pytest.approx(1)
    assert of(a, -a) == pytest.approx(-1)
