"""A recipe that is right passes; one that is broken is refused with the key, the reason and what would do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from test_recipes import ARCHITECTURES, CHAT_TEMPLATE, SHRUNK
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hf_hetero import HeteroConfig
from hf_hetero.cli import main
from hf_hetero.cookbook.check import check_recipe
from hf_hetero.cookbook.keys import key_in, launch_problems
from hf_hetero.cookbook.sample import planned
from hf_hetero.cookbook.shelf import SHELF, Recipe, mesh_in, read, recipe_named, shelf
from hf_hetero.estimate.devices import Device

TEXTS = [f"def f{number}(x):\n" + f"    return x + {number}\n" * (1 + 3 * number % 17) for number in range(40)]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Forty texts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def quickstart(rows: str, **changes: Any) -> Any:
    """The quickstart on these rows, with changes, checked as far as it goes without training."""
    small = {"dataset": rows, "vocab_size": 300}
    return check_recipe(recipe_named("quickstart_cpu"), {**small, **changes}, trains=False)


BROKEN: dict[str, tuple[Any, str]] = {  # key -> a value that cannot be, and what would do
    "learning_rat": (1e-3, "Did you mean 'learning_rate'"),
    "max_length": ("many", "invalid int value.*Most tokens of a sample"),
    "max_length_policy": ("cut", "'error', 'truncate', 'split'|error.*truncate.*split"),
    "learning_rate": ("fast", "invalid float value.*default is 5e-05"),
    "lora_r": (0, "at least 1"),
    "optim": ("best", "select one of.*adamw"),
    "save_strategy": ("sometimes", "select one of.*'epoch'"),
    "solver": ("best", "choose one of auto, fast, mip"),
    "methods": (["telepathy"], "choose from ulysses, gather"),
    "max_degree": (0, "at least 1"),
    "per_device_train_batch_size": (0, "at least 1"),
    "num_ranks": (3, "cpu.yaml starts num_processes=4.*set num_ranks to 4"),
    "dataset": ("nowhere.jsonl", "there is no such file"),
    "text_column": ("body", r"only \['text'\]|none of \['text'\]"),
    "tokenizer": ("/nowhere", "'/nowhere' cannot be loaded"),
    "max_tokens_per_rank": (8, "degree 4 holds 32.*Lower the maximum length, add ranks"),
    "model_config": ({"model_type": "lama"}, "lama"),
    "model": ("/nowhere", "Set one of `model`"),
    "max_steps": ({"all": 1}, "one value.*default is -1"),
    "report_to": ("tensorbord", "Did you mean 'tensorboard'"),
    "logging_steps": ([5], "one value"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_broken_copy_is_refused_with_its_key(rows: str, key: str) -> None:
    """Whichever key is wrong is the one that is named, with its value or the reason, and with what would do."""
    value, remedy = BROKEN[key]
    found = quickstart(rows, **{key: value})
    assert [problem.key for problem in found.problems] == [key]
    assert re.search(remedy, found.problems[0].said), found.problems[0].said
    assert "\n" not in found.problems[0].said


def test_degrees_that_there_are_not(rows: str) -> None:
    """What would act as a smaller one is said; powers of two, and all ranks together, are not."""
    (problem,) = quickstart(rows, max_degree=3).problems
    assert (problem.key, "so this acts as 2. Set 2, or 4." in problem.said) == ("max_degree", True)
    assert quickstart(rows, max_degree=2).ok


def test_weights_that_would_not_be_sharded(rows: str, tmp_path: Path) -> None:
    """FSDP over CPUs, or over a single rank, by settings or launch file: training refuses it, too."""
    (problem,) = quickstart(rows, fsdp=True).problems
    assert (problem.key, "not over CPUs" in problem.said) == ("fsdp", True)
    launch = tmp_path / "fsdp.yaml"
    launch.write_text((SHELF / "accelerate" / "hsdp.yaml").read_text())
    sharded = replace(recipe_named("quickstart_cpu"), launch=launch)
    (problem,) = launch_problems(sharded, {"use_cpu": True})
    assert (problem.key, "distributed_type: FSDP of fsdp.yaml" in problem.said) == ("use_cpu", True)
    assert launch_problems(sharded, {}) == []
    (problem,) = launch_problems(replace(sharded, launch=None), {"fsdp": True})
    assert "one starts" in problem.said


def test_a_rate_below_zero_is_refused(rows: str) -> None:
    """An optimizer says so without the key; a schedule may start at 0."""
    (problem,) = quickstart(rows, learning_rate=-1).problems
    assert (problem.key, "at least 0" in problem.said) == ("learning_rate", True)
    assert quickstart(rows, learning_rate=0, report_to=["none"]).ok


def test_all_wrong_keys_are_named(rows: str) -> None:
    """A check does not end at the first of them."""
    found = quickstart(rows, learning_rat=1, max_length="many", solver="best")
    assert sorted(problem.key for problem in found.problems) == ["learning_rat", "max_length", "solver"]


def test_what_is_right_is_not_refused(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart itself is planned: all of its samples, on as many ranks as it has."""
    found = quickstart(rows)
    assert found.ok, found.problems
    assert found.planned.plan.num_ranks == 4
    assert found.planned.plan.num_samples == len(found.planned.lengths) == 16
    changes = ["--set", f"dataset={rows}", "--set", "vocab_size=300"]
    assert main(["recipes", "check", "quickstart_cpu", "--no-training", *changes]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "verdict   nothing wrong was found"
    assert printed[2].startswith("data      40 rows looked at, 40 samples")
    assert main(["recipes", "check", "quickstart_cpu", "--no-training", "--set", "solver=best"]) == 1
    assert capsys.readouterr().out.splitlines()[-2].startswith("wrong     solver: HeteroConfig.solver='best'")


def test_a_mesh_of_other_ranks_is_refused(tmp_path: Path) -> None:
    """A launch file whose replicas and their ranks are not as many as start is told so, with both."""
    shipped = recipe_named("llama31_8b_two_nodes")
    launch = tmp_path / "hsdp.yaml"
    launch.write_text((SHELF / "accelerate" / "hsdp.yaml").read_text())
    assert mesh_in(launch) == (2, 8)
    assert launch_problems(replace(shipped, launch=launch), {"num_ranks": 16}) == []
    launch.write_text(launch.read_text().replace("dp_shard_size: 8", "dp_shard_size: 4"))
    [problem] = launch_problems(replace(shipped, launch=launch), {"num_ranks": 16})
    assert (
        problem.said
        == "parallelism_config of hsdp.yaml has 2 x 4 ranks, and 16 start. Choose sizes whose product is 16."
    )
    assert shipped.launch is not None
    assert mesh_in(shipped.launch) is None


def test_a_step_is_planned_for_the_replicas_of_its_launch_file() -> None:
    """Over nodes, weights that are gathered inside a node take less of the step."""
    model = {"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    values = {"model_config": {**model, "num_attention_heads": 4}, "num_ranks": 16, "bf16": True}
    hetero, lengths = HeteroConfig(), [100] * 128
    over_all, over_nodes = (planned(values, lengths, hetero, None, True, shards).plan for shards in (None, 8))
    assert over_nodes.seconds < over_all.seconds


@pytest.mark.parametrize(("cores", "threads", "share"), [(2, 1, 0.5), (4, 1, 1.0), (8, 2, 1.0)])
def test_a_cpu_is_timed_as_a_rank_has_it(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, share: float
) -> None:
    """Four ranks have a quarter of the cores each, and no more of them in the estimate than in the run."""
    seen: list[int] = []

    def timed(shape: object, dtype: object) -> Device:
        seen.append(torch.get_num_threads())
        return Device("CPU", 8e9, 1e9, 1e9, attention_flops=6e9)

    before = torch.get_num_threads()
    monkeypatch.setattr("hf_hetero.cookbook.sample.cpu_device", timed)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    values = {key: value for key, value in read(recipe_named("quickstart_cpu").settings).items() if key != "dataset"}
    seconds = planned(values, [4000] * 16, HeteroConfig(), None, sharded=False).plan.seconds
    assert (seen, torch.get_num_threads()) == ([threads], before)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    whole = planned(values, [4000] * 16, HeteroConfig(), None, sharded=False).plan.seconds
    assert seconds == pytest.approx(whole) if share == 1 else seconds > 1.5 * whole


def test_a_message_is_of_the_key_that_it_names() -> None:
    """By the marks of a key, the longest first; else by a value; a word that only looks like a key is none."""
    values = {"model": "/nowhere", "model_config": None, "max_length": 3, "lora_target_modules": ["no_proj"]}
    assert key_in("model_config=None cannot be", values) == "model_config"
    assert key_in("Target modules {'no_proj'} are not in the base model", values) == "lora_target_modules"
    assert key_in("Cannot read '/nowhere'", values) == "model"
    assert key_in("the sum of max_length and others", values) == "max_length"
    assert key_in("no model is like it", values) == ""


# ------------------------------------------------------------------------------------------------------- with training

LATE: dict[str, tuple[Any, str]] = {  # what only a trial finds
    "label_smoothing_factor": (0.1, "set it to 0"),
    "lora_target_modules": (["no_proj"], "no_proj"),
    "dtype": ("floaty", "floaty"),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", LATE)
def test_what_only_training_finds(rows: str, key: str) -> None:
    """A setting that the trainer, the model or the adapters refuse is named, too."""
    value, remedy = LATE[key]
    more = {"lora_r": 4} if key.startswith("lora") else {}
    found = check_recipe(recipe_named("quickstart_cpu"), {"dataset": rows, "vocab_size": 300, key: value, **more})
    assert [problem.key for problem in found.problems] == [key], found.problems
    assert remedy in found.problems[0].said


def local_model(recipe: Recipe, folder: Path) -> str:
    """A small model of the recipe's kind with a tokenizer and a template, in place of the one on the hub."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )
    kind, special = ARCHITECTURES[read(recipe.settings)["model"]]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **SHRUNK, **special)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ROWS = {  # what a script trains on
    "sft.py": lambda number: {"messages": SAID * (1 + (7 * number) % 23)},
    "dpo.py": lambda number: {"prompt": "import os\n", "chosen": TEXTS[number], "rejected": "x = 1\n"},
    "classify.py": lambda number: {"text": TEXTS[number], "label": "ab"[number % 2]},
}
SAID = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "x = 1\n"}]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", shelf(), ids=lambda recipe: recipe.name)
def test_every_recipe_passes(recipe: Recipe, rows: str, tmp_path: Path) -> None:
    """Each is right in all that a check looks at; models and data of the hub are replaced by local ones."""
    changes: dict[str, Any] = {"dataset": rows}
    num_ranks = read(recipe.settings).get("num_ranks", 1)
    if "model" in read(recipe.settings):
        made = tmp_path / "made.jsonl"
        row = ROWS.get(recipe.script.name, ROWS["sft.py"])
        made.write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
        changes = {"model": local_model(recipe, tmp_path / "model"), "dataset": str(made), "dataset_config": None}
    found = check_recipe(recipe, changes)
    assert found.ok, found.problems
    assert found.trial is not None
    assert found.trial.num_ranks == min(num_ranks, 2)
    assert len(found.trial.losses) == (0 if recipe.script.name == "compare.py" else 3)
    if found.sample is not None:
        assert found.planned is not None
        assert found.planned.plan.num_ranks == num_ranks
