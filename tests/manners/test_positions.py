"""Decoders that count positions by themselves are given those of a plan, and only under one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_hetero.checks import probe as trial
from hf_hetero.checks.probe import probe
from hf_hetero.checks.tiny import build, shrunk
from hf_hetero.manners.positions import PositionsBySample

BARTS = ["Bart", "MBart", "PLBart", "Blenderbot", "BlenderbotSmall", "Pegasus", "Marian"]


def tiny(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(attention_dropout=0.0)
    return build(shrunk(config), "cpu", getattr(transformers, f"{name}ForCausalLM"))


@pytest.mark.parametrize("name", BARTS)
def test_packed_samples_have_their_own_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So ranks can share them; without it a sample has another's positions, which is found."""
    found = probe(tiny(name))
    assert found.ok, found
    assert not found.manner.whole
    assert found.manner.aligned
    monkeypatch.setattr(trial, "PositionsBySample", lambda _: PositionsBySample(torch.nn.Module()))
    assert "learns differently" in probe(tiny(name)).manner.whole


def test_without_a_plan_nothing_changes() -> None:
    """Positions that a model does not know stay unknown to it, as in stock."""
    model = tiny("Bart").eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        hooks = PositionsBySample(model)
        assert len(hooks) == 1
        assert torch.equal(model(ids, position_ids=torch.full_like(ids, 2)).logits, expected)
        hooks.remove()
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_models_that_know_positions_are_left_alone() -> None:
    """They have no such hooks."""
    for name in ("Llama", "GPT2", "OPT"):
        kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
        model = build(shrunk(getattr(transformers, f"{name}Config")()), "cpu", getattr(transformers, kind))
        assert not len(PositionsBySample(model))
