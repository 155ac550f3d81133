"""A model is built from its config alone: no weights are loaded, nothing global changes.

Of a config that was made small (`shrinking`) it is a tiny instance: the same kinds of layers with the same heads, a few
experts and a short vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)


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
