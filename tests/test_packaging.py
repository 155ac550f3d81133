"""Wheel, sdist and editable installs give hf_hetero with its collators and callbacks, and no other top-level name."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "hf_hetero/collators/packed.py",
    "hf_hetero/callbacks/plan_metrics.py",
    "hf_hetero/costs/cost_model.py",
    "hf_hetero/costs/gpt-7b_64xa100_192k.json",
    "hf_hetero/py.typed",
    "hf_hetero/report/page/page.css",
    "hf_hetero/report/page/page.js",
}


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sdist of the checkout, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run("build", "--no-isolation", "--outdir", str(folder), ".", cwd=ROOT)
    return folder


@pytest.mark.slow
def test_wheel_holds_one_package(built: Path) -> None:
    """The wheel holds real files under hf_hetero/, and nothing named collators at its top."""
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert set(names) >= EXPECTED
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_hetero"}


@pytest.mark.slow
def test_sdist_is_complete(built: Path) -> None:
    """The sdist holds the package and its licence."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*EXPECTED, "LICENSE", "README.md", "pyproject.toml"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installed_package_imports(kind: str, built: Path, tmp_path: Path) -> None:
    """Installed each way, and run from another folder, both shelves import, and each class exists once."""
    target = tmp_path / "site"
    what = {"wheel": next(built.glob("*.whl")), "sdist": next(built.glob("*.tar.gz")), "editable": ROOT}[kind]
    code = (
        "import hf_hetero, hf_hetero.collators as a, hf_hetero.callbacks as b, importlib.util as u, sys\n"
        "print(hf_hetero.__file__, a.PackedCollator is __import__('hf_hetero.collators.packed', "
        "fromlist=['x']).PackedCollator, u.find_spec('collators') is None, u.find_spec('callbacks') is None)"
    )
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    if kind == "editable":
        # this environment is an editable install already (the Makefile's); it is looked at as it is
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        path, *checks = done.stdout.split()
        assert Path(path).parents[1] == ROOT
    else:
        run("pip", "install", *options, "--target", str(target), str(what), cwd=tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        path, *checks = done.stdout.split()
        assert Path(path).is_relative_to(target)
    assert checks == ["True"] * 3
