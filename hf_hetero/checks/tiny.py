"""A tiny instance of an architecture is made from its config alone: no weights are loaded, nothing global changes.

It has the same kinds of layers with the same heads, a few experts and a short vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LENGTHS = (11, 1, 6, 23)
"""Tokens of the samples that it is tried on."""
SWITCH_TOKENS = 16  # shorter than one of the samples, longer than the others
NUM_HEADS = 4
SMALLEST = {  # what makes a model large -> the most of it in a tiny instance
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "sliding_window": 8,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "mamba_ngroups": 2,
    "linear_num_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STATE_HEADS = {  # heads of layers with state -> the width of one
    "mamba_n_heads": "mamba_d_head",
    "mamba_num_heads": "mamba_head_dim",
    "n_mamba_heads": "mamba_headdim",
    "num_heads": "head_dim",
}
KINDS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists that say which kind each layer is


@contextmanager
def undisturbed() -> Iterator[None]:
    """Use stock settings of torch meanwhile; these and random numbers are the caller's own again afterwards."""
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            # the host's generator alone: torch.manual_seed would seed those of all devices
            torch.default_generator.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)


def build(config: PretrainedConfig, device: str, architecture: type[PreTrainedModel] | None = None) -> Any:
    """Build the causal language model of a config, with stock attention; the same weights each time.

    Args:
        config: of transformers.
        device: on "meta" it has no weights, so that any size will do.
        architecture: the model's class; None: that of transformers for such configs.
    """
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    if architecture is not None:
        make = architecture._from_config  # pyright: ignore[reportPrivateUsage]  # what the former calls, too
    with undisturbed(), torch.device(device):
        return make(config, attn_implementation="eager")


def num_numbers(model: torch.nn.Module) -> int:
    """Count weights and buffers."""
    return sum(x.numel() for x in [*model.parameters(), *model.buffers()])


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of few and small layers: one of each kind, heads as wide, the same grouping of heads.

    Of a model of text and images the text part is shrunk. The given config stays as it is.
    """
    small: Any = copy.deepcopy(config)
    _shrink(small.get_text_config(decoder=True))
    return small


def _shrink(config: Any) -> None:
    """Make a config's sizes small in place."""
    for name, most in SMALLEST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            _set(config, name, min(value, most))
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        # rotary tables and partial rotation are made for the width of a head, so it stays
        _set(config, "hidden_size", NUM_HEADS * (config.hidden_size // heads))
        _set(config, "num_attention_heads", NUM_HEADS)
        if hasattr(config, "num_key_value_heads"):
            _set(config, "num_key_value_heads", NUM_HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2)
    _shrink_heads_of_state(config)
    _switch_rotary_tables_early(config)
    _keep_one_layer_of_each_kind(config)


def _shrink_heads_of_state(config: Any) -> None:
    """Let layers that carry state have a few heads, as wide as fits the hidden size, and the same grouping."""
    if getattr(config, "num_attention_heads", None) is None:  # a model of such layers alone
        _set(config, "hidden_size", min(config.hidden_size, 16 * NUM_HEADS))
    inner = int(config.hidden_size * (getattr(config, "mamba_expand", None) or getattr(config, "expand", None) or 1))
    for heads, width in STATE_HEADS.items():
        if isinstance(getattr(config, heads, None), int) and hasattr(config, width):
            if hasattr(config, "mamba_d_ssm"):
                _set(config, "mamba_d_ssm", inner)
            _set(config, heads, NUM_HEADS)
            _set(config, width, inner // NUM_HEADS)
    if hasattr(config, "attention_hidden_size"):  # two hidden states, side by side
        _set(config, "attention_hidden_size", 2 * config.hidden_size)
    if keys := getattr(config, "linear_num_key_heads", None):
        _set(config, "linear_num_value_heads", 2 * (config.linear_num_value_heads // keys))
        _set(config, "linear_num_key_heads", 2)


def _switch_rotary_tables_early(config: Any) -> None:
    """Let the probe's longest sample be long for rotary tables that are others for a long sample.

    For those that would stay others for the samples after it, let it not be: such samples are refused when they come.
    """
    rope: Any = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # one, or one for each kind of layer
    types = {table.get("rope_type") for table in tables}
    if "longrope" in types:
        if getattr(config, "original_max_position_embeddings", None):  # of both places, this one counts
            _set(config, "original_max_position_embeddings", SWITCH_TOKENS)
        for table in tables:
            if table.get("rope_type") == "longrope":
                table["original_max_position_embeddings"] = SWITCH_TOKENS
    if "dynamic" in types:
        _set(config, "max_position_embeddings", max(config.max_position_embeddings, *LENGTHS))


def _keep_one_layer_of_each_kind(config: Any) -> None:
    """Keep the first layers, as many as it takes to have one of each kind, and two at least."""
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int):
        return
    values = {**vars(config), **{name: getattr(config, name, None) for name in KINDS}}  # some configs rename the kinds
    per_layer = {name: list(x) for name, x in values.items() if isinstance(x, list | tuple) and len(x) == total}
    kinds = [per_layer[name] for name in KINDS if name in per_layer]
    firsts = [kind.index(value) + 1 for kind in kinds for value in set(kind)]
    num_layers = min(total, max([2, *firsts]))
    _set(config, "num_hidden_layers", num_layers)
    for name, values in per_layer.items():
        _set(config, name, values[:num_layers])


def _set(config: Any, name: str, value: Any) -> None:
    """Set what can be set: some configs compute the one or other value."""
    with suppress(AttributeError):
        setattr(config, name, value)
