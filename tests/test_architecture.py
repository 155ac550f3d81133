"""The floors of the house: a module imports only from floors below, or from its own room. One door per dependency.

And how large a file, a function and a folder may be, and that a folder's README.md names its files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # bottom to top; rooms on one floor do not know each other
    {"errors"},
    {"plan", "progress", "samples", "terminal", "topology"},
    {"config", "layout", "model", "plan_in_words", "ranks"},
    {"heads"},
    {"attention", "costs", "step"},
    {"images", "state_layers"},
    {"manners"},
    {"callbacks", "collators", "estimate", "planner"},
    {"checks", "data"},
    {"fine_tuning", "forecast", "trainer", "what_if"},
    {"profile", "report"},
    {"cookbook"},
    {"advice"},
    {""},  # hf_hetero/__init__.py, the catalogue
    {"cli"},
]
PLANNER_FLOORS = [  # inside the planner's room, bottom to top
    {"problem"},
    {"draft", "bound"},
    {"search.joining", "search.cuts", "search.homogeneous"},
    {"search.packing"},
    {"search.descent", "search.parts"},
    {"search.fast"},
    {"improve.program", "improve.energy"},
    {"improve.milp", "improve.group_rows", "improve.annealing"},
    {"improve.relaxation"},
    {"improve.improve"},
    {"basic"},
    {"methods"},
    {"policies"},
    {"items"},
    {"uneven.placing"},
    {"uneven.levelling"},
    {"uneven.uneven"},
    {"planner"},
    {"process"},
]
PACKAGES = {
    "hf_hetero",
    "hf_hetero.attention",
    "hf_hetero.planner",
    "hf_hetero.planner.search",
    "hf_hetero.planner.improve",
    "hf_hetero.planner.uneven",
}
"""What is imported from these may be a module."""
DOORS = {  # third-party package -> the only rooms that may import it
    "flash_attn": {"attention.kernels.flash"},
    "flash_attn_interface": {"attention.kernels.flash"},
    "kernels": {"attention.kernels.hub"},
    "mip": {"planner.improve.program"},
    "trl": {
        "trainer.sft",
        "trainer.pairs.dpo",
        "trainer.pairs.kto",
        "trainer.pairs.reference",
        "trainer.pairs.reward",
        "trainer.pairs.without_reference",
    },
    "rich": {"terminal.drawn"},
    "trackio": {"callbacks.stragglers"},
    "matplotlib": {"report.drawing", "report.plan_picture", "report.simulation_picture"},
    "datasets": {
        "cookbook.trial",
        "fine_tuning.image_chats",
        "fine_tuning.sources",
        "fine_tuning.tables",
        "data.lengths",
        "trainer.pairs.reference",
        "what_if.corpora",
    },
    "transformers": {
        "attention.interface",
        "attention.kernels.cuda",
        "attention.kernels.choice",
        "attention.kernels.hub",
        "callbacks.calibration",
        "callbacks.plan_metrics",
        "callbacks.progress",
        "callbacks.rank_speeds",
        "callbacks.recording",
        "callbacks.step_report",
        "callbacks.stragglers",
        "checks.check",
        "checks.exactness",
        "checks.outline",
        "fine_tuning.settings",
        "fine_tuning.vocabulary",
        "data.streams.loaders",
        "data.loader",
        "data.evaluation_loader",
        "images.sizes",
        "model.activations",
        "model.classes.labelled",
        "model.wrapped",
        "profile.models",
        "profile.timing",
        "checks.own_loss",
        "checks.probe",
        "checks.tiny",
        "cookbook.keys",
        "cookbook.sample",
        "cookbook.trial",
        "ranks.gradients",
        "ranks.mesh",
        "ranks.sharding",
        "trainer.checkpoints.checkpoint",
        "trainer.checkpoints.restoring",
        "trainer.checkpoints.resuming",
        "trainer.checkpoints.saves",
        "trainer.checkpoints.saving",
        "trainer.checkpoints.taken",
        "trainer.checkpoints.writing",
        "trainer.classes.planned",
        "trainer.embeddings.embedding",
        "trainer.evaluation.evaluation",
        "trainer.fitting",
        "trainer.loop_counts",
        "trainer.machine",
        "trainer.out_of_memory",
        "trainer.packing",
        "trainer.pairs.dpo",
        "trainer.pairs.kto",
        "trainer.pairs.reward",
        "trainer.pairs.without_reference",
        "trainer.evaluation.predictions",
        "trainer.reporting",
        "trainer.routers",
        "trainer.run",
        "trainer.stopping",
        "trainer.trainer",
        "trainer.training",
        "what_if.corpora",
    },
}
WITHOUT_TORCH = {
    "errors",
    "config",
    "topology",
    "plan",
    "plan_in_words",
    "costs",
    "layout",
    "heads",
    "planner",
    "progress",
    "report",
    "samples",
    "terminal",
    "what_if",
    "cli",
    "",
}

FOLDERS = ("hf_hetero", "collators", "callbacks", "recipes", "benchmarks")
MOST_LINES, MOST_FUNCTION_LINES, MOST_FILES = 320, 60, 12


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder, prefix in (("hf_hetero", ""), ("collators", "collators"), ("callbacks", "callbacks")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part and part != "__init__")
            if not (folder == "hf_hetero" and name.split(".")[0] in {"collators", "callbacks", "recipes"}):  # links
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
            if node.module in PACKAGES:
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


def test_kernels_know_no_ranks() -> None:
    """Methods cross ranks, kernels compute: a kernel imports nothing of attention but other kernels."""
    kernels = {name: path for name, path in modules().items() if name.startswith("attention.kernels")}
    assert kernels
    for module, path in kernels.items():
        above = {target for target in imports(path) if target.startswith("hf_hetero.attention.")}
        above -= {target for target in above if target.startswith("hf_hetero.attention.kernels")}
        assert not above | (imports(path) & {"torch.distributed"}), module


def upward(module: str, targets: set[str]) -> set[str]:
    """Of the names that a module of the planner's room imports, those that are not below it; names of the door are."""
    number = {name: number for number, names in enumerate(PLANNER_FLOORS) for name in names}
    prefix = "hf_hetero.planner."
    inside = {target.removeprefix(prefix) for target in targets - PACKAGES if target.startswith(prefix)}
    return {target for target in inside if number.get(target, len(number)) >= number[module]}


