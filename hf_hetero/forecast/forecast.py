"""A forecast is the first estimate of a run that nobody has started: a model by its name, GPUs by theirs.

It is what a trainer on such GPUs would start from (`estimate.first_estimate`), without the GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_hetero.checks import exactness
from hf_hetero.checks.outline import config_of, outline_of
from hf_hetero.checks.probe import needs_trial, tried
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, UnsupportedModel
from hf_hetero.estimate.clusters import NETWORK_SHARE
from hf_hetero.estimate.first_estimate import first_estimate
from hf_hetero.estimate.memory import Shards, model_state_bytes
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.shares import reached
from hf_hetero.estimate.state_layers import StateShape, state_shape
from hf_hetero.estimate.subject import subject_of
from hf_hetero.forecast.machines import Machines, machines_named
from hf_hetero.forecast.remedies import what_would_fit
from hf_hetero.forecast.setting import DTYPES, Setting
from hf_hetero.manners.manner import Manner, settings_for
from hf_hetero.model import lm_head
from hf_hetero.model.activations import Activations

TRAINED_BYTES = 4
"""Weights that are trained are held in fp32, as `recipes/sft.py` loads them."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A `Forecast` is a cost model, and in words what it is of.

    Args:
        cost: of the run.
        machines: its GPUs.
        trained: the model and its weights, and where they are.
        is_sharded: weights are in parts over all ranks.
    """

    cost: CostModel
    machines: Machines
    trained: str
    is_sharded: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A `Model` is what a name leads to: its config, and an outline without weights.

    Args:
        name, config, outline: of the model.
        whole: why ranks cannot share a sample of it, in words; "": they can.
    """

    name: str
    config: Any
    outline: Any
    whole: str = ""

    @property
    def hetero(self) -> HeteroConfig:
        """Return the settings that a run has which is given none."""
        return settings_for(Manner(whole=self.whole), HeteroConfig())


def forecast(model: str, gpus: str, setting: Setting | None = None) -> Forecast:
    """Estimate what a model would cost on GPUs.

    Args:
        model: name on the hub, folder, or config.json; no weights are loaded.
        gpus: such as "8xH100", or "2x8xH100" for two nodes of eight.
        setting: how it would be trained.

    Raises:
        ConfigError: no such model or GPU, or not a single token fits, with what would help.
        UnsupportedModel: the model cannot be trained under plans.
    """
    machines = machines_named(gpus)  # what is wrong with the GPUs is said before a model is looked for
    return forecast_of(model_named(model), machines, setting or Setting())


def model_named(name: str) -> Model:
    """Build the outline of a model by its name on the hub, its folder, or its config.json.

    A tiny instance of one that is not tested is tried, as when it is trained.

    Raises:
        ConfigError: there is no such model.
        UnsupportedModel: it cannot be trained under plans.
    """
    outline = outline_of(config := config_of(name))
    if outline is None:
        raise ConfigError(f"transformers builds no causal language model from {name!r}; `hf-hetero check` says why.")
    if problems := [*exactness.model_problems(outline)]:
        raise UnsupportedModel(" ".join(problems))
    if not needs_trial(outline):
        return Model(name, config, outline)
    cause = " ".join(exactness.sharing_problems(outline))
    trial = tried(config, type(outline), cause)
    if problem := trial.problem or (cause if trial.failure else ""):
        raise UnsupportedModel(problem)
    return Model(name, config, outline, trial.manner.whole)


def forecast_of(model: Model, machines: Machines, setting: Setting) -> Forecast:
    """Estimate what a model would cost on GPUs; several forecasts may be of one outline.

    Raises:
        ConfigError: not a single token fits, with what would help.
    """
    text = model.config.get_text_config(decoder=True)
    shape, policies = trained_shape(model.outline, text, setting)
    shards, states = _shards(shape, machines, setting), state_shape(model.outline, text)
    estimated = partial(_estimated, setting=setting, policies=policies, states=states, hetero=model.hetero)
    try:
        subject = subject_of(shape, model.config.model_type, DTYPES[setting.dtype])
        cost = replace(estimated(shape, machines, shards), model=subject)
    except ConfigError:
        adapted = None
        if setting.lora_r is None:  # adapters of rank 16 are less than a hundredth of any model's weights
            frozen_bytes = DTYPES[setting.dtype].itemsize * shape.num_params
            num_trained = shape.num_params // 100
            adapted = replace(shape, trainable_params=num_trained, param_bytes=frozen_bytes, autocasts=False)
        raise ConfigError(what_would_fit(model.name, shape, machines, shards, estimated, adapted)) from None
    how = "all trained" if setting.lora_r is None else f"{shape.trainable_params / 1e6:.1f}M of them trained (LoRA)"
    where = _where(machines, shards) + (", each sample on one" if model.whole and machines.num_ranks > 1 else "")
    trained = f"{model.name}, {shape.num_params / 1e9:.2f}B weights, {how}, {where}"
    return Forecast(cost, machines, trained, shards is not None)


