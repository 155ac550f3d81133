"""The shelf holds the recipes that come with the package: each is a folder with a train.yaml and a README.md."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_hetero.errors import ConfigError

SHELF = Path(__file__).parents[1] / "recipes"
"""In a checkout this is a link to the folder of that name at its top; in an installed wheel, a folder."""
SETTINGS = "train.yaml"
USUAL_SCRIPT = "sft.py"
MESH = "parallelism_config"
"""What accelerate's files call the mesh of ranks, and what the names of its sizes begin with."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A `Recipe` is a file of settings, the script that reads it, and how its ranks are started.

    Args:
        name: of its folder.
        settings: the YAML file.
        script: a Python file with `parse` and `main`, which take the words after its name.
        launch: of `accelerate launch`; None: a single rank.
    """

    name: str
    settings: Path
    script: Path
    launch: Path | None

    @property
    def about(self) -> str:
        """Return the comment that the settings open with."""
        first = self.settings.read_text(encoding="utf-8").partition("\n")[0]
        return re.sub(r"\s*\(recipes/\S+\)", "", first.lstrip("# ")) if first.startswith("#") else ""

    @property
    def scripts(self) -> tuple[Path, ...]:
        """Return the script, and those beside it that it imports, at any depth."""
        found = [self.script]
        for script in found:  # which grows meanwhile
            names = re.findall(r"^(?:from|import) (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
            beside = (script.with_name(f"{name}.py") for name in names)
            found += [path for path in beside if path.is_file() and path not in found]
        return tuple(found)

    @property
    def readme(self) -> Path:
        """Return the page that says what it shows, needs, and is run by."""
        return self.settings.with_name("README.md")


def shelf() -> tuple[Recipe, ...]:
    """Find the recipes that come with the package, by name."""
    return tuple(_shipped(settings) for settings in sorted(SHELF.glob(f"*/{SETTINGS}")))


def recipe_named(name: str) -> Recipe:
    """Find a recipe that comes with the package.

    Raises:
        ConfigError: there is none of that name, with those that are near.
    """
    by_name = {recipe.name: recipe for recipe in shelf()}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(by_name)}."
    raise ConfigError(f"No recipe is called {name!r:.60}: {hint}")


def recipe_at(where: str) -> Recipe:
    """Find a recipe by its name, its folder or its file of settings.

    One's own file is read by the script beside it, if there is one that is like those here, else by `sft.py`; its ranks
    are started by the file of accelerate beside it.

    Raises:
        ConfigError: there is none.
    """
    path = Path(where)
    if path.is_dir():
        path = path / SETTINGS
    if not path.is_file():
        if path.suffix not in {".yaml", ".yml"} and len(path.parts) == 1:
            return recipe_named(where)
        raise ConfigError(f"There is no file {str(path)!r}. Name a train.yaml, its folder, or a recipe of `list`.")
    if path.resolve().is_relative_to(SHELF.resolve()):
        return _shipped(path)
    scripts = [script for script in sorted(path.parent.glob("*.py")) if "def parse(" in script.read_text("utf-8")]
    launches = [file for file in sorted(path.parent.glob("*.yaml")) if file != path and _starts_ranks(file)]
    script = scripts[0] if scripts else SHELF / USUAL_SCRIPT
    return Recipe(path.stem, path, script, launches[0] if launches else None)


def _starts_ranks(file: Path) -> bool:
    """Tell whether a file is one of accelerate; one beside settings that cannot be read is none of theirs."""
    try:
        return "num_processes" in read(file)
    except ConfigError:
        return False


def read(settings: Path) -> dict[str, Any]:
    """Read a YAML file of `key: value`.

    Raises:
        ConfigError: it cannot be read, holds something else, or has a key twice, of which the last would count.
    """
    try:
        text = settings.read_text(encoding="utf-8")
        values: Any = yaml.safe_load(text) or {}
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader) if isinstance(values, dict) and values else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {settings}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):  # pyright: ignore
        raise ConfigError(f"{settings} holds {values!r:.60}; it must hold lines of `key: value`.")
    keys = [key.value for key, _ in node.value] if node else []
    if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), ""):
        raise ConfigError(f"{settings} has the key {twice!r} twice, and the last would count. Leave one of them.")
    return values  # pyright: ignore[reportUnknownVariableType]


def mesh_in(launch: Path) -> tuple[int, int] | None:
    """Read how many replicas a file of accelerate makes, and of how many ranks; None: it says nothing about them."""
    sizes: Any = read(launch).get(MESH)
    if not isinstance(sizes, dict):
        return None
    replicas, shards = (sizes.get(f"{MESH}_{axis}_size", 1) for axis in ("dp_replicate", "dp_shard"))
    return replicas, shards


def _shipped(settings: Path) -> Recipe:
    """Describe a recipe of the shelf: its README.md has the command, which names script and launch file."""
    said = settings.with_name("README.md").read_text(encoding="utf-8")
    script = re.search(r"recipes/(\w+\.py)\s+--config", said)
    launch = re.search(r"--config_file recipes/(accelerate/\w+\.yaml)", said)
    return Recipe(
        settings.parent.name,
        settings,
        SHELF / (script[1] if script else USUAL_SCRIPT),
        SHELF / launch[1] if launch else None,
    )
