"""The floors of the house: a module imports only from floors below, or from its own room. One door per dependency."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # bottom to top; rooms on one floor do not know each other
    {"errors"},
    {
        "topology",
        "backward",
        "drawing",
        "json_fields",
        "logged_means",
        "mixes",
        "plan",
        "rows",
        "safekeeping",
        "samples",
        "waits",
    },
    {"chunked_mlp", "expert_load", "lm_head", "offload", "records"},
    {"config", "layout", "groups", "loss", "sharding", "timing", "workers"},
    {"activations", "heads"},
    {"volume"},
    {"activation_policy"},
    {"cost_model"},
    {"agreement", "attention", "dynamic_cp", "planner", "step"},
    {"limits"},
    {
        "exactness",
        "lengths",
        "model_shape",
        "overrides",
        "plan_ahead",
        "rounds",
        "profile",
        "report",
        "sampler",
        "simulate",
        "collators",
        "callbacks",
    },
    {"memory", "probe"},
    {"estimate"},
    {"contents", "counting", "own_loss", "planning"},
    {"epochs", "reading"},
    {"stream"},
    {"dealing"},
    {"check", "checkpoint", "clusters", "loader", "machine", "simulation_picture", "sources", "stopping"},
    {"evaluation", "fitting"},
    {"predictions", "preparation"},
    {"resumption"},
    {"evaluating"},
    {"trainer"},
    {"sft"},
    {""},  # hf_hetero/__init__.py, the catalogue
    {"cli"},
]
DOORS = {  # third-party package -> the only rooms that may import it
    "flash_attn": {"attention.flash"},
    "flash_attn_interface": {"attention.flash"},
    "mip": {"planner.program"},
    "trl": {"sft"},
    "matplotlib": {"drawing", "report", "simulation_picture"},
    "datasets": {"evaluation", "lengths", "loader"},
    "transformers": {
        "activations",
        "attention.interface",
        "attention.cuda",
        "attention.kernels",
        "callbacks.calibration",
        "callbacks.plan_metrics",
        "callbacks.step_report",
        "check",
        "checkpoint",
        "evaluation",
        "predictions",
        "preparation",
        "resumption",
        "exactness",
        "fitting",
        "lengths",
        "loader",
        "machine",
        "own_loss",
        "probe",
        "sharding",
        "stopping",
        "trainer",
    },
}
WITHOUT_TORCH = {
    "errors",
    "config",
    "topology",
    "plan",
    "activation_policy",
    "json_fields",
    "cost_model",
    "layout",
    "heads",
    "volume",
    "planner",
    "drawing",
    "dynamic_cp",
    "mixes",
    "report",
    "rows",
    "samples",
    "simulate",
    "simulation_picture",
    "sources",
    "cli",
    "",
}


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder, prefix in (("hf_hetero", ""), ("collators", "collators"), ("callbacks", "callbacks")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part and part != "__init__")
            if not (folder == "hf_hetero" and name.split(".")[0] in {"collators", "callbacks"}):  # the two links
                found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the full name"
            assert node.module
            found.add(node.module)
            if node.module in {"hf_hetero", "hf_hetero.attention"}:
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def floor(module: str) -> int:
    room = module.split(".")[0]
    assert any(room in rooms for rooms in FLOORS), f"{room} has no floor"
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    """Each import is to a lower floor, to the own room, or through the package's full name."""
    if module == "":
        return  # the catalogue names every room
    for target in imports(modules()[module]):
        first, _, inner = target.partition(".")
        assert first not in {"collators", "callbacks"}, f"{module}: write hf_hetero.{target}"
        if first == "hf_hetero" and inner:
            room = inner.split(".")[0]
            assert room == module.split(".")[0] or floor(inner) < floor(module), f"{module} may not import {target}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_one_door_per_dependency(module: str) -> None:
    """A third-party solver or kernel is imported in one place."""
    for target in imports(modules()[module]):
        package = target.split(".")[0]
        assert package not in DOORS or module in DOORS[package], f"{module} may not import {package}"
        assert package != "torch" or module.split(".")[0] not in WITHOUT_TORCH, f"{module} must do without torch"


def test_no_attic() -> None:
    """No room is called for what it is not."""
    names = {part for module in modules() for part in module.split(".")}
    assert not names & {"utils", "util", "common", "core", "misc", "helpers", "base"}


def test_no_mutable_module_state() -> None:
    """At module level stand constants, functions and classes: nothing that a function changes."""
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], f"{name} uses a global"
        caches = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in {"lru_cache", "cache"}]
        assert not caches, f"{name} keeps a cache at module level"
