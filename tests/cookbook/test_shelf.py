"""Recipes are found by their folders, in a checkout and by anybody's file; what is not there is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_hetero.cookbook.shelf import SHELF, read, recipe_at, recipe_named, shelf
from hf_hetero.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_folder_with_settings_is_a_recipe() -> None:
    """Those of the shelf are those of the repository, each with a script and a line about it."""
    assert {recipe.name for recipe in shelf()} == {path.parent.name for path in ROOT.glob("recipes/*/train.yaml")}
    for recipe in shelf():
        assert recipe.script.is_file()
        assert recipe.about
        assert "recipes/" not in recipe.about


def test_a_page_names_its_script_and_launch_file() -> None:
    """They are those of the command in its README.md; one for a single rank has no launch file."""
    two_nodes = recipe_named("llama31_8b_two_nodes")
    assert (two_nodes.script.name, two_nodes.launch) == ("sft.py", SHELF / "accelerate" / "fsdp2_nodes.yaml")
    assert recipe_named("qwen3_06b_one_card").launch is None
    for recipe in shelf():
        num_ranks = read(recipe.settings).get("num_ranks")
        assert num_ranks is None or (recipe.launch is None) == (num_ranks == 1)


def test_scripts_that_are_imported_come_along() -> None:
    """Those beside a script, each once; packages of the same place are none."""
    assert [script.name for script in recipe_named("quickstart_cpu").scripts] == ["sft.py"]
    assert sorted(script.name for script in recipe_named("compare").scripts) == ["compare.py", "sft.py", "turns.py"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    """It is read by the script beside it that is like those here, and started by the file of accelerate beside it."""
    settings = tmp_path / "mine.yaml"
    settings.write_text("num_ranks: 2\n")
    alone = recipe_at(str(settings))
    assert (alone.script, alone.launch) == (SHELF / "sft.py", None)
    (tmp_path / "a_tool.py").write_text("print()\n")
    (tmp_path / "train.py").write_text("def parse(argv): ...\ndef main(argv): ...\n")
    (tmp_path / "launch.yaml").write_text("num_processes: 2\n")
    found = recipe_at(str(settings))
    assert (found.script.name, found.launch) == ("train.py", tmp_path / "launch.yaml")
    settings.rename(tmp_path / "train.yaml")
    assert recipe_at(str(tmp_path)).settings == tmp_path / "train.yaml"
    assert recipe_at(str(ROOT / "recipes" / "quickstart_cpu")) == recipe_named("quickstart_cpu") or (
        recipe_at(str(ROOT / "recipes" / "quickstart_cpu")).launch == recipe_named("quickstart_cpu").launch
    )


def test_what_is_not_there() -> None:
    """A name that is nearly one says which; a file that is not there is named."""
    with pytest.raises(ConfigError, match=r"'quikstart_cpu': did you mean quickstart_cpu"):
        recipe_named("quikstart_cpu")
    with pytest.raises(ConfigError, match=r"No recipe is called 'zzz': there are .*quickstart_cpu"):
        recipe_at("zzz")
    with pytest.raises(ConfigError, match=r"no file 'nowhere/train\.yaml'"):
        recipe_at("nowhere/train.yaml")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    """What is no YAML, or no lines of `key: value`, is said with the file."""
    path = tmp_path / "a.yaml"
    for text in ("a: [1", "- a", "3: 4"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml"):
            read(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML takes the last without a word, which is not what was meant by one of them; nested keys are others."""
    file = tmp_path / "train.yaml"
    file.write_text("max_steps: 3\nmodel_config: {max_steps: 1}\n")
    assert read(file)["max_steps"] == 3
    file.write_text("max_steps: 3\nnum_ranks: 2\nmax_steps: 4\n")
    with pytest.raises(ConfigError, match="'max_steps' twice"):
        read(file)


def test_another_file_that_cannot_be_read_is_none_of_a_recipe(tmp_path: Path) -> None:
    """Only what is asked for has to be right, and a launch file beside it is still found."""
    (tmp_path / "train.yaml").write_text("num_ranks: 2\n")
    (tmp_path / "broken.yaml").write_text("a:\t- b\n\tc")
    (tmp_path / "launch.yaml").write_text("num_processes: 2\n")
    launch = recipe_at(str(tmp_path)).launch
    assert launch is not None
    assert launch.name == "launch.yaml"
