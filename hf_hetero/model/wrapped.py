"""This takes the transformers model out of whatever wraps it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def base_model(model: torch.nn.Module | None) -> Any:
    """Return the transformers model inside a peft one, or the model itself, which may bring adapters of its own."""
    assert model is not None
    wrapped: Any = model
    if isinstance(wrapped, PreTrainedModel) or not hasattr(wrapped, "peft_config"):
        return wrapped
    # peft's model of mixed adapters has no such method
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped.base_model.model


def looks_ahead(base: PreTrainedModel) -> bool:
    """Return whether tokens of text see those after them, as in encoders; parts that see images are not asked."""
    return any(getattr(module, "is_causal", True) is False for module in text_part(base).modules())


def text_part(base: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a transformers model that reads text: of one that sees images, what its towers feed."""
    config: Any = base.config
    kind: type = type(config.get_text_config(decoder=True))
    parts = (part for part in base.modules() if isinstance(part, PreTrainedModel) and type(part.config) is kind)
    return next(parts, base)
