"""Settings are changed at their places, comments kept; a copy is a recipe that starts where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_hetero.cookbook.changes import changed, copy_recipe, values_said
from hf_hetero.cookbook.shelf import Recipe, recipe_at, shelf
from hf_hetero.errors import ConfigError

TEXT = """# about
num_ranks: 8        # of the run
model_config:
  model_type: llama
  layers:
  - 1

# data
dataset: a#b
methods:
- ring
max_steps: 3
"""


@pytest.mark.parametrize(
    "values",
    [
        {"num_ranks": 4},
        {"model_config": {"model_type": "qwen3", "sizes": [1, 2]}, "max_steps": 5},
        {"methods": ["gather"], "dataset": "x: y # z"},
        {"new": True, "learning_rate": 1e-5, "note": "1e-5", "none_of": "null"},
        {"model_config": None, "absent": None},
    ],
)
def test_what_is_read_is_what_was_set(values: dict[str, Any]) -> None:
    """The file holds the new values and all others, whatever lines a value took; None takes a key out."""
    expected = {**yaml.safe_load(TEXT), **values}
    assert yaml.safe_load(changed(TEXT, values)) == {k: v for k, v in expected.items() if v is not None}


def test_comments_stay() -> None:
    """Those on lines of their own, and that beside a changed value."""
    text = changed(TEXT, {"num_ranks": 4, "model_config": None})
    assert "# about" in text
    assert "# data" in text
    (line,) = [line for line in text.splitlines() if line.startswith("num_ranks: 4")]
    assert line.endswith("# of the run")
    assert changed(TEXT, {}) == TEXT


@pytest.mark.parametrize("recipe", shelf(), ids=lambda recipe: recipe.name)
def test_a_copy_is_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    """It has the same settings but those that were changed, names its own files, and is found as a recipe."""
    folder = tmp_path / "mine"
    command = copy_recipe(recipe, folder, {"max_steps": 7})
    copied = recipe_at(str(folder))
    assert yaml.safe_load(copied.settings.read_text()) == {
        **yaml.safe_load(recipe.settings.read_text()),
        "max_steps": 7,
    }
    assert copied.script.read_text() == recipe.script.read_text()
    assert (copied.launch and copied.launch.read_text()) == (recipe.launch and recipe.launch.read_text())
    assert [word for word in command if word.startswith(str(folder))]
    assert all(Path(word).exists() for word in command if word.startswith(str(folder)))
    assert "recipes/" not in copied.settings.read_text()
    page = (folder / "README.md").read_text()
    assert not [word for word in ("](..", "make demo", "pip install -e", "recipes/") if word in page]
    with pytest.raises(ConfigError, match="is there already"):
        copy_recipe(recipe, folder)


def test_words_become_values() -> None:
    """Values are what they would be in the file; a word without a key is refused."""
    assert values_said(["a=1", "b=[x, y]", "c=1e-5", "d=", "e=p=q"]) == {
        **{"a": 1, "b": ["x", "y"], "c": "1e-5", "d": None, "e": "p=q"}
    }
    for word in ("a", "=1", "a b=1", "x=[1"):
        with pytest.raises(ConfigError, match="--set"):
            values_said([word])
