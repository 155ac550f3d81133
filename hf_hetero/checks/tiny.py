"""A tiny instance of an architecture is made from its config alone: no weights are loaded, nothing global changes.

It has the same kinds of layers with the same heads, a few experts and a short vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from hf_hetero.checks.tiny_layers import taken_apart
from hf_hetero.checks.undisturbed import undisturbed

LENGTHS = (11, 1, 6, 23)
"""Tokens of the samples that a tiny instance is tried on."""
SWITCH_TOKENS = 16  # shorter than one of the samples, longer than the others
NUM_HEADS = 4
NARROW = 128  # numbers of a token between layers, where heads need not add up to them
DEPTHS = (
    "num_hidden_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "num_encoder_layers",
    "n_layer",
    "resampler_depth",
)
"""Names of how many layers a part has that sees or hears."""
PART_HEADS = (
    "num_attention_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "attention_heads",
)
WIDTHS = ("hidden_size", "embed_dim", "d_model")
"""Names of the heads, and of the width of all of them together, of a part."""
OWN_WIDTHS = ("adapter_in_dim", "adapter_input_size")
TEXT_WIDTHS = ("out_hidden_size", "text_hidden_size", "adapter_out_dim", "projector_hidden_size", "merged_hidden_size")
"""Names of the width of a part, and of the language model's, where they are given again for what joins the two."""
SMALLEST = {  # what makes a model large -> the most of it in a tiny instance
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), 128),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_num_active_experts", "moe_topk"), 2),
    "zero_expert_num": 2,
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
    "attention_chunk_size": 8,
    "floor_scale": 4,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_embeddings", "codebook_size"), 128),  # of a tower that makes images of tokens
    "base_channels": 32,
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
        text = config.get_text_config(decoder=True)
        # of Qwen3.5, for one, the language model alone, as the former does
        if isinstance(text, architecture.config_class or ()) and not isinstance(
            config, architecture.config_class or ()
        ):
            config = text
    with undisturbed(), torch.device(device):
        return make(config, attn_implementation="eager")


def architecture_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of a config's language model: that which it names, or transformers' choice; None: there is none.

    Of a type that sees images that is the class that sees them, and is trained on text.
    """
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None)
        # a model without a head is loaded with one
        if isinstance(named, type) and ("For" in name or getattr(named, "can_generate", bool)()):
            return named
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def num_numbers(model: torch.nn.Module) -> int:
    """Count weights and buffers."""
    return sum(x.numel() for x in [*model.parameters(), *model.buffers()])


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of few and small layers: one of each kind, heads as wide, the same grouping of heads.

    Of a model of text and images the text part is shrunk so; other parts are made shallow. The given config stays as
    it is.
    """
    small: Any = copy.deepcopy(config)
    text = text_of(small)
    width = _get(text, "hidden_size")
    _shrink(text)
    for part in _parts(small):
        if part is not text:
            _make_shallow(part, text, width)
    if small is not text:
        _stay_as_wide(small, _get(text, "hidden_size"), width)
    return small


def text_of(config: Any) -> Any:
    """Return the part of a config that the language model is made from; it is the config's own, and no copy."""
    text = config.get_text_config(decoder=True)
    return config if type(text) is type(config) else text  # of an encoder with a decoder transformers gives a copy


def _parts(config: Any) -> list[Any]:
    """List the configs within a config, at any depth."""
    inner = [_get(config, name) for name in getattr(config, "sub_configs", {})]
    parts = [part for part in inner if isinstance(part, PretrainedConfig)]
    return [*parts, *(deeper for part in parts for deeper in _parts(part))]


def _make_shallow(config: Any, text: Any, width_before: Any) -> None:
    """Leave one layer, of few heads, of a part that is only built; where it is as wide as text, it stays so."""
    layers = taken_apart(config, _make_narrow)
    for name in DEPTHS:
        if isinstance(depth := _get(config, name), int) and depth > 1:
            lists = {key: x for key, x in vars(config).items() if isinstance(x, list) and len(x) == depth}  # pyright: ignore
            _set(config, name, 1)
            for key, values in lists.items():
                _set(config, key, values[:1])
    layers.put_back(config)
    _stay_as_wide(config, _get(text, "hidden_size"), width_before)


