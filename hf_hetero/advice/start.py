"""A start is the recipe and the launch file that are nearest to a run, and the same written out for it."""

from __future__ import annotations

import difflib
import math
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_hetero.advice.advise import Advice
from hf_hetero.cookbook.changes import changed
from hf_hetero.cookbook.shelf import MESH, SETTINGS, SHELF, USUAL_SCRIPT, Recipe, mesh_in, read, shelf
from hf_hetero.errors import ConfigError

REPORT = "ADVICE.txt"
COST_MODEL = "estimate.json"


@dataclass(frozen=True, slots=True)
class Start:
    """A `Start` is what to begin from.

    Args:
        recipe: whose settings are nearest.
        launch: file of accelerate; None: a single rank.
        settings: values that the run has instead of the recipe's; None: it has no such key.
        launch_settings: the same of the launch file.
        decided: keys that the advice is about, changed or not.
    """

    recipe: Recipe
    launch: Path | None
    settings: Mapping[str, Any]
    launch_settings: Mapping[str, Any]
    decided: frozenset[str]


def start_of(advice: Advice, model: str, dataset: str | None) -> Start:
    """Find what to begin a run from.

    Args:
        advice: on the run.
        model: by its name.
        dataset: as a recipe names it; None: the recipe's own.
    """
    recipe, machines = _nearest(advice, model), advice.run.machines
    setting, recipe_has = advice.run.setting, read(recipe.settings)
    has_replicas = setting.shards not in (None, machines.num_ranks)
    launch = None
    if machines.num_ranks > 1:
        launch = _launch_file(advice.forecast.is_sharded, machines.num_nodes > 1, has_replicas)
    whole = bool(setting.checkpointing and not advice.forecast.is_sharded)
    settings: dict[str, Any] = {
        "num_ranks": machines.num_ranks,
        "model": model,
        "dtype": "float32" if setting.lora_r is None else setting.dtype,
        "bf16": True if setting.dtype in ("bfloat16", "bf16") else None,
        "fp16": True if setting.dtype in ("float16", "fp16") else None,
        "lora_r": setting.lora_r,
        "max_length": advice.context_tokens,
        "max_degree": advice.run.max_degree,
        "per_device_train_batch_size": advice.batch_size // machines.num_ranks or 1,
        "activation_checkpointing": whole or None,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if whole else None,
        "activation_policies": ["recompute", "offload"] if setting.offload else None,
        "output_dir": "outputs/" + (Path(model).name or "run"),
    }
    if setting.lora_r is None:
        settings |= {key: None for key in recipe_has if key.startswith("lora_")}
    if dataset is not None:
        settings |= {"dataset": dataset, "dataset_config": None}
    launch_settings: dict[str, Any] = {"num_processes": machines.num_ranks, "num_machines": machines.num_nodes}
    if machines.num_nodes > 1:
        launch_settings |= {"main_process_ip": "127.0.0.1", "main_process_port": 29500}
    changes = {key: value for key, value in settings.items() if recipe_has.get(key) != value}
    return Start(recipe, launch, changes, launch_settings, frozenset(settings))


