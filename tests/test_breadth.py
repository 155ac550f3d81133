"""The measurement of transformers' models says exact, refused and wrong where they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "checks" / "measure_models.py"
EXPECTED = {
    "llama": "exact",
    "roberta": "exact",
    "llama4_text": "exact",
    "bart": "exact",
    "doge": "exact",
    "prophetnet": "refused",
    "musicgen": "stock cannot",
}
WHOLE = {"doge"}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_sample_of_types(tmp_path: Path) -> None:
    """Trained on two ranks and by plain Trainer; what is recorded is not measured again."""
    results, page = tmp_path / "results.jsonl", tmp_path / "MODELS.md"
    words = [sys.executable, "-W", "ignore", str(SCRIPT), "--results", str(results), "--markdown", str(page)]
    for _ in range(2):
        subprocess.run([*words, "--kinds", "text", "--types", *EXPECTED], check=True, capture_output=True)
        found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        assert len(found) == len(EXPECTED)
        assert {one["type"]: one["result"] for one in found} == EXPECTED, found
    assert {one["type"] for one in found if one["why"].startswith("whole samples: ")} == WHOLE
    assert "Of 7 types 5 exact, 1 refused, 1 stock cannot: 83 % of those" in page.read_text(encoding="utf-8")


def test_another_movement_is_wrong() -> None:
    """Of one weight, on one rank, by a millionth of how far training moved; nan, too. No movement proves nothing."""
    judged = script().judged
    before = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    after = {"a": before["a"] + 0.5, "b": before["b"] - 0.25}
    assert judged(("", before, after), [((after, ""), "", False)] * 2)["result"] == "exact"
    for off in (1e-6, float("nan")):
        other = {"a": after["a"], "b": after["b"] + torch.tensor([0.0, off])}
        assert judged(("", before, after), [((after, ""), "", False), ((other, ""), "", False)])["result"] == "wrong"
    assert judged(("", before, before), [((before, ""), "", False)] * 2)["result"] == "stock cannot"
    assert judged(("", before, after), [(None, "words", True), (None, "", False)])["result"] == "refused"
    assert judged(("", before, after), [((after, ""), "", False), (None, "IndexError", False)])["result"] == "crash"
