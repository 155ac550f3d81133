"""Operations are those of the model: by hand, and as torch counts them; a plan changes none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import LENGTHS, ScriptedTrainer, samples, tiny_model, trained, trainer_order, with_lora
from hybrids import hybrid_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_hetero.callbacks import StepReportCallback
from hf_hetero.estimate.flops import flops_of, pairs
from hf_hetero.plan import StepReport

# of the tiny models: hidden 32, MLP 48, 4 and 2 heads of 8, 2 layers, 97 words
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
LAYER, HEAD = ATTENTION + 3 * 32 * 48, 97 * 32
A_PAIR = 2 * 4 * (8 + 8)
"""Of a layer, forward: scores, and what they weigh, 2 operations each."""


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 30])
def test_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    """Token t sees itself and those before it, or the last few of them."""
    seen = [[k for k in range(q + 1) if window is None or k > q - window] for q in range(length)]
    assert pairs(length, window) == sum(map(len, seen))


def test_by_hand() -> None:
    """Two layers and the head, 6 operations a weight and token; three times what is forward for each pair.

    Samples of 3 and 5 tokens have 6 and 15 pairs.
    """
    by_hand = 6 * (2 * LAYER + HEAD) * (3 + 5) + 3 * 2 * A_PAIR * (6 + 15)
    assert flops_of(tiny_model()).of([3, 5]) == by_hand == 902_400


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_as_torch_counts_them(family: str) -> None:
    """A dense model's products are torch's to the last operation; its eager attention computes all L^2 pairs.

    What is left of batched products is the rotation's table: half of a head's width, for each token.
    """
    model, length = tiny_model(family, "eager", tie_word_embeddings=False), 12
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    flops = flops_of(model)
    assert counted["aten.mm"] == flops.a_token * length
    scores = sum(a_pair for _, a_pair in flops.a_pair) * length**2
    assert 0 <= counted["aten.bmm"] - scores <= 2 * 8 * length


def test_windows_and_ties() -> None:
    """Of two layers one sees eight tokens; an embedding counts where it is the head as well, and only there."""
    mixed = flops_of(tiny_model("gemma2", "eager"))
    assert dict(mixed.a_pair) == {8: 3 * A_PAIR, None: 3 * A_PAIR}
    assert mixed.a_token == flops_of(tiny_model("gemma2", "eager", tie_word_embeddings=False)).a_token
    assert dict(flops_of(tiny_model("mistral")).a_pair) == {8: 2 * 3 * A_PAIR}


def test_adapters() -> None:
    """Weights that are not trained need no gradient of their own: 4 operations instead of 6."""
    adapters = 2 * (4 * (32 + 32) + 4 * (32 + 16))  # rank 4 on queries and values
    assert flops_of(with_lora(tiny_model()).get_base_model()).a_token == 4 * (2 * LAYER + HEAD) + 6 * adapters


def test_experts_that_a_token_is_not_sent_to() -> None:
    """Two of four experts of width 16, their router, and no other."""
    layer = ATTENTION + 4 * 32 + 2 * 3 * 32 * 16
    assert flops_of(tiny_model("qwen3-moe", "eager")).a_token == pytest.approx(6 * (2 * layer + HEAD))


def test_latent_attention() -> None:
    """DeepSeek's queries are 12 wide, its values 6."""
    assert dict(flops_of(tiny_model("deepseek-v3", "eager")).a_pair) == {None: 2 * 3 * 2 * 4 * (12 + 6)}


def test_layers_with_state_are_linear() -> None:
    """Twice the tokens need twice the operations where no layer attends; else only layers that do need more."""
    alone = flops_of(hybrid_model("mamba2"))
    assert alone.a_pair == ()
    assert alone.of([200]) == 2 * alone.of([100])
    hybrid = flops_of(hybrid_model("qwen3_5"))
    assert dict(hybrid.a_pair) == {None: 3 * A_PAIR}
    assert hybrid.of([200]) - 2 * hybrid.of([100]) == 3 * A_PAIR * (pairs(200) - 2 * pairs(100))
    # 8 heads with a state of 8 by 8 numbers: 6 operations each forward, and twice as many backward
    products = sum(
        p.numel() for name, p in hybrid_model("qwen3_5").named_parameters() if p.ndim > 1 and "embed_tokens" not in name
    )
    assert hybrid.a_token == 6 * products + 18 * 8 * 8 * 8


def test_a_published_model() -> None:
    """Llama 3.1 8B: 8.03B weights, of which 0.53B are only looked up; on the meta device, by its numbers."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        flops = flops_of(transformers.LlamaForCausalLM(config))
    assert flops.a_token == pytest.approx(6 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert dict(flops.a_pair) == {None: 3 * 2 * 32 * 2 * 4096}


def test_images_are_not_counted_for_text() -> None:
    """Of a model that sees images, the language model counts, and its head."""
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Mistral3Config(text_config={"model_type": "mistral", **text, "sliding_window": None})
    with torch.device("meta"):
        seeing = transformers.Mistral3ForConditionalGeneration(config)
    assert flops_of(seeing).a_token == 6 * (2 * LAYER + HEAD)


class Keep(StepReportCallback):
    def __init__(self) -> None:
        self.found: list[StepReport] = []

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.found.append(report)


def test_a_step_reports_them() -> None:
    """Those of its samples, whatever its plan; on a CPU, whose peak is not known, no share of it."""
    keep: TrainerCallback = Keep()
    trained(tiny_model(), samples(LENGTHS), ScriptedTrainer, callbacks=[keep], max_steps=2)
    expected = [flops_of(tiny_model()).of([LENGTHS[row] for row in rows]) for rows in trainer_order(24, 12, 7, 2)]
    reports = keep.found  # type: ignore[attr-defined]
    assert [report.flops for report in reports] == expected
    assert [report.mfu for report in reports] == [None, None]