def write_start(start: Start, advice: Advice, said: str, folder: Path) -> list[str]:
    """Write settings, script, launch file, cost model and advice into a folder; return the words that start the run.

    Args:
        start: what to write.
        advice: whose cost model is written, for `hf-hetero plan` and `simulate`.
        said: the advice, in words.
        folder: new, or without files of these names.

    Raises:
        ConfigError: a file is there already, or cannot be written.
    """
    settings, script = folder / SETTINGS, folder / start.recipe.script.name
    launch = None if start.launch is None else folder / start.launch.name
    written = [settings, script, folder / COST_MODEL, folder / REPORT, *([launch] if launch else [])]
    for file in written:
        if file.exists():
            raise ConfigError(f"{file} is there already. Name another folder, or move it away.")
    text = _without_comments(start.recipe.settings.read_text(encoding="utf-8"), start.decided)
    about = f"# {advice.forecast.trained} on {advice.run.machines.name}; from the recipe {start.recipe.name}\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings.write_text(about + changed(text.partition("\n")[2], start.settings), encoding="utf-8")
        for file in start.recipe.scripts:
            shutil.copyfile(file, folder / file.name)
        if start.launch is not None and launch is not None:
            launch.write_text(_launch_text(start, advice), encoding="utf-8")
        (folder / REPORT).write_text(said + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write into {str(folder)!r}: {error.strerror or error}.") from error
    advice.forecast.cost.save(str(folder / COST_MODEL))
    words = ["accelerate", "launch", "--config_file", str(launch)] if launch else ["python"]
    return [*words, str(script), "--config", str(settings)]


def _without_comments(text: str, keys: Collection[str]) -> str:
    """Leave out what a recipe says of its own values of these keys: sums of other ranks, for one."""
    lines = (re.sub(r"\s+#.*$", "", line) if line.partition(":")[0] in keys else line for line in text.splitlines())
    return "\n".join(lines) + "\n"


def _launch_text(start: Start, advice: Advice) -> str:
    """Return the launch file for the run: as many ranks, layers recomputed everywhere if that was estimated."""
    assert start.launch is not None
    text = changed(start.launch.read_text(encoding="utf-8"), start.launch_settings)
    wanted = "true" if advice.run.setting.checkpointing else "false"
    for other in {"true", "false"} - {wanted}:
        text = text.replace(f"fsdp_activation_checkpointing: {other}", f"fsdp_activation_checkpointing: {wanted}")
    if (shards := advice.run.setting.shards) is not None:
        sizes = {"dp_replicate_size": advice.run.machines.num_ranks // shards, "dp_shard_size": shards}
        for axis, size in sizes.items():
            text = re.sub(rf"({MESH}_{axis}:) *\d+", rf"\g<1> {size}", text)
    # what it says of itself in its first lines was of another number of ranks
    body = text[text.index("compute_environment") :] if "compute_environment" in text else text
    nodes = (
        ""
        if advice.run.machines.num_nodes == 1
        else (
            "# Start it on each node, with the node's number and the first node's address:\n"
            "#   accelerate launch --config_file ... --machine_rank 0 --main_process_ip NODE0 ...\n"
        )
    )
    return f"# {advice.run.machines.name}\n{nodes}{body}"


def _nearest(advice: Advice, model: str) -> Recipe:
    """Return the recipe of the same kind: what is trained, where weights are; then of as many GPUs, a like model."""
    machines, adapters = advice.run.machines, advice.run.setting.lora_r is not None

    def distance(recipe: Recipe) -> tuple[float, ...]:
        values = read(recipe.settings)
        launch = {} if recipe.launch is None else read(recipe.launch)
        other_ranks = abs(math.log2((values.get("num_ranks") or 1) / machines.num_ranks))
        likeness = difflib.SequenceMatcher(None, model.lower(), str(values.get("model")).lower()).ratio()
        return (
            recipe.script.name != USUAL_SCRIPT,
            bool(values.get("use_cpu")) or values.get("model") is None,
            ("lora_r" in values) != adapters,
            (launch.get("distributed_type") == "FSDP") != advice.forecast.is_sharded,
            other_ranks,
            -likeness,
        )

    return min(shelf(), key=distance)


def _launch_file(is_sharded: bool, has_nodes: bool, has_replicas: bool) -> Path:
    """Return the launch file for GPUs with weights where they are to be; one for several nodes, if there is one."""
    kind = "FSDP" if is_sharded else "MULTI_GPU"
    files = [file for file in sorted((SHELF / "accelerate").glob("*.yaml")) if file.stem != "cpu"]
    alike = [file for file in files if read(file).get("distributed_type") == kind]

    def differs(file: Path) -> tuple[bool, bool]:
        return (mesh_in(file) is not None) != has_replicas, (read(file).get("num_machines", 1) > 1) != has_nodes

    return min(alike, key=differs)
