"""Layers of sizes of their own are shrunk as those of any model are, each by its own config.

transformers calls such a config heterogeneous: it has a config for all, and what single layers have instead, such as
fewer heads or experts (`per_layer_config`). What they have instead cannot be asked of the config for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class OwnLayers:
    """`OwnLayers` are the layers of a config, each with a config of its own, in which all sizes can be asked for.

    Args:
        configs: of each layer.
        names: of what layers have of their own.
    """

    configs: Sequence[Any]
    names: frozenset[str]

    def skipped(self) -> list[tuple[str, ...]]:
        """Return, of each layer, which of its parts it does without."""
        return [tuple(config.skip) for config in self.configs]

    def put_back(self, config: Any) -> None:
        """Give layers again what they have of their own, as many of them as the config has now."""
        if not self.configs:
            return
        found: dict[int | str, dict[str, Any]] = {}
        for number, layer in enumerate(self.configs[: config.num_hidden_layers]):
            found[number] = {name: getattr(layer, name) for name in sorted(self.names)}
            if layer.skip:
                found[number]["skip"] = list(layer.skip)
        config.per_layer_config = found


def taken_apart(config: Any, shrink: Callable[[Any], None]) -> OwnLayers:
    """Shrink a config's sizes in place, and those of its layers; return the layers that have sizes of their own.

    Args:
        config: of transformers; it has no sizes by layer afterwards.
        shrink: makes the sizes of a config small in place.
    """
    layers, names = list[Any](), frozenset[str]()
    if getattr(config, "is_heterogeneous", False):
        layers, names = (
            [copy.deepcopy(layer) for layer in config.per_layer_config],
            frozenset(config.per_layer_attributes),
        )
        config.per_layer_config = None
    for one in (config, *layers):
        shrink(one)
    return OwnLayers(layers, names)
