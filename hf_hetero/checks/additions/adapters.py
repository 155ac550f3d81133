"""Adapters that a plan would change are refused here: what they do depends on more than a token and those before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

UNLIKE: Mapping[str, str] = MappingProxyType(
    {
        "ADALORA": "adds a term to the loss of each forward pass, and a step has as many of these as its plan",
        "LILY": "weighs its experts by the mean of all tokens of a batch",
        "XLORA": "weighs its adapters by what a whole batch looks like",
    }
)
"""Kinds of adapters of peft, and why a plan would change what they learn."""
NOISY = frozenset({"PVERA"})
"""Kinds of adapters of peft that draw noise in each forward pass, whatever their dropout is."""


def problems(model: torch.nn.Module) -> Iterator[str]:
    """Yield, in words, why the adapters of a model are refused.

    Args:
        model: in adapters or not.
    """
    adapters: Any = getattr(model, "peft_config", {})
    for name, adapter in adapters.items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if getattr(adapter, "num_virtual_tokens", None):
            yield f"adapter {name!r} ({adapter.peft_type}) adds virtual tokens to every sample; use LoRA."
        elif kind in UNLIKE:
            yield f"adapter {name!r} ({kind}) {UNLIKE[kind]}; use LoRA."
        if getattr(adapter, "alora_invocation_tokens", None):
            yield (
                f"adapter {name!r}: alora_invocation_tokens are sought once in each row, and a pack is one row of "
                "several samples; use LoRA without."
            )
        if repeated := getattr(adapter, "layer_replication", None):
            yield (
                f"adapter {name!r}: layer_replication={repeated} makes layers with copies of the model's config, in "
                "which the attention that crosses ranks is not set. Build the deeper model first, with a config of its "
                "own, save it by save_pretrained, and add LoRA to what is loaded from there; or use plain Trainer."
            )


def noisy(model: torch.nn.Module) -> list[str]:
    """Return the adapters of a model that draw noise in each forward pass, with their kinds."""
    adapters: Any = getattr(model, "peft_config", {})
    kinds = {name: str(getattr(each.peft_type, "value", each.peft_type)) for name, each in adapters.items()}
    return [f"{name!r} ({kind})" for name, kind in kinds.items() if kind in NOISY]
