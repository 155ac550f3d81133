"""A tiny instance stands for its architecture, and the comparison with stock attention can fail."""

from __future__ import annotations

import copy
import logging
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import FAMILIES, TINY
from torch.nn import functional as F

from hf_hetero.attention import handing_down, interface, methods, rotary
from hf_hetero.checks import probe as trial
from hf_hetero.checks.probe import Probe, check_untested, probe
from hf_hetero.checks.tiny import architecture_of, build, num_numbers, shrunk
from hf_hetero.manners import whole_samples

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [9.0] * 4, "short_factor": [1.0] * 4}


def config_of(family: str, **changes: Any) -> Any:
    name, own = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**TINY, **own, **changes})


def probed(config: Any) -> Probe:
    return probe(build(shrunk(config), "cpu"))


def why_not_shared(config: Any) -> str:
    """Why ranks cannot share samples of a model: it is trained by whole samples then, or refused."""
    found = probed(config)
    return found.problem or found.manner.whole


@pytest.mark.parametrize("family", FAMILIES)
def test_families_learn_the_same(family: str) -> None:
    """Every layer is reached, with the loss and the gradients of stock attention, again and again."""
    found = probed(config_of(family))
    assert found.ok, found
    assert found.reached == found.num_layers > 0
    assert 0 < found.gradient_error < 1e-5
    assert probed(config_of(family)) == found


DEEPSEEK: dict[str, Any] = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("DeepseekV2", {**DEEPSEEK, "topk_method": "greedy", "num_experts_per_tok": 6, "first_k_dense_replace": 1}),
        ("DeepseekV3", {**DEEPSEEK, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3}),
    ],
)
def test_values_of_another_width(name: str, own: dict[str, Any]) -> None:
    """Latent attention: values of 128 under keys of 192, which stay as wide; dense layers and experts."""
    small: Any = shrunk(getattr(transformers, f"{name}Config")(**own))
    assert (small.qk_nope_head_dim, small.v_head_dim, small.num_hidden_layers) == (128, 128, 2)
    assert small.first_k_dense_replace == 1
    assert probe(build(small, "cpu")).ok