def _make_narrow(config: Any) -> None:
    """Leave few heads, as wide as they are, of a part, and what is made to be as wide as they are together."""
    _set_smallest(config)
    for name in PART_HEADS:
        heads = _get(config, name)
        widths = {key: x for key in WIDTHS if isinstance(x := _get(config, key), int)}
        if isinstance(heads, int) and heads > NUM_HEADS and widths and not any(x % heads for x in widths.values()):
            own = {key: x for key in OWN_WIDTHS if (x := _get(config, key)) in widths.values()}
            for key, width in {**widths, **own}.items():
                _set(config, key, NUM_HEADS * (width // heads))
            _set(config, name, NUM_HEADS)


def _stay_as_wide(config: Any, width: Any, before: Any) -> None:
    """Let what is as wide as the language model, or several times as wide, be so again."""
    if not isinstance(width, int) or not isinstance(before, int):
        return
    # of a part without heads, such as a resampler, the width is that of what it makes
    names = TEXT_WIDTHS if any(_get(config, name) for name in PART_HEADS) else (*TEXT_WIDTHS, "hidden_size")
    for name in names:
        if isinstance(value := _get(config, name), int) and value % before == 0:
            _set(config, name, value // before * width)
    if _get(config, "out_hidden_size") is not None:
        _set(config, "out_hidden_size", width)


def _set_smallest(config: Any) -> None:
    for name, most in SMALLEST.items():
        value = _get(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            _set(config, name, min(value, most))
        elif isinstance(value, list) and all(type(x) is int for x in value):  # pyright: ignore[reportUnknownVariableType]
            _set(config, name, [min(x, most) for x in value])  # pyright: ignore[reportUnknownVariableType]


def _shrink(config: Any) -> None:
    """Make a config's sizes small in place, and its layers few."""
    layers = taken_apart(config, _shrink_sizes)
    _keep_one_layer_of_each_kind(config, layers.skipped())
    layers.put_back(config)


def _shrink_sizes(config: Any) -> None:
    """Make a config's sizes small in place."""
    _set_smallest(config)
    heads = _get(config, "num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        kv_heads = _get(config, "num_key_value_heads") or heads
        # rotary tables and partial rotation are made for the width of a head, so it stays
        width = NUM_HEADS * (config.hidden_size // heads)
        if _get(config, "head_dim") not in (None, config.hidden_size // heads):  # a width of its own
            width = min(width, NARROW)
        _set(config, "hidden_size", width)
        for name in PART_HEADS:  # a decoder of one's own has as many as its encoder
            if _get(config, name) is not None:
                _set(config, name, NUM_HEADS)
        if hasattr(config, "num_key_value_heads"):
            _set(config, "num_key_value_heads", NUM_HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2)
    _shrink_heads_of_state(config)
    _switch_rotary_tables_early(config)


def _shrink_heads_of_state(config: Any) -> None:
    """Let layers that carry state have a few heads, as wide as fits the hidden size, and the same grouping."""
    if _has_states_alone(config):
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
    rope: Any = _get(config, "rope_parameters") or {}
    tables = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # one, or one for each kind of layer
    types = {table.get("rope_type") for table in tables}
    if "longrope" in types:
        if _get(config, "original_max_position_embeddings"):  # of both places, this one counts
            _set(config, "original_max_position_embeddings", SWITCH_TOKENS)
        for table in tables:
            if table.get("rope_type") == "longrope":
                table["original_max_position_embeddings"] = SWITCH_TOKENS
    if "dynamic" in types:
        _set(config, "max_position_embeddings", max(config.max_position_embeddings, *LENGTHS))
    if chosen := _get(config, "index_topk"):  # longer ones, whose tokens are chosen among, are refused, too
        _set(config, "index_topk", max(chosen, *LENGTHS))


def _keep_one_layer_of_each_kind(config: Any, *others: list[Any]) -> None:
    """Keep the first layers, as many as it takes to have one of each kind, and two at least.

    Where the last layers take keys and values from earlier ones, as in Gemma 3n, as many of these are kept as well.

    Args:
        config: its layers are made few, in place.
        others: kinds of each layer that are no fields of the config; none, where all are of one.
    """
    total = _get(config, "num_hidden_layers")
    if not isinstance(total, int):
        return
    values = {**vars(config), **{name: _get(config, name) for name in KINDS}}  # some configs rename the kinds
    per_layer = {name: list(x) for name, x in values.items() if isinstance(x, list | tuple) and len(x) == total}
    kinds = [*(per_layer[name] for name in KINDS if name in per_layer), *others]
    firsts = [kind.index(value) + 1 for kind in kinds for value in set(kind)]
    num_layers = min(total, max([2, *firsts]))
    if shared := _get(config, "num_kv_shared_layers"):
        _set(config, "num_kv_shared_layers", min(shared, num_layers))
        num_layers = min(total, 2 * num_layers)
    _set(config, "num_hidden_layers", num_layers)
    for name, values in per_layer.items():
        _set(config, name, values[:num_layers])


def _has_states_alone(config: Any) -> bool:
    """Return whether no layer has heads of attention; where they differ by layer, their number cannot be asked for."""
    try:
        return getattr(config, "num_attention_heads", None) is None
    except Exception:
        return False


def _get(config: Any, name: str) -> Any:
    """Return a field; None where there is none, or where it differs by layer and cannot be asked for at once."""
    with suppress(Exception):
        return getattr(config, name, None)
    return None


def _set(config: Any, name: str, value: Any) -> None:
    """Set what can be set: some configs compute the one or other value."""
    with suppress(AttributeError, NotImplementedError):
        setattr(config, name, value)
