"""On a machine with torch and transformers and little else, the package trains what needs no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LENGTHS, arguments, samples, tiny_model

from hf_hetero import HeteroTrainer

MISSING = "'mip' is not installed"
ROOT = Path(__file__).parents[1]
ABSENT = ("datasets", "pyarrow", "peft", "trl", "mip", "highsbox", "matplotlib", "rich")

# read by every interpreter when it starts, so that the planner's processes lack these packages, too
SITE = f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""
TRAINS = """
import sys
from helpers import LENGTHS, HeteroTrainer, arguments, samples, tiny_model
trainer = HeteroTrainer(tiny_model(), arguments(sys.argv[1], 1), train_dataset=samples(LENGTHS))
print("loss", trainer.train().training_loss)
"""


def ran(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What an interpreter says to some code, where the packages are not installed."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join(map(str, (site, ROOT, ROOT / "tests")))
    command = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_trains_without_what_is_optional(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list of examples trains to the same loss without these packages, and a word says what is missing."""
    bare = ran(TRAINS, tmp_path)
    assert bare.returncode == 0, bare.stderr
    trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1), train_dataset=samples(LENGTHS))
    expected = trainer.train().training_loss
    assert float(bare.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)
    assert MISSING in bare.stderr
    assert MISSING not in caplog.text


@pytest.mark.parametrize("package", ABSENT)
def test_the_packages_are_absent(package: str, tmp_path: Path) -> None:
    """The test above would notice an import: there, each of these fails."""
    assert "ModuleNotFoundError" in ran(f"import {package}", tmp_path).stderr
