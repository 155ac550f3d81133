"""What steps of fp32 weights keep and take under autocast: beside autograd's own count, and what an H100 measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import kept_by_autograd, tiny_model

from hf_hetero.estimate.devices import known_device
from hf_hetero.estimate.estimate import attention_s, linear_s
from hf_hetero.estimate.memory import cast_bytes, layer_bytes, moments
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.shares import reached

TOKENS = 16384
QWEN = ModelShape(28, 1024, 16, 8, 128, 3072, 151936, 596049920, 596049920, 596049920, 4 * 596049920, 2, False)
LLAMA = ModelShape(16, 2048, 32, 8, 64, 8192, 128256, 1235814400, 1235814400, 1235814400, 4 * 1235814400, 2, False)
SHAPES = {
    "qwen3-0.6b": replace(QWEN, autocasts=True, norms_heads=True),
    "llama-3.2-1b": replace(LLAMA, autocasts=True),
}
LEAN = {"chunked_loss": True, "checkpointing": True}
WAYS = {
    "kept, whole logits": {},
    "kept": {"chunked_loss": True},
    "recompute": LEAN,
    "recompute, MLPs in chunks": {**LEAN, "chunked_mlp": True},
    "offload, MLPs in chunks": {**LEAN, "chunked_mlp": True, "offloads": True},
}
MEASURED = {  # GiB above weights and gradients: H100 80GB HBM3, benchmarks/gpu/measure_memory.py, 2026-11-27
    "qwen3-0.6b": (65.92, 40.28, 5.21, 5.21, 3.33),
    "llama-3.2-1b": (58.64, 37.82, 7.29, 7.29, 5.04),
}


MEASURED_MS = {  # forward and backward, by the same command, "kept" and "recompute"
    "qwen3-0.6b": (493, 613),
    "llama-3.2-1b": (422, 519),
}
SQUARES = 62_012_260
"""Of the lengths of its pack: 10 samples of the mix `github`, 6,424 tokens the longest."""


def _kept(model: Any, tokens: int) -> int:
    with kept_by_autograd(model) as kept, torch.autocast("cpu", torch.bfloat16):
        out = model.model(input_ids=torch.arange(tokens)[None] % 11, use_cache=False).last_hidden_state
        assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_under_autocast_against_torch(family: str) -> None:
    """A layer keeps of each token what is counted, and beside that 16-bit copies of its weights."""
    models = [
        tiny_model(family, hidden_size=64, intermediate_size=160, num_hidden_layers=n, vocab_size=11) for n in (2, 4)
    ]
    few, many = ((_kept(models[1], n) - _kept(models[0], n)) / 2 for n in (128, 256))
    shape = shape_of(models[1], models[1].config, 2, False)
    assert shape.autocasts
    assert shape.norms_heads == (family == "qwen3")
    assert (many - few) / 128 == pytest.approx(layer_bytes(shape), rel=0.05)
    assert 2 * few - many == pytest.approx(cast_bytes(shape, 1), rel=0.05)
    plain = replace(shape, autocasts=False)
    assert layer_bytes(plain) < 0.9 * (many - few) / 128, "without autocast it is too low"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("way", "changes"), list(enumerate(WAYS.values())), ids=list(WAYS))
def test_peaks_against_a_gpu(name: str, way: int, changes: dict[str, bool]) -> None:
    """The most bytes of a step are at most 2 % below what was measured, and at most 5 % above it."""
    shape = replace(SHAPES[name], **changes)
    copies = shape.heads * shape.head_dim * shape.element_bytes  # of attention's output, made when it was measured
    copies *= 0 if shape.checkpointing else shape.num_layers
    found = max(fixed + TOKENS * (token + copies) for token, fixed in moments(shape, 0, 80e9)) / 2**30
    assert 0.98 < found / MEASURED[name][way] < 1.05


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("way", "checkpointing"), [(0, False), (1, True)], ids=["kept", "recompute"])
def test_seconds_against_a_gpu(name: str, way: int, checkpointing: bool) -> None:
    """No constant was fitted to these: what steps of their own move is counted.

    Without that, the model that has norms of heads is a fifth too fast.
    """
    card = known_device("NVIDIA H100 80GB HBM3")
    assert card is not None
    device, shape = reached(card, "torch_varlen"), replace(SHAPES[name], checkpointing=checkpointing)

    def by(shape: ModelShape) -> float:
        seconds = linear_s(shape, device) * TOKENS + attention_s(shape, device) * SQUARES
        return 1e3 * (seconds + device.layer_s * shape.num_layers) / MEASURED_MS[name][way]

    assert 0.95 < by(shape) < 1.06
    assert (by(replace(shape, compiled=True)) < 0.8) == shape.norms_heads
