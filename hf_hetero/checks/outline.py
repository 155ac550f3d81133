"""An outline is a model without weights, from its config alone: what `hf-hetero check` and `estimate` look at."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hf_hetero.checks.tiny import architecture_of, build
from hf_hetero.errors import ConfigError
from hf_hetero.model.by_layer import stated

HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = {
    "num_hidden_layers": 10_000,
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", *HEADS), 10_000_000),
    "vocab_size": 1_000_000_000,
}
"""Fields of a config that are sizes -> the most that a model may have."""


def config_of(name: str) -> Any:
    """Read a model's config.

    Raises:
        ConfigError: there is none, it cannot be read, it brings code of its own, or it is that of no model.
    """
    try:
        # said outright, because transformers would ask at the terminal
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # `transformers` and the hub's client raise errors of many kinds
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{name!r} brings code of its own, which is not run: only architectures of transformers are exact."
            ) from error
        raise ConfigError(f"Cannot read a config from {name!r}: {one_line(error)}") from error
    _check_sizes(name, config.get_text_config(decoder=True))
    return config


def _check_sizes(name: str, config: Any) -> None:
    """Refuse a config of no model: transformers builds some that have no layers, and divides by others.

    Raises:
        ConfigError: with the field.
    """
    for field, most in SIZES.items():
        for size in stated(config, field):
            if isinstance(size, int | float) and not (size == size // 1 and 1 <= size <= most):
                raise ConfigError(f"The config of {name!r} has {field}={size!r:.60}: it must be from 1 to {most:,}.")
    for heads, kv_heads in zip(*(stated(config, field) for field in HEADS), strict=False):
        if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
            raise ConfigError(
                f"The config of {name!r} has num_attention_heads={heads} and num_key_value_heads={kv_heads}: the "
                "second must divide the first."
            )


def outline_of(config: PretrainedConfig) -> Any:
    """Build the model without weights; None for what cannot be built, which the probe says."""
    try:
        return build(config, "meta", architecture_of(config))
    except Exception:
        return None


def one_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())
