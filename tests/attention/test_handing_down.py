"""Attention is given the context that its layer drops; layers that hand it on are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import TINY, tiny_model

from hf_hetero.attention.handing_down import HandedDown

DROPPING: dict[str, dict[str, Any]] = {"Nemotron": {}, "StableLm": {"attention_dropout": 0.0, "hidden_dropout": 0.0}}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **DROPPING[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def seen_by_attention(model: Any) -> list[Any]:
    """What each call of attention gets as context, in forward and in a recompute."""
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("hetero")), with_kwargs=True
        )
    ids = torch.arange(3, 9)[None]
    context = object()
    loss = model(input_ids=ids, labels=ids, use_cache=False, hetero=context).loss
    loss.backward()
    return [x is context for x in seen]


@pytest.mark.parametrize("name", DROPPING)
def test_what_a_layer_drops_is_handed_down(name: str) -> None:
    """In forward, and again where the layer is recomputed in backward; without the hooks it never comes."""
    assert seen_by_attention(model_of(name)) == [False, False]
    model = model_of(name)
    HandedDown(model)
    assert seen_by_attention(model) == [True, True]
    model = model_of(name)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    HandedDown(model)
    assert seen_by_attention(model) == [True] * 4


def test_a_call_without_a_plan_gets_none() -> None:
    """The context of one pass does not reach the next, after an error, too."""
    model = model_of("Nemotron")
    HandedDown(model)
    with pytest.raises(AttributeError):
        model.model.layers[0](None, hetero=object())
    seen: list[Any] = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append("hetero" in kwargs), with_kwargs=True)
    model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    assert seen == [False]


def test_the_model_is_left_as_it_was() -> None:
    """Hooks go with `remove`; of a layer that hands its keywords on there are none."""
    model = model_of("StableLm")
    handed = HandedDown(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    handed.remove()
    for other in (model, tiny_model("qwen3"), tiny_model("deepseek-v3")):
        if other is not model:
            HandedDown(other)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
