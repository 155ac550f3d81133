"""The best kernel that can do what a model needs is chosen; what none can do is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_hetero.attention.kernels import choice
from hf_hetero.attention.kernels.choice import choose_kernel, features_of
from hf_hetero.attention.kernels.contract import SINKS, SOFTCAP, WINDOW
from hf_hetero.attention.kernels.cuda import TORCH_VARLEN
from hf_hetero.errors import UnsupportedModel

FLASHES = {"able": frozenset({WINDOW, SOFTCAP, SINKS}), "less": frozenset({WINDOW, SINKS})}


def test_choice() -> None:
    """On CPU the CPU kernel; on CUDA torch's own for half types, the plain one for fp32; nothing there for softcap."""
    assert choose_kernel("cpu", torch.float64).name == "cpu"
    assert choose_kernel("cuda", torch.bfloat16).name == "torch_varlen"
    assert choose_kernel("cuda", torch.float32).name == "plain"
    assert choose_kernel("cuda", torch.bfloat16, frozenset({WINDOW, SINKS})).name == "torch_varlen"
    with pytest.raises(UnsupportedModel, match="softcap"):
        choose_kernel("cuda", torch.bfloat16, frozenset({SOFTCAP}))


def test_flash_attn_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed flash-attn that can do what is needed is preferred; the one that the user named, to all others."""
    able, less = (replace(TORCH_VARLEN, name=name, features=features) for name, features in FLASHES.items())
    monkeypatch.setattr(choice, "flash_kernels", lambda: [less, able])
    monkeypatch.setattr(choice, "named_flash_kernel", {"flash_attention_2": able}.get)
    assert choose_kernel("cuda", torch.bfloat16).name == "less"
    assert choose_kernel("cuda", torch.bfloat16, frozenset({SOFTCAP})).name == "able"
    assert choose_kernel("cuda", torch.bfloat16, wanted="flash_attention_2").name == "able"
    assert choose_kernel("cuda", torch.bfloat16, wanted="sdpa").name == "less"
    assert choose_kernel("cpu", torch.bfloat16, wanted="flash_attention_2").name == "cpu"


def test_features_of_configs() -> None:
    """What layers will ask for is read from the config."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

    assert features_of(LlamaConfig()) == frozenset()
    assert features_of(Qwen3Config()) == frozenset()
    assert WINDOW in features_of(MistralConfig(sliding_window=8))
    assert features_of(Gemma2Config()) == {WINDOW, SOFTCAP}
