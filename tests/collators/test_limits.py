"""What a model has no room for is refused when a sample is read, with its row, before any kernel has run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import tiny_model

from hf_hetero.collators.limits import Limits, limits_of
from hf_hetero.errors import BadSample
from hf_hetero.samples.samples import whole_rows

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def check(input_ids: list[int], labels: list[int]) -> None:
    Limits(num_tokens=97, num_labels=90).check_tokens(torch.tensor(input_ids), torch.tensor(labels), "row 3")


@pytest.mark.parametrize(
    ("input_ids", "labels", "said"),
    [
        ([5, 97, 6], [1, 2, 3], "row 3 has token 97 at position 1, but the model has 97: 0 to 96. Use"),
        ([5, 6, -1], [1, 2, 3], "row 3 has token -1 at position 2"),
        ([-100, 6, 7], [1, 2, 3], "row 3 has token -100 at position 0"),
        ([5, 6, 7], [1, 2, 90], "row 3 has label 90 at position 2, but the model has 90: 0 to 89, and -100 for those"),
        ([5, 6, 7], [1, -1, 3], "row 3 has label -1 at position 1"),
        ([5, 6, 7], [-100, -101, -100], "row 3 has label -101 at position 1"),
    ],
)
def test_tokens_that_the_model_does_not_have(input_ids: list[int], labels: list[int], said: str) -> None:
    """The first of them is named with its position."""
    with pytest.raises(BadSample) as caught:
        check(input_ids, labels)
    assert said in str(caught.value)
    assert "resize_token_embeddings" in str(caught.value)


def test_what_is_not_read_is_not_checked() -> None:
    """The first label, which nothing predicts; a sample of one token; and models that do not say what they have."""
    check([0, 96, 5], [1000, 89, -100])
    check([5], [-7])
    Limits().check_tokens(torch.tensor([-1, 1 << 40]), torch.tensor([1, -1]), "row 0")
    Limits().check_length(1 << 40, "row 0")


def test_the_longest_sample() -> None:
    """A dataset is refused by its longest one; as many tokens as there is room for are fine."""
    limits = Limits(longest=16, reason="so it is.")
    limits.check_lengths(whole_rows([]))
    limits.check_lengths(whole_rows([3, 16, 7]))
    with pytest.raises(BadSample, match=r"^Row 1 is 39 tokens long, more than 16: so it is\.$"):
        limits.check_lengths(whole_rows([3, 39, 17]))


def test_limits_of_models() -> None:
    """Of embeddings as they are now, and of tables of positions."""
    model = tiny_model()
    assert limits_of(model) == Limits(97, 97)
    model.resize_token_embeddings(128)
    assert limits_of(model) == Limits(128, 128)
    gpt2 = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    opt = transformers.OPTConfig(**SMALL, max_position_embeddings=64, ffn_dim=48, word_embed_proj_dim=32)
    for limits in (limits_of(transformers.GPT2LMHeadModel(gpt2)), limits_of(transformers.OPTForCausalLM(opt))):
        assert (limits.num_tokens, limits.longest) == (97, 64)
        assert "no more positions" in limits.reason
    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    limits = limits_of(tiny_model(rope_parameters=rope, max_position_embeddings=16))
    assert limits.longest == 16
    assert "rotary table (rope_type 'dynamic')" in limits.reason


SPARSE = ["minimax_m3_sparse"] * transformers.MiniMaxM3VLTextConfig().num_hidden_layers


@pytest.mark.parametrize(
    ("name", "own", "longest"),
    [
        ("DeepseekV32", {"index_topk": 24}, 24),
        ("GlmMoeDsa", {"index_topk": 24}, 24),
        ("MiniMaxM3VLText", {"index_topk_blocks": 3, "index_block_size": 8, "layer_types": SPARSE}, 24),
        ("DeepseekV3", {}, None),
    ],
)
def test_tokens_that_an_indexer_chooses_among(name: str, own: dict[str, Any], longest: int | None) -> None:
    """A sample is as long as all its tokens are chosen, one by one or in blocks."""
    config = getattr(transformers, f"{name}Config")(**own)
    with torch.device("meta"):
        limits = limits_of(transformers.AutoModelForCausalLM.from_config(config))
    assert limits.longest == longest
    assert longest is None or "chooses which tokens to attend to" in limits.reason
