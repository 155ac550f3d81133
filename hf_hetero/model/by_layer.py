"""This reads from a config what may differ by layer."""

from __future__ import annotations

from typing import Any


def stated(config: Any, name: str) -> list[Any]:
    """List what a config says of its layers: one thing for all where they are alike; [None] where it says nothing.

    Args:
        config: of transformers; one whose layers have configs of their own raises when it is asked for what differs.
        name: of the field, such as num_attention_heads.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    return [*value] if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownVariableType]


def sizes_of(config: Any, name: str) -> list[int]:
    """List a size of the layers, as `stated`; none where the config does not say it."""
    return [size for size in stated(config, name) if isinstance(size, int)]


def fewest(config: Any, name: str, otherwise: int) -> int:
    """Return the smallest size that any layer has; `otherwise` where the config says none, or 0."""
    return min(sizes_of(config, name), default=0) or otherwise


def of_layer(config: Any, number: int) -> Any:
    """Return the config of one layer where each has its own, else that of all."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config
