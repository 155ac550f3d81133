"""Advice is what planning and estimates say of the same run, with each lever pulled for real; it is written out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from forecast.test_forecast import saved

from hf_hetero import Planner
from hf_hetero.advice.advise import Advice, advise, machines_of
from hf_hetero.advice.levers import Run, changes, planner_of
from hf_hetero.advice.outlook import longest
from hf_hetero.advice.start import start_of, write_start
from hf_hetero.cli import main
from hf_hetero.cookbook.keys import key_problems, launch_problems, script_of
from hf_hetero.cookbook.shelf import MESH, read, recipe_at
from hf_hetero.errors import ConfigError
from hf_hetero.forecast.forecast import Model, forecast, model_named
from hf_hetero.forecast.setting import Setting
from hf_hetero.what_if.sources import Source, global_batches

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16}
SHAPE |= {"num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 1 << 20, "head_dim": 128}
LENGTHS = np.random.default_rng(0).lognormal(8, 1.5, 120).astype(np.int64) + 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a model of 0.4B weights."""
    return saved(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def model(folder: str) -> Model:
    return model_named(folder)


def source(lengths: Any = LENGTHS) -> Source:
    return Source("lengths.txt", np.asarray(lengths, dtype=np.int64), int(max(lengths)))


@pytest.fixture(scope="module")
def advice(model: Model) -> Advice:
    return advise(source(), model, Run(machines_of("4xA100"), Setting()), batch_size=32)


def test_seconds_are_those_of_the_planner(folder: str, advice: Advice) -> None:
    """Tokens a second are the same steps' by the forecast's cost model, planned here once more; a degree's, too."""
    planner = Planner(forecast(folder, "4xA100").cost, 4, solver="fast")
    batches = global_batches(source(), 32, 3)
    tokens = sum(map(sum, batches))
    assert advice.outlook.tokens_per_s == pytest.approx(tokens / sum(planner.plan(batch).seconds for batch in batches))
    static = {d: sum(planner.static(batch, d).seconds for batch in batches) for d in advice.outlook.static_s}
    assert advice.outlook.static_tokens_per_s == pytest.approx(tokens / min(static.values()))
    assert advice.outlook.bound_s <= advice.outlook.adaptive_s <= min(static.values())
    assert advice.days(1000.0) == pytest.approx(LENGTHS.sum() / 1000 / 86_400)


def test_what_fits_fits_and_no_more(advice: Advice) -> None:
    """A sample of so many tokens takes no more memory than there is on so many ranks; a few hundred more do not fit."""
    assert set(advice.holds) == {"", "recompute"}
    for doing, by_degree in advice.holds.items():
        cost = advice.forecast.cost.by_activations[doing or None]
        for degree, tokens in by_degree.items():
            assert cost.num_bytes([tokens], degree) <= cost.memory_bytes_per_rank
            assert cost.num_bytes([tokens + degree], degree) > cost.memory_bytes_per_rank


def test_a_lever_is_the_changed_run(folder: str, advice: Advice) -> None:
    """What is said of a change is what the planner says of the changed run, by a forecast of its own."""
    changed = dict(changes(advice.run, advice.forecast.is_sharded))
    assert [lever.name for lever in advice.levers] == list(changed)
    batches = global_batches(source(), 32, 3)
    compared = 0
    for lever in advice.levers:
        run = changed[lever.name]
        if lever.tokens_per_s is not None:
            cost = forecast(folder, run.machines.name, run.setting).cost
            planner = Planner(cost, lever.num_gpus, max_degree=run.max_degree, solver="fast")
            seconds = sum(planner.plan(batch).seconds for batch in batches)
            assert lever.tokens_per_s == pytest.approx(sum(map(sum, batches)) / seconds)
            assert lever.longest_tokens == cost.leanest.capacity_tokens * planner.degrees[-1]
            compared += 1
    assert compared >= 4
    assert len({lever.tokens_per_s for lever in advice.levers if lever.tokens_per_s}) > 3


def test_levers_are_of_many_kinds(model: Model) -> None:
    """Memory, degree, kernel, nodes and cards each have one; what is done already has none."""
    names = " ".join(name for name, _ in changes(Run(machines_of("16xH100"), Setting()), True))
    for word in ("offload", "recompute", "FlashAttention 3", "DDP", "lora_r", "max_degree: 8", "node more", "H200"):
        assert word in names
    assert "HSDP" in names
    replicas = Setting(shards=8)
    by_name = {name: run.setting for name, run in changes(Run(machines_of("16xH100"), replicas), True)}
    [fsdp] = [setting for name, setting in by_name.items() if "FSDP2" in name]
    assert (fsdp.sharded, fsdp.shards) == (True, None)
    [ddp] = [setting for name, setting in by_name.items() if "DDP" in name]
    assert (ddp.sharded, ddp.shards) == (False, None)
    assert not [name for name in by_name if "HSDP" in name]
    done = Setting(lora_r=8, checkpointing=True, offload=True, kernel="fa4")
    names = " ".join(name for name, _ in changes(Run(machines_of("1xH100"), done), False))
    assert names.startswith("one card more: 2xH100")


def test_what_to_do_next(advice: Advice) -> None:
    """It gains 2 % or more, needs no other GPUs where one that does not has as much to give, and trains the same."""
    lever = advice.next_lever()
    gains = {
        other.name: advice.gain(other) for other in advice.levers if other.num_gpus == 4 and "lora" not in other.name
    }
    best = max(gains, key=lambda name: gains[name])
    if gains[best] >= 1.02:
        assert lever is not None
        assert lever.name == best
    else:
        assert lever is None or lever.num_gpus > 4
    speed = advice.outlook.tokens_per_s
    slow = replace(advice, levers=tuple(replace(other, tokens_per_s=speed) for other in advice.levers))
    assert slow.next_lever() is None


def test_samples_that_fit_nowhere(model: Model) -> None:
    """They are left out of the seconds and counted, and the lever that is advised makes room for them."""
    run = Run(machines_of("2xA100"), Setting())
    most = longest(planner_of(model, run).cost_model, 2)
    lengths = [*LENGTHS.tolist(), most + most // 10]
    found = advise(source(lengths), model, run, batch_size=32)
    assert not found.fits
    assert found.num_fitting == len(lengths) - 1
    lever = found.next_lever()
    assert lever is not None
    assert lever.longest_tokens is not None
    assert lever.longest_tokens > lengths[-1]
    with pytest.raises(ConfigError, match=r"none fits: the shortest has"):
        advise(source([10**9]), model, run)


@pytest.mark.parametrize(
    ("gpus", "setting", "launch"),
    [
        ("1xA100", Setting(), None),
        ("4xA100", Setting(), "fsdp2.yaml"),
        ("4xA100", Setting(sharded=False, checkpointing=True), "ddp.yaml"),
        ("16xH100", Setting(checkpointing=True), "fsdp2_nodes.yaml"),
        ("3x8xH100", Setting(checkpointing=True, shards=4), "hsdp.yaml"),
        ("3x8xH100", Setting(lora_r=8, offload=True), "ddp.yaml"),
    ],
)
def test_what_is_written_is_a_recipe_for_the_run(
    model: Model, folder: str, gpus: str, setting: Setting, launch: str | None, tmp_path: Path
) -> None:
    """Settings that the script reads, and a launch file that accelerate reads, of the same ranks, weights and model."""
    run = Run(machines_of(gpus), setting)
    found = advise(source(), model, run, steps=1)
    start = start_of(found, folder, "rows.jsonl")
    words = write_start(start, found, "said", tmp_path / "out")
    recipe = recipe_at(str(tmp_path / "out"))
    values = read(recipe.settings)
    assert not key_problems(script_of(recipe), values)
    assert not launch_problems(recipe, values)
    assert (values["num_ranks"], values["model"], values["dataset"]) == (run.machines.num_ranks, folder, "rows.jsonl")
    assert values.get("lora_r") == setting.lora_r
    assert values["max_length"] == LENGTHS.max()
    assert (words[-3], words[-1]) == (str(recipe.script), str(recipe.settings))
    assert (recipe.launch and recipe.launch.name) == launch
    if recipe.launch is not None:
        config: Any = load_config_from_file(str(recipe.launch))
        assert (config.num_processes, config.num_machines) == (run.machines.num_ranks, run.machines.num_nodes)
        sharded = config.distributed_type == "FSDP"
        assert sharded == found.forecast.is_sharded
        sizes = dict(config.parallelism_config)
        replicas = {} if setting.shards is None else {f"{MESH}_dp_replicate_size": 6, f"{MESH}_dp_shard_size": 4}
        assert sizes == replicas
        recomputes = (
            config.fsdp_config["fsdp_activation_checkpointing"] if sharded else values.get("activation_checkpointing")
        )
        assert bool(recomputes) == setting.checkpointing
        assert yaml.safe_load(recipe.launch.read_text())
    with pytest.raises(ConfigError, match="is there already"):
        write_start(start, found, "said", tmp_path / "out")


def test_the_command(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says that all is estimated, what is next, and what to start from; as JSON, the same numbers."""
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(map(str, LENGTHS)))
    words = ["advise", str(lengths), folder, "--gpus", "2xA100", "--batch-size", "16"]
    assert main([*words, "-o", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("estimate  All seconds, bytes and tokens below are estimates")
    assert "the best single degree" in " ".join(printed.lower().split())
    assert (tmp_path / "run" / "train.yaml").exists()
    assert (tmp_path / "run" / "ADVICE.txt").read_text().strip() in printed
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["estimated"], found["gpus"]) == ("hf-hetero-advice/1", True, "2xA100")
    assert f"{found['adaptive']['tokens_per_s']:,.0f} tokens/s" in printed
    assert found["recipe"] in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "12xA100"], "12 share|how many share"),
        (["--gpus", "4xA100", "--batch-size", "30"], r"--batch-size 30: 4 ranks .* Take 28 or 32"),
        (["--gpus", "4xA100", "--epochs", "0"], "--epochs 0"),
        (["--gpus", "4xA1000000"], "No GPU is known"),
    ],
)
def test_what_cannot_be_advised(
    folder: str, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, which names the value."""
    (tmp_path / "lengths.txt").write_text("100\n200\n")
    assert main(["advise", str(tmp_path / "lengths.txt"), folder, *words]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)


def test_sixteen_gpus_are_two_nodes() -> None:
    """Eight share a node where nothing else is said; what leaves that open is refused as everywhere."""
    assert machines_of("16xH100").name == "2x8xH100"
    assert machines_of("8xH100").name == "8xH100"
    assert machines_of("1x16xH100").name == "1x16xH100"


def test_a_limit_of_the_degree_is_kept(model: Model) -> None:
    """With --max-degree no longer sample fits than so many ranks hold."""
    run = Run(machines_of("4xA100"), Setting(), max_degree=2)
    found = advise(source(), model, run, batch_size=32)
    assert all(max(by_degree) == 2 for by_degree in found.holds.values())
    assert planner_of(model, run).degrees == (1, 2)
    assert max(found.outlook.static_s) == 2