@pytest.mark.parametrize("module", sorted({module for names in PLANNER_FLOORS for module in names}))
def test_the_planner_calls_only_down(module: str) -> None:
    """Inside the planner's room, each file imports from lower ones only, so that no layer knows who calls it."""
    assert not upward(module, imports(modules()[f"planner.{module}"])), f"planner.{module} may not import these"


def test_the_planner_has_a_floor_for_each_file() -> None:
    """Each file of the planner's room stands on a floor, and its sub-rooms' doors import nothing."""
    files = {module.removeprefix("planner.") for module in modules() if module.startswith("planner.")}
    rooms = {"search", "improve", "uneven"}
    assert files == {module for names in PLANNER_FLOORS for module in names} | rooms
    assert not any(imports(modules()[f"planner.{room}"]) for room in rooms)


def test_a_call_upward_would_be_noticed() -> None:
    """The check above refuses a layer that imports the one above, itself, or the door."""
    targets = {f"hf_hetero.planner.{name}" for name in ("Planner", "methods", "policies", "basic", "search.fast")}
    assert upward("methods", {"hf_hetero.planner", *targets}) == {"Planner", "methods", "policies"}


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


# ------------------------------------------------------------------------------------------------------------ the sizes


def sources() -> list[str]:
    """Every Python file that is no test, by its path; the two links of the package are not followed."""
    paths = {path.resolve().relative_to(ROOT.resolve()) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return sorted(map(str, paths))


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Functions with too many lines, decorators not counted, and how many they have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield node.name, lines


@pytest.mark.parametrize("path", sources())
def test_files_and_functions_are_short(path: str) -> None:
    """A file has at most 320 lines, a function at most 60."""
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count("\n") <= MOST_LINES, f"{path}: split it"
    assert not list(long_functions(source)), path


def test_a_long_function_is_seen() -> None:
    """One of 61 lines counts as long, also inside a class; one of 60 does not."""

    def within_a_class(lines: int) -> str:
        return "class A:\n    def f(self):\n" + "        pass\n" * (lines - 1)

    assert list(long_functions(within_a_class(61))) == [("f", 61)]
    assert not list(long_functions(within_a_class(60)))


def folders_of_the_package() -> dict[str, set[str]]:
    """Each folder with Python files -> their names, `__init__` not counted."""
    held: dict[str, set[str]] = {}
    for path in map(Path, sources()):
        if path.parts[0] in {"hf_hetero", "collators", "callbacks"} and path.stem != "__init__":
            held.setdefault(str(path.parent), set()).add(path.stem)
    return held


@pytest.mark.parametrize("folder", sorted(folders_of_the_package()))
def test_folders_are_small(folder: str) -> None:
    """A folder holds at most 12 files."""
    names = folders_of_the_package()[folder]
    assert len(names) <= MOST_FILES, f"{folder} holds {len(names)}: {sorted(names)}"


def files_named(readme: str) -> list[str]:
    """Names in backticks in the first column of the table whose head is `file`."""
    rows = re.search(r"^\| file \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", readme, re.MULTILINE)
    return [
        name for row in (rows[1] if rows else "").splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]


@pytest.mark.parametrize("folder", sorted(set(folders_of_the_package()) - {"hf_hetero"}))
def test_a_readme_names_its_files(folder: str) -> None:
    """A folder's README.md has a table with each of its files once, and no other."""
    readme = ROOT / folder / "README.md"
    assert sorted(files_named(readme.read_text(encoding="utf-8"))) == sorted(folders_of_the_package()[folder])


def test_the_map_names_its_rooms() -> None:
    """The table of rooms in the package's README.md has each room once, and no other."""
    table = (ROOT / "hf_hetero" / "README.md").read_text(encoding="utf-8").split("\n| room |")[1].split("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)/?`", row.split("|")[1])]
    assert sorted(named) == sorted({name.split(".")[0] for name in modules() if name} - {"collators", "callbacks"})


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every way to come back to a module by its imports that a walk in depth meets."""
    met: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            met.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return met


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The imports between all modules, those inside functions and for types included, have no circle."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                # a name of a package is a module of its own, or stands in its `__init__`
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                targets.update(name if name.removeprefix("hf_hetero.") in known else node.module for name in names)
        inner = {target.removeprefix("hf_hetero.") for target in targets if target.startswith("hf_hetero.")}
        graph[module] = inner & known.keys()
    assert not circles(graph)


def test_a_circle_would_be_noticed() -> None:
    """Two that import each other are one, whoever imports them."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
