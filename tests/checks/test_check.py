"""A model is judged from its config alone: what is right passes, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from checks.test_probe import own_forward
from helpers import FAMILIES, TINY
from hybrids import HYBRIDS, hybrid_config
from transformers.loss.loss_utils import ForTokenClassification

from hf_hetero.checks import check as room
from hf_hetero.checks import exactness, tiny
from hf_hetero.checks import probe as trial
from hf_hetero.checks.check import Check, check, fits
from hf_hetero.errors import ConfigError
from hf_hetero.plan import METHODS


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
    assert found.verdict == "can be trained"
    assert found.tested
    assert found.probe.reached == found.probe.num_layers > 0
    assert list(found.methods) == [1, 2, 4, 8]
    assert found.versions["transformers"] == transformers.__version__


def test_every_tested_type_is_a_family() -> None:
    """So that the test above is of all of them."""
    attending, with_state = {config_of(family).model_type for family in FAMILIES}, set(map(hybrid_type, HYBRIDS))
    assert attending | with_state == exactness.TESTED_MODEL_TYPES


def hybrid_type(name: str) -> str:
    return getattr(transformers, f"{HYBRIDS[name][0]}Config").model_type


@pytest.mark.parametrize("name", ["qwen3_5", *(pytest.param(n, marks=pytest.mark.slow) for n in [*HYBRIDS][1:])])
def test_layers_with_state_pass(name: str, tmp_path: Path) -> None:
    """Hybrids, and models of layers with state alone: every layer of the tiny instance is reached."""
    found = checked(tmp_path, hybrid_config(name))
    assert found.ok, found
    assert found.tested
    assert found.probe.reached == found.probe.num_layers > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Bamba", "FalconH1", "GraniteMoeHybrid", "NemotronH", "Zamba2"])
def test_layers_with_state_pass_at_full_size(name: str, tmp_path: Path) -> None:
    """A model is shrunk before it is tried, the heads of its state, too."""
    found = checked(tmp_path, getattr(transformers, f"{name}Config")())
    assert found.ok, found


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("T5", {}, "it has an encoder and a decoder"),
        ("Bart", {}, "it has an encoder and a decoder"),
        ("Siglip", {}, "no causal language model of type 'siglip'"),
        ("Bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is none"),
        ("Llama", {"architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering is none"),
        ("Bert", {"architectures": ["BertForSequenceClassification"]}, "does not score sequences"),
        ("Bert", {}, "attention_probs_dropout_prob=0.1 draws another mask"),
    ],
)
def test_others_are_refused_in_words(name: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Encoders, encoder-decoders, dropout in attention: the reason names what is wrong.

    At their full default sizes, of which nothing is allocated.
    """
    found = checked(tmp_path, getattr(transformers, f"{name}Config")(**changes))
    assert not found.ok
    assert words in " ".join(found.reasons), found
    assert found.verdict.startswith("refused because ")
    assert words in found.verdict


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "Qwen2ForTokenClassification"])
def test_models_of_classes_can_be_trained(name: str, tmp_path: Path) -> None:
    """A config that names a model of classes is tried as one: what it says of each token, alone and in a pack."""
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(architectures=[name])
    found = checked(tmp_path, config)
    assert found.verdict.startswith("can be trained"), found
    assert found.probe.reached == found.probe.num_layers > 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("DeepseekV4", {}, "compressed_sparse_attention, heavily_compressed_attention are not known to be exact"),
        ("Bert", NO_DROPOUT, "looks at tokens after its own"),
        ("Falcon", {}, "does not use transformers' attention interface"),
    ],
)
def test_others_are_trained_by_whole_samples(name: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """The verdict says so, and why ranks cannot share a sample. At their full default sizes."""
    found = checked(tmp_path, getattr(transformers, f"{name}Config")(**changes))
    assert found.ok, found
    assert found.verdict.startswith("can be trained")
    assert "by whole samples, which ranks do not share" in found.verdict
    assert words in found.verdict


@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_models_that_see_can_be_trained_on_text(name: str, tmp_path: Path) -> None:
    """At their default sizes, whatever their class is called."""
    found = checked(tmp_path, getattr(transformers, f"{name}Config")())
    assert found.verdict.startswith("can be trained"), found
    assert found.num_heads == getattr(transformers, f"{name}Config")().get_text_config().num_attention_heads
    assert found.tokens_a_rank


def test_a_loss_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is another of transformers' losses or written into forward."""
    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "loss_function", property(lambda _: ForTokenClassification))
        other = checked(tmp_path / "named", config_of("llama"))
    assert "its loss is ForTokenClassification, not the causal language model loss" in other.verdict
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", own_forward)
    assert "computes a loss of its own" in checked(tmp_path / "written", config_of("llama")).verdict


