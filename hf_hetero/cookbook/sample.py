"""This module plans one step of a recipe on a sample of its data: what the script reads, for the ranks it is meant for.

Whether a script's data can be looked at before a run is up to the script: it takes `load_data(args)`,
`load_tokenizer(args, data)` and `prepare_data(args, data, tokenizer)`, as `sft.py` has them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig

from hf_hetero.checks.outline import config_of, outline_of
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.estimate.devices import Device, cpu_device
from hf_hetero.estimate.first_estimate import first_estimate, restricted
from hf_hetero.estimate.memory import free_memory_bytes
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.state_layers import state_shape
from hf_hetero.fine_tuning import explaining, sample_lengths
from hf_hetero.forecast.forecast import forecast, trained_shape
from hf_hetero.forecast.setting import Setting
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner
from hf_hetero.topology import Topology

MOST_ROWS = 256
"""Rows that are looked at: some seconds of tokenising, and more than a step of most recipes takes."""
LOOKED_AT_BY = ("load_data", "load_tokenizer", "prepare_data")


@dataclass(frozen=True, slots=True)
class Sample:
    """A `Sample` is some rows of a recipe's data.

    Args:
        rows: as they are found, a `datasets.Dataset`.
        tokenizer: that makes tokens of them; None: they are tokens.
        lengths: tokens of each sample in them, as they would be trained on.
    """

    rows: Any
    tokenizer: Any
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """`Planned` is a step, by whose seconds.

    Args:
        plan: of a global batch, or of as many samples as were looked at.
        lengths: its samples' tokens.
        by: where the cost model is from.
    """

    plan: Plan
    lengths: tuple[int, ...]
    by: str


def can_be_looked_at(script: ModuleType) -> bool:
    """Tell whether a script has the functions that read its data."""
    return all(hasattr(script, name) for name in LOOKED_AT_BY)


def sample_of(script: ModuleType, args: Any) -> Sample:
    """Read and tokenise some rows of a recipe's data, spread over all of it, as the script does.

    Raises:
        HeteroError: whatever is wrong with data or tokenizer, with the key that names it first.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what a run would say of all its rows
        with explaining(f"dataset={args.dataset!r} cannot be loaded"):
            data = script.load_data(args)
        with explaining(f"tokenizer={args.tokenizer or args.model!r} cannot be loaded"):
            tokenizer = script.load_tokenizer(args, data)
        if len(data) > MOST_ROWS:
            data = data.shuffle(seed=0).select(range(MOST_ROWS))
        prepared = script.prepare_data(args, data, tokenizer)
    limit = args.max_length
    lengths = [tokens for row in sample_lengths(prepared) for tokens in row]
    if limit and args.max_length_policy == "split":
        lengths = [part for tokens in lengths for part in _parts(tokens, limit)]
    return Sample(data, tokenizer, tuple(lengths))


def planned(
    values: Mapping[str, Any],
    lengths: Sequence[int],
    hetero: HeteroConfig,
    gpus: str | None,
    sharded: bool,
    shards: int | None = None,
) -> Planned:
    """Plan one step of a recipe.

    Args:
        values: its settings.
        lengths: tokens of samples.
        hetero: its limits.
        gpus: such as "8xH100"; None: so many H100, or this CPU under `use_cpu`.
        sharded: its weights are in parts over the ranks.
        shards: ranks of a replica, over which they are; None: all of them.

    Raises:
        HeteroError: the model cannot be read or trained, or a sample fits nowhere.
    """
    num_ranks = values.get("num_ranks") or 1
    batch = values.get("per_device_train_batch_size", 8) * values.get("gradient_accumulation_steps", 1) * num_ranks
    batch = hetero.global_batch_size or batch
    if hetero.cost_model is not None:
        cost, by = CostModel.load(hetero.cost_model), hetero.cost_model
    elif values.get("use_cpu") and gpus is None:
        cost, by = _on_this_cpu(values, num_ranks), "this CPU by estimate"
    else:
        gpus = gpus or _usual_gpus(num_ranks)
        adapters, computed = values.get("lora_r"), "bfloat16" if values.get("bf16") else "float32"
        saves = bool(values.get("activation_checkpointing") or values.get("gradient_checkpointing") or sharded)
        offloads = "offload" in hetero.activation_policies
        with _model_named(values) as model:
            found = forecast(model, gpus, Setting(adapters, saves, offloads, computed, sharded, shards=shards))
        if found.machines.num_ranks != num_ranks:
            raise ConfigError(f"--gpus {gpus} are {found.machines.num_ranks}, but num_ranks={num_ranks}.")
        cost, by = found.cost, f"{found.machines.name} by estimate"
    cost = restricted(cost, hetero, num_ranks, cost.num_heads or num_ranks, list(cost.activation_policies))
    planner = Planner(cost, num_ranks, max_degree=hetero.max_degree, solver="fast", methods=hetero.methods)
    step = tuple(lengths[:batch])
    return Planned(planner.plan(step), step, by)


def config_in(values: Mapping[str, Any]) -> Any:
    """Return the config of a recipe's model.

    Raises:
        HeteroError: it names none, or both of `model` and `model_config`, or one that cannot be read.
    """
    with _model_named(values) as model:
        return config_of(model)


@contextlib.contextmanager
def _model_named(values: Mapping[str, Any]) -> Any:
    """Give the name of a recipe's model, or a folder with the config that it is made from."""
    shape = values.get("model_config")
    if (values.get("model") is None) == (shape is None):
        raise HeteroError("Set one of `model` (a folder or a hub name) and `model_config` (train from scratch).")
    if shape is None:
        yield values["model"]
        return
    made = {"vocab_size": values.get("vocab_size", 4096)} if values.get("tokenizer") == "train" else {}
    with explaining("model_config cannot be"):
        config = AutoConfig.for_model(**{**made, **(json.loads(shape) if isinstance(shape, str) else shape)})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
        yield folder


def _on_this_cpu(values: Mapping[str, Any], num_ranks: int) -> CostModel:
    """Estimate the cost model of ranks that share this machine's CPU."""
    config = config_in(values)
    outline, text = outline_of(config), config.get_text_config(decoder=True)
    if outline is None:
        raise ConfigError("transformers builds no causal language model from its config; `hf-hetero check` says why.")
    shape, policies = trained_shape(outline, text, Setting(values.get("lora_r"), dtype="float32"))
    memory_bytes = free_memory_bytes(torch.device("cpu"), num_ranks)
    topology = Topology(num_ranks, None, memory_bytes)
    speed = _shared_cpu(shape, num_ranks)
    return first_estimate(shape, speed, topology, None, policies, HeteroConfig(), state_shape(outline, text))


def _shared_cpu(shape: ModelShape, num_ranks: int) -> Device:
    """Time this machine's CPU as one of so many ranks has it: with its part of the cores, or a part of a core."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(max(1, cores // num_ranks))
    try:
        alone = cpu_device(shape, torch.float32)
    finally:
        torch.set_num_threads(threads)
    share = min(1.0, cores / num_ranks)
    return replace(alone, flops=share * alone.flops, attention_flops=share * (alone.attention_flops or alone.flops))


def _usual_gpus(num_ranks: int) -> str:
    """Name as many H100, eight a node."""
    if num_ranks <= 8 or num_ranks % 8:
        return f"1x{num_ranks}xH100"
    return f"{num_ranks // 8}x8xH100"


def _parts(tokens: int, limit: int) -> list[int]:
    """Cut a sample's tokens into parts of at most so many."""
    whole, rest = divmod(tokens, limit)
    return [limit] * whole + ([rest] if rest else [])
