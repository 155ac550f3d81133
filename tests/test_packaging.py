"""Wheel, sdist and editable installs give hf_hetero with its collators and callbacks, and no other top-level name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "hf_hetero/collators/packed.py",
    "hf_hetero/callbacks/plan_metrics.py",
    "hf_hetero/costs/cost_model.py",
    "hf_hetero/costs/gpt-7b_64xa100_192k.json",
    "hf_hetero/py.typed",
    "hf_hetero/recipes/README.md",
    "hf_hetero/recipes/accelerate/fsdp2.yaml",
    "hf_hetero/recipes/quickstart_cpu/train.yaml",
    "hf_hetero/recipes/sft.py",
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


@pytest.mark.slow
def test_the_version_is_of_the_tag_or_of_the_fallback(built: Path, tmp_path: Path) -> None:
    """Wheel and sdist have one version, from git where there is git; sources without it build with the fallback."""
    versions = {re.match(r"hf_hetero-([^-]+?)(-|\.tar)", path.name)[1] for path in built.iterdir()}  # pyright: ignore
    assert len(versions) == 1
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    (folder / "PKG-INFO").unlink()
    shutil.rmtree(folder / "hf_hetero.egg-info")
    run("build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "bare"), ".", cwd=folder)
    fallback = re.search(r'fallback_version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert fallback is not None
    assert next((tmp_path / "bare").iterdir()).name.startswith(f"hf_hetero-{fallback[1]}-")


def first_page() -> list[str]:
    """The commands of README.md that need no repository, each in one line."""
    said = (ROOT / "README.md").read_text(encoding="utf-8").partition("Without the repository")[2]
    block = re.search(r"```console\n(.*?)```", said, re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ") for line in block[1].splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_page_leads_to_an_adapter(built: Path, tmp_path: Path) -> None:
    """The wheel, a fresh environment and the README's commands train an adapter on the CPU, without the repository.

    Dependencies are those of this environment, added behind the fresh one's own packages.
    """
    run("venv", "--without-pip", str(tmp_path / "fresh"), cwd=tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    run("pip", *options[-2:], "install", *options[:-2], str(next(built.glob("*.whl"))), cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}

    def typed(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = typed(str(python), "-c", "import hf_hetero; print(hf_hetero.__file__, hf_hetero.__version__)").split()
    assert Path(where[0]).is_relative_to(site)
    install, copy, launch, look = first_page()
    assert install.endswith("pip install hf-hetero")
    typed(str(python.with_name("hf-hetero")), *shlex.split(copy)[1:])
    typed(str(python), "-m", "accelerate.commands.accelerate_cli", *shlex.split(launch)[1:])
    adapter = load_file(tmp_path / shlex.split(look)[1])
    trained = [name for name in adapter if "lora_B" in name]  # which are zero before the first step
    assert trained
    assert all(adapter[name].abs().max() > 0 for name in trained)
