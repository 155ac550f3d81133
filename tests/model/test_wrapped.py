"""The model of transformers is reached through every wrapping of peft, and is itself where there is none."""

from __future__ import annotations

import peft
import torch
from helpers import tiny_model, with_lora

from hf_hetero.model.wrapped import base_model


def test_the_inner_model() -> None:
    """A model alone, in a peft model, and in peft's model of mixed adapters, which has no `get_base_model`."""
    model = tiny_model()
    assert base_model(model) is model
    assert base_model(with_lora(model)) is model
    model = tiny_model()
    mixed = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), mixed=True)
    assert not hasattr(type(mixed), "get_base_model")
    assert base_model(mixed) is model


def test_what_is_not_of_transformers() -> None:
    """Any other module is its own model; whether it can be trained is said elsewhere."""
    other = torch.nn.Linear(2, 2)
    assert base_model(other) is other