def trained_shape(outline: Any, config: Any, setting: Setting) -> tuple[ModelShape, tuple[str, ...]]:
    """Return a model's shape as it would be trained, and what its groups may do to hold more tokens.

    Args:
        outline: the model, without weights.
        config: of its text.
        setting: how it would be trained.
    """
    hetero = HeteroConfig()
    activations = Activations(outline, setting.checkpointing, hetero.chunked_mlp, compiled=False)
    allowed = [*hetero.activation_policies, *(["offload"] if setting.offload else [])]
    dtype = DTYPES[setting.dtype]
    shape = shape_of(
        outline,
        config,
        dtype.itemsize,
        setting.checkpointing,
        keeps_exchanged=hetero.keep_exchanged,
        chunked_loss=isinstance(lm_head.install(outline), lm_head.LeanHead),
        chunked_mlp=activations.chunked_mlps,
    )
    lm_head.uninstall(outline)
    frozen_bytes, trained = 0, shape.num_params
    if setting.lora_r is not None:
        head = outline.get_output_embeddings()
        linears = [m for m in outline.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        frozen_bytes = dtype.itemsize * shape.num_params
        trained = setting.lora_r * sum(linear.in_features + linear.out_features for linear in linears)
        shape = replace(shape, num_params=shape.num_params + trained, active_params=shape.active_params + trained)
    param_bytes = frozen_bytes + TRAINED_BYTES * trained
    # whatever type the outline is in: what is trained is in fp32, and what is frozen in the type of products
    autocasts = setting.lora_r is None and dtype.itemsize < TRAINED_BYTES
    return (
        replace(shape, trainable_params=trained, param_bytes=param_bytes, autocasts=autocasts),
        tuple(policy for policy in activations.policies if policy in allowed),
    )


def _shards(shape: ModelShape, machines: Machines, setting: Setting) -> Shards | None:
    """Return how weights would be spread over the ranks; None: each rank holds them all.

    Raises:
        ConfigError: ranks do not make replicas of so many.
    """
    num_ranks, asked = machines.num_ranks, setting.shards
    if asked is not None:
        if num_ranks % asked:
            sizes = ", ".join(str(size) for size in range(2, num_ranks + 1) if num_ranks % size == 0)
            raise ConfigError(
                f"Weights over every {asked} ranks: {num_ranks} ranks make no replicas of {asked}. "
                f"{f'Choose one of {sizes}.' if sizes else 'Leave --shards out.'}"
            )
        # as a trainer does, whose gradients in 16 bits do not wait for the last micro-batch
        return Shards(replicas=num_ranks // asked, reduces_once=DTYPES[setting.dtype].itemsize >= 4)
    if setting.sharded is not None or num_ranks == 1:
        return Shards() if setting.sharded else None
    memory_bytes = machines.topology.memory_bytes
    assert memory_bytes is not None
    return Shards() if setting.lora_r is None or model_state_bytes(shape) > memory_bytes / 2 else None


def _where(machines: Machines, shards: Shards | None) -> str:
    """Say where weights would be."""
    if shards is None:
        return "whole on each rank"
    ways = f"sharded over {machines.num_ranks // shards.replicas} ranks"
    return ways if shards.replicas == 1 else f"{ways} in each of {shards.replicas} replicas"


def _estimated(
    shape: ModelShape,
    machines: Machines,
    shards: Shards | None,
    setting: Setting,
    policies: tuple[str, ...],
    states: StateShape | None,
    hetero: HeteroConfig,
) -> CostModel:
    """Estimate a run's cost model, as its trainer would.

    Args:
        shape, machines, shards, setting: what is trained, where, and how.
        policies: what groups may do to hold more tokens.
        states: layers of the model that carry state; None: it has none.
        hetero: settings of the run.

    Raises:
        ConfigError: the memory leaves room for no token.
    """
    device = reached(machines.card, setting.kernel, DTYPES[setting.dtype])
    if setting.network_gbps is not None:
        node_bytes_per_s = NETWORK_SHARE * setting.network_gbps * 1e9 / 8
        device = replace(device, network_bytes_per_s=node_bytes_per_s / machines.ranks_per_node)
    return first_estimate(shape, device, machines.topology, shards, policies, hetero, states)
