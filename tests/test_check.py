"""A model is judged from its config alone: what is right passes, what is wrong is named, and the probe can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import FAMILIES, TINY

from hf_hetero import exactness
from hf_hetero.attention import interface, methods
from hf_hetero.check import Check, check, fits, shrunk
from hf_hetero.cli import main
from hf_hetero.errors import ConfigError


def config_of(family: str, **changes: Any) -> Any:
    name, own = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**TINY, **own, **changes})


def checked(folder: Path, config: Any) -> Check:
    config.save_pretrained(folder)
    return check(str(folder), max_degree=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_tested_families_pass(family: str, tmp_path: Path) -> None:
    """Every layer of the tiny instance is reached, with the gradients of stock attention."""
    found = checked(tmp_path, config_of(family))
    assert found.ok, found
    assert found.tested
    assert found.probe.reached == found.probe.num_layers > 0
    assert found.methods[4]["gather"] == "any heads"


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("Mamba", {}, "attention"),
        ("Qwen3Next", {}, "linear"),
        ("T5", {}, "decoder"),
        ("Bert", {}, "dropout"),
        ("Bert", NO_DROPOUT, "tokens after its own"),
    ],
)
def test_others_are_refused_in_words(name: str, changes: dict[str, float], word: str, tmp_path: Path) -> None:
    """State-space and linear-attention models, encoders and encoder-decoders: the reason names what is missing."""
    found = checked(tmp_path, getattr(transformers, f"{name}Config")(**changes))
    assert not found.ok
    assert word in (said := " ".join([*found.reasons, found.probe.failure])), said


def test_large_configs_are_shrunk(tmp_path: Path) -> None:
    """A 70B config is tried at a few thousand weights: same kinds of layers, same grouping, itself unchanged."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    small: Any = shrunk(config)
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (4, 2, 2)
    assert (config.hidden_size, config.num_hidden_layers) == (8192, 80)
    assert checked(tmp_path, config).ok
    gemma: Any = shrunk(transformers.Gemma3TextConfig())
    assert set(gemma.layer_types) == {"sliding_attention", "full_attention"}


def test_a_config_file_will_do(tmp_path: Path) -> None:
    """The path of the JSON file itself, as well as its folder."""
    config_of("qwen3").save_pretrained(tmp_path)
    assert check(str(tmp_path / "config.json")).ok


def test_an_unknown_name_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the name, and what transformers said."""
    with pytest.raises(ConfigError, match="Cannot read a config from"):
        check(str(tmp_path / "nowhere"))
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_heads_and_degrees() -> None:
    """How heads fit, in words."""
    assert fits(1, 8, 2) == {}
    assert fits(2, 8, 2)["ulysses"] == "even"
    assert fits(4, 8, 2)["ulysses"].startswith("key-value heads are copied")
    assert fits(16, 8, 2)["ulysses"].startswith("8 of 16 ranks idle")
    assert fits(4, 6, 2)["ulysses"].startswith("uneven: 2 heads on some ranks, 1 on others")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for programs, and an exit status for scripts."""
    config_of("gemma2").save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("can be trained")
    assert main(["check", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] in exactness.TESTED_MODEL_TYPES
    transformers.MambaConfig().save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 1
    assert "verdict   refused because" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- negative controls


def test_attention_that_mixes_samples_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed samples that see each other are told from those that do not."""

    def mixing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    monkeypatch.setattr(interface, "attend", mixing)
    found = checked(tmp_path, config_of("llama"))
    assert not found.ok
    assert found.probe.gradient_error > 1e-2


def test_a_layer_that_is_not_reached_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose attention never heard of the plan is counted."""

    def forgetful(q: Any, k: Any, v: Any, context: Any, scores: Any, layer: int) -> torch.Tensor:
        context.reached.discard(1)
        return methods.attend(q, k, v, context, scores, layer)

    monkeypatch.setattr(interface, "attend", forgetful)
    found = checked(tmp_path, config_of("llama"))
    assert not found.ok
    assert (found.probe.reached, found.probe.num_layers) == (1, 2)
