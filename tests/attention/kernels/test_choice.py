"""The best kernel that can do what a model needs is chosen; what none can do is refused by name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from hf_hetero.attention.kernels import choice, cuda, trial
from hf_hetero.attention.kernels.choice import choose_kernel, features_of
from hf_hetero.attention.kernels.contract import SINKS, SOFTCAP, WINDOW, Kernel
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


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, failures: dict[str, str]) -> None:
    """As if there were a GPU, on which some kernels fail their trial."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def failure(kernel: Kernel, device: torch.device, *_: object) -> str | None:
        assert device == torch.device("cuda", 3)
        return failures.get(kernel.name)

    monkeypatch.setattr(trial, "failure", failure)


def test_what_fails_on_the_device_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next kernel is taken, in words; if there is none, the error says what was wrong with each."""
    able = replace(TORCH_VARLEN, name="able", features=FLASHES["able"])
    monkeypatch.setattr(choice, "flash_kernels", lambda: ["flash-attn 2.6 is passed over", able])
    on_a_gpu(monkeypatch, {})
    assert choose_kernel("cuda", torch.bfloat16) is able
    on_a_gpu(monkeypatch, {"able": "its output is off"})
    assert choose_kernel("cuda", torch.bfloat16) is TORCH_VARLEN
    assert "kernel 'able' is passed over: its output is off." in caplog.text
    on_a_gpu(monkeypatch, {"able": "its output is off", "torch_varlen": "it fails on this device"})
    with pytest.raises(UnsupportedModel) as caught:
        choose_kernel("cuda", torch.bfloat16)
    for words in ("flash-attn 2.6", "'able' is passed over: its output is off", "'torch_varlen' is passed over: it f"):
        assert words in str(caught.value)


def test_an_unknown_torch_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another kernel, an unknown torch is named, with its version, before the first step."""
    monkeypatch.setattr(cuda, "operators", lambda: (None, None))
    with pytest.raises(UnsupportedModel, match=f"torch {re.escape(torch.__version__)} is installed.*is wanted"):
        choose_kernel("cuda", torch.bfloat16)
    monkeypatch.setattr(choice, "flash_kernels", lambda: [replace(TORCH_VARLEN, name="able")])
    assert choose_kernel("cuda", torch.bfloat16).name == "able"


def test_what_nobody_asked_for_does_no_harm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A flash-attn that is installed and broken is said, and torch's own kernel is taken; asked for, it is an error."""

    def broken(name: str) -> Kernel:
        raise UnsupportedModel(f"{name} cannot be loaded: undefined symbol")

    monkeypatch.setattr(choice, "through_transformers", broken)
    monkeypatch.setattr(choice, "_known_to_transformers", lambda: ["flash_attention_2"])
    assert choose_kernel("cuda", torch.bfloat16) is TORCH_VARLEN
    assert "flash_attention_2 cannot be loaded: undefined symbol" in caplog.text
    for offer, words in ((None, "^flash_attention_2"), ("flash-attn 2.6 is too old", "^flash-attn 2.6 is too old. fl")):
        monkeypatch.setattr(choice, "named_flash_kernel", {"flash_attention_2": offer}.get)
        with pytest.raises(UnsupportedModel, match=f"{words}.*undefined symbol"):
            choose_kernel("cuda", torch.bfloat16, wanted="flash_attention_2")


def test_features_of_configs() -> None:
    """What layers will ask for is read from the config."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

    assert features_of(LlamaConfig()) == frozenset()
    assert features_of(Qwen3Config()) == frozenset()
    assert WINDOW in features_of(MistralConfig(sliding_window=8))
    assert features_of(Gemma2Config()) == {WINDOW, SOFTCAP}