def test_what_cannot_be_tried_is_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither refused nor trainable: the verdict says what stood in the way."""
    incomplete = checked(tmp_path, transformers.DeepseekV2Config())
    assert incomplete.verdict.startswith("not tested: a tiny instance fails with stock attention, too: TypeError")
    assert not incomplete.ok
    unbuilt = checked(tmp_path, transformers.Dots1Config(n_routed_experts=None))
    assert unbuilt.verdict.startswith("not tested: transformers cannot build it: TypeError")
    monkeypatch.setattr(trial, "MOST_NUMBERS", 1000)
    assert "would still have" in (huge := checked(tmp_path, config_of("llama"))).verdict
    assert not huge.ok


def test_no_weights_of_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built in memory, and not only outlined, is small, however large the model."""
    built: list[tuple[str, int]] = []

    def recorded(config: Any, device: str, architecture: Any = None, build: Any = tiny.build) -> Any:
        model = build(config, device, architecture)
        built.append((device, tiny.num_numbers(model)))
        return model

    monkeypatch.setattr(room, "build", recorded)
    monkeypatch.setattr(trial, "build", recorded)
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    found = checked(tmp_path, transformers.LlamaConfig(**large, intermediate_size=28672))
    assert found.ok
    assert (found.num_heads, found.num_kv_heads) == (64, 8)
    assert max(n for device, n in built if device == "meta") > 6e10
    assert max(n for device, n in built if device == "cpu") < 1e7
    built.clear()
    assert not checked(tmp_path, transformers.LlamaConfig(attention_dropout=0.1)).ok
    assert {device for device, _ in built} == {"meta"}


def test_the_longest_sample_is_said(tmp_path: Path) -> None:
    """Where there is one: a rotary table that would stay grown after it, or no more positions."""
    assert checked(tmp_path / "any", config_of("llama")).longest is None
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    found = checked(tmp_path / "dynamic", config_of("llama", rope_parameters=rope, max_position_embeddings=2048))
    assert found.ok
    assert found.verdict == "can be trained on samples of up to 2048 tokens"
    gpt2 = checked(tmp_path / "gpt2", transformers.GPT2Config(attn_pdrop=0.0, n_positions=512))
    assert gpt2.verdict == "can be trained on samples of up to 512 tokens"


def test_a_config_file_will_do(tmp_path: Path) -> None:
    """The path of the JSON file itself, whatever it is called, as well as its folder."""
    config_of("qwen3").save_pretrained(tmp_path)
    assert check(str(tmp_path / "config.json")).ok
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert check(str(tmp_path / "other.json")).model_type == "qwen3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Cannot read a config from '.*model'"),
        ("not JSON", "not a valid JSON file"),
        ("{}", "Unrecognized model"),
        ('{"model_type": "nosuch"}', "`nosuch`"),
        ('{"model_type": "llama", "hidden_size": "big"}', "hidden_size.* expected int, got str"),
        ('{"model_type": "foo", "auto_map": {"AutoConfig": "code.Foo"}}', "brings code of its own, which is not run"),
    ],
)
def test_what_is_no_config_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    """In one line with the name and what is wrong with it; nobody is asked at the terminal."""
    folder = tmp_path / "model"
    if text is not None:
        folder.mkdir()
        (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        check(str(folder))
    assert "model'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_degree", [0, -1])
def test_degrees_start_at_one(max_degree: int, tmp_path: Path) -> None:
    """A largest degree below that is refused by its value."""
    with pytest.raises(ConfigError, match=f"is {max_degree}: it must be at least 1"):
        check(str(tmp_path), max_degree)


@pytest.mark.parametrize(
    ("degree", "num_heads", "num_kv_heads", "ulysses", "in_blocks"),
    [
        (2, 8, 2, "even", "needs 4 ranks or more"),
        (4, 8, 2, "key-value heads are copied: 2 for 4 ranks", "blocks of 2"),
        (8, 8, 2, "key-value heads are copied: 2 for 8 ranks", "blocks of 2, 4"),
        (16, 8, 2, "8 of 16 ranks idle: 8 heads", "blocks of 2, 4, 8"),
        (2, 6, 3, "key-value heads are copied: 3 for 2 ranks", "needs 4 ranks or more"),
        (4, 6, 2, "uneven: 2 heads on some ranks, 1 on others", "blocks of 2"),
        (4, 3, 3, "1 of 4 ranks idle: 3 heads", "uneven blocks"),
    ],
)
def test_heads_and_degrees(degree: int, num_heads: int, num_kv_heads: int, ulysses: str, in_blocks: str) -> None:
    """How heads fit each method, in words."""
    found = fits(degree, num_heads, num_kv_heads)
    lent = "any heads" if num_heads == num_kv_heads else "any heads; a ring sends less"
    any_heads = {"gather": "any heads", "ring": "any heads"}
    assert found == {"ulysses": ulysses, **any_heads, "ulysses_ring": in_blocks, "token_ring": lent}
    assert tuple(found) == METHODS


def test_nothing_to_share() -> None:
    """One rank, or no attention, has no methods."""
    assert fits(1, 8, 2) == fits(4, 0, 0) == {}


def test_json_says_what_the_object_says(tmp_path: Path) -> None:
    """The verdict with it."""
    found = checked(tmp_path, config_of("gemma2"))
    data = json.loads(json.dumps(found.to_dict()))
    assert (data["format"], data["ok"], data["verdict"]) == ("hf-hetero-check/1", True, "can be trained")
    assert data["methods"]["4"] == found.methods[4]
    assert data["probe"]["reached"] == found.probe.reached