def test_dropout_outside_of_attention_is_no_difference() -> None:
    """Its noise, which is allowed, does not hide the comparison."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.5, embd_pdrop=0.5)
    assert probed(config).ok


# ------------------------------------------------------------------------------------------------- a tiny instance


@pytest.mark.parametrize(
    ("heads", "kv_heads", "small_kv_heads"), [(32, 8, 2), (32, 32, 4), (32, 1, 1), (28, 4, 2)], ids=str
)
def test_heads_keep_their_width_and_grouping(heads: int, kv_heads: int, small_kv_heads: int) -> None:
    """Grouped stays grouped, one key-value head stays one, and the given config stays as it is."""
    config = transformers.LlamaConfig(
        hidden_size=128 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=80
    )
    before = copy.deepcopy(config).to_dict()
    small: Any = shrunk(config)
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (4, small_kv_heads, 2)
    assert small.hidden_size // small.num_attention_heads == 128
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3Text", "GptOss", "SmolLM3", "Jamba", "Qwen3Next", "Zamba2"])
def test_one_layer_of_each_kind(name: str) -> None:
    """However far down the first of them is, as in Gemma 3, where it is the sixth."""
    config = getattr(transformers, f"{name}Config")()
    small: Any = shrunk(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers <= config.num_hidden_layers
    assert list(small.layer_types) == list(config.layer_types)[: small.num_hidden_layers]


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, vocab_size=128256
        ),
        transformers.DeepseekV3Config(),
        transformers.Gemma3TextConfig(hidden_size=5376, num_hidden_layers=62, num_attention_heads=32, head_dim=128),
        transformers.Qwen3MoeConfig(num_experts=128, head_dim=128),
    ],
    ids=lambda config: config.model_type,
)
def test_large_models_become_small(config: Any) -> None:
    """Billions of weights become a few millions at most; smaller than what is asked for is not made larger."""
    assert num_numbers(build(config, "meta")) > 1e9
    assert num_numbers(build(shrunk(config), "meta")) < 1e7


def test_the_text_part_is_shrunk() -> None:
    """Of a model that sees images, too."""
    config = transformers.Gemma3Config()
    small: Any = shrunk(config).get_text_config()
    assert small.num_attention_heads == 4
    assert small.num_hidden_layers == 6 < config.get_text_config().num_hidden_layers


# types whose layers, or towers, have sizes that are not their model's
OF_MANY_SIZES = ["Dots3Note", "Idefics2", "Janus", "MiniMaxM3VL"]


@pytest.mark.parametrize("name", OF_MANY_SIZES)
def test_whatever_its_parts_are_a_tiny_instance_can_be_tried(name: str) -> None:
    """Sizes by layer, resamplers, tables of image tokens and projectors are small, too, and fit each other."""
    config = getattr(transformers, f"{name}Config")()
    architecture = architecture_of(config)
    before = copy.deepcopy(config).to_dict()
    assert num_numbers(build(config, "meta", architecture)) > 1e9
    assert num_numbers(build(shrunk(config), "meta", architecture)) < 2e7
    assert config.to_dict() == before


def test_layers_keep_what_they_have_of_their_own() -> None:
    """Of Dots 3, where layers with a window have other heads and ranks: few heads, and widths of a head as before."""
    config: Any = transformers.Dots3NoteTextConfig()
    small: Any = shrunk(config)
    assert small.is_heterogeneous
    assert set(small.layer_types) == set(config.layer_types)
    for kind in set(config.layer_types):
        layer, before = small.per_layer_config[kind], config.per_layer_config[kind]
        assert layer.qk_nope_head_dim == before.qk_nope_head_dim
        assert layer.num_attention_heads == layer.num_key_value_heads == 4 < before.num_attention_heads
        assert layer.q_lora_rank == layer.kv_lora_rank == 16
    assert small.per_layer_config["sliding_attention"].qk_nope_head_dim == 192
    assert small.per_layer_config["indexed_attention"].qk_nope_head_dim == 128


def test_layers_that_lack_parts_are_of_a_kind_of_their_own() -> None:
    """As many layers are kept as it takes to have one without attention."""
    lacking = {5: {"skip": ["attention"]}, 7: {"intermediate_size": 5000}}
    small: Any = shrunk(transformers.LlamaConfig(per_layer_config=lacking))
    assert small.num_hidden_layers == 6
    assert [layer.skip for layer in small.per_layer_config] == [[]] * 5 + [["attention"]]


def numbers() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Random numbers go on as if nothing had been, those of devices are not seeded, the user's model is not touched."""
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    before, weights = config.to_dict(), copy.deepcopy(model.state_dict())
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed every device
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = numbers()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), torch.device("meta"), torch.autocast("cpu"), caplog.at_level(logging.INFO):
            check_untested(model, None)
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert torch.empty(1).is_meta
            assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert "a tiny instance learns the same" in caplog.text
    assert numbers() == expected
    assert model.config.to_dict() == before
    assert model.training
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_tiny_instance_is_the_same_each_time() -> None:
    """Of any class that the config is good for."""
    first, second = (build(config_of("llama"), "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------- negative controls


def mixing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Attention of a pack as if it were one sample."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


def test_attention_that_mixes_samples_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed samples that see each other are told from those that do not."""
    monkeypatch.setattr(interface, "attend", mixing)
    error = re.search(
        r"learns differently when samples are packed.*gradients by (\S+)", why_not_shared(config_of("llama"))
    )
    assert error is not None
    assert float(error[1]) > 1e-2


def test_attention_without_its_window_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a window that attention never heard of: some sample is longer than it."""

    def boundless(q: Any, k: Any, v: Any, scores: Any, place: Any) -> torch.Tensor:
        return methods.attend(q, k, v, type(scores)(scores.scaling), place)

    monkeypatch.setattr(interface, "attend", boundless)
    assert probed(config_of("llama")).ok
    assert "learns differently" in why_not_shared(config_of("mistral"))


def test_a_layer_that_is_not_reached_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose attention never heard of the plan is counted and named."""

    def forgetful(q: Any, k: Any, v: Any, scores: Any, place: Any) -> torch.Tensor:
        place.context.reached.discard(1)
        return methods.attend(q, k, v, scores, place)

    monkeypatch.setattr(interface, "attend", forgetful)
    words = why_not_shared(config_of("llama"))
    assert "1 of 2 layers" in words
    assert "(not: 1)" in words


def test_an_error_under_a_plan_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works with stock attention and not under a plan cannot be trained."""

    def broken(*_: Any) -> torch.Tensor:
        raise IndexError("no such\nhead")

    monkeypatch.setattr(interface, "attend", broken)
    words = why_not_shared(config_of("llama"))
    assert "fails under a plan, and not with stock attention: IndexError: no such head" in words


def test_attention_dropout_is_found_in_training_mode() -> None:
    """Although the comparison is made without."""
    assert "attention dropout of 0.1" in why_not_shared(config_of("llama", attention_dropout=0.1))


def test_layers_that_lose_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nemotron's layers hand no keywords to attention, which is done for them; without that it is found."""
    config = transformers.NemotronConfig(head_dim=32, num_key_value_heads=8)
    assert probed(config).ok
    monkeypatch.setattr(handing_down.HandedDown, "__init__", lambda self, _: setattr(self, "_handles", []))
    assert "does not hand its keyword arguments" in why_not_shared(config)


def test_positions_from_the_padding_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa's positions start after its padding token; positions from 0 are found to be others."""
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.RobertaConfig(**dropouts, is_decoder=True)
    assert probed(config).ok
    monkeypatch.setattr(trial, "padding_of", lambda _: None)
    assert "learns differently" in why_not_shared(config)


def test_rounding_is_told_from_an_error_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs in fp32 is tried again in fp64: a steep model passes there, one that mixes samples does not."""
    monkeypatch.setitem(trial.TOLERANCE, torch.float32, 1e-9)
    found = probed(config_of("qwen3-moe"))
    assert found.ok, found
    assert found.gradient_error < 1e-12
    assert torch.get_default_dtype() == torch.float32
    monkeypatch.setattr(interface, "attend", mixing)
    assert "learns differently" in why_not_shared(config_of("qwen3-moe"))


def test_layers_of_a_tower_do_not_count() -> None:
    """Of a model that sees images, those that text goes through must call attention, and no others."""
    found = probe(build(shrunk(transformers.Gemma3Config()), "cpu", transformers.Gemma3ForConditionalGeneration))
    assert found.ok, found
    assert found.reached == found.num_layers == 6


def test_no_attention_interface() -> None:
    """A flag says so of some models that use it; the trial tells. Of others, ranks go over whole samples."""
    none = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attention_dropout": 0.0}
    biogpt = transformers.BioGptConfig(**none, activation_dropout=0.0, hidden_dropout=0.0)
    assert not transformers.BioGptForCausalLM._supports_attention_backend
    assert probed(biogpt).ok
    bloom = transformers.BloomConfig(attention_dropout=0.0, hidden_dropout=0.0)
    found = probed(bloom)
    assert found.ok
    assert found.manner.whole == trial.NO_INTERFACE


def test_a_mask_that_is_learned() -> None:
    """Doge's attention has weights beside queries, keys and values: they would not learn, and do by whole samples."""
    found = probed(transformers.DogeConfig())
    assert found.ok
    assert "get no gradient, model.layers.0.self_attn" in found.manner.whole


def test_whole_samples_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone that goes over the pack as one sample does not pass: then the model is refused."""
    bloom = transformers.BloomConfig(attention_dropout=0.0, hidden_dropout=0.0)
    monkeypatch.setattr(
        whole_samples.WholeBackbone, "forward", lambda self, *a, **k: super(type(self), self).forward(*a)
    )
    assert probed(bloom).problem == trial.NO_INTERFACE
    assert not probed(bloom).ok


@pytest.mark.parametrize(("name", "aligned"), [("Bart", True), ("XLM", True)])
def test_a_plain_loss_of_its_own(name: str, aligned: bool) -> None:
    """It is computed outside of the model, by the labels that the model means."""
    found = probe(build(shrunk(getattr(transformers, f"{name}Config")()), "cpu"))
    assert found.ok, found
    assert (found.manner.outside_loss, found.manner.aligned) == (True, aligned)


def test_a_known_cause_is_not_tried() -> None:
    """What is known not to be shared goes over whole samples, whatever a pack of it would do."""
    found = probe(build(shrunk(config_of("llama")), "cpu"), cause="it is known.")
    assert found.ok
    assert found.manner.whole == "it is known."


@pytest.mark.parametrize("family", ["phi3", "llama", "phimoe"])
def test_rotary_tables_by_the_longest_sample(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that change with the longest sample of a pack are made to follow each; without that they are found."""
    rope = {**LONGROPE, "original_max_position_embeddings": 4096, "short_mscale": 1.1, "long_mscale": 1.3}
    own = {"rope_parameters": rope, "max_position_embeddings": 131072}
    config = transformers.PhimoeConfig(**{**TINY, **own}) if family == "phimoe" else config_of(family, **own)
    assert probed(config).ok
    monkeypatch.setattr(rotary.TablesBySample, "_by_sample", lambda *_: None)
    assert "learns differently when samples are packed" in why_not_shared(config)
    assert probe(build(config, "cpu")).ok  # none of the probe's samples is that long


def test_rotary_tables_that_stay_grown() -> None:
    """Dynamic tables are the same for all samples that are short enough, and others are refused when they come."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert probed(config_of("llama", rope_parameters=rope, max_position_embeddings=16)).ok


def own_forward(model: Any, input_ids: Any, position_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
    """A forward with a loss of its own that is no mean of cross-entropies."""
    logits = model.lm_head(model.model(input_ids=input_ids, position_ids=position_ids)[0])
    loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") if labels is not None else None
    return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_a_cross_entropy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is named as the cause, before anything else is compared."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", own_forward)
    assert probed(config_of("llama")).problem == trial.OWN_LOSS


def test_what_fails_with_stock_attention_is_not_tested() -> None:
    """A config whose experts per token are not set runs nowhere: that is no fault of plans, and no proof of them."""
    found = probed(transformers.DeepseekV2Config())
    assert found.failure.startswith("a tiny instance fails with stock attention, too: TypeError: topk()")
    assert not found.ok
    assert not found.problem
