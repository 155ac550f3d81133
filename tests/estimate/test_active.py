"""Weights that a token is computed with are those that get a gradient from one token: not the experts that it skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import FAMILIES, TINY, tiny_model

from hf_hetero.estimate.active import active_params
from hf_hetero.estimate.model_shape import shape_of

EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Llama4Text": {"num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "head_dim": 8},
    "AriaText": {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    "GraniteMoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Ernie4_5_Moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "DeepseekV2": {
        **FAMILIES["deepseek-v3"][1],
        "n_routed_experts": 6,
        "topk_method": "greedy",
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
    },
}


def mixture(name: str) -> Any:
    if name in FAMILIES:
        return tiny_model(name, "eager")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **EXPERTS[name]})
    return transformers.AutoModelForCausalLM.from_config(config)


def reached_by_one_token(model: Any) -> int:
    """Numbers of all weights, of an expert's only if it gets a gradient."""
    model(input_ids=torch.tensor([[5]]), use_cache=False).logits.square().sum().backward()
    count = 0
    for name, weight in model.named_parameters():
        if ".experts." in name or "feed_forward.input_linear" in name or "block_sparse_moe.output_linear" in name:
            count += sum(row.numel() for row in weight.grad if row.abs().max() > 0)
        else:
            count += weight.numel()
    return count


@pytest.mark.parametrize("name", [*EXPERTS, "qwen3-moe", "deepseek-v3", "gpt-oss", "llama"])
def test_active_are_those_with_a_gradient(name: str) -> None:
    """Whatever a mixture calls its experts; counted on the meta device alike. Of a dense model it is all."""
    model = mixture(name)
    text = model.config.get_text_config()
    found = active_params(model, text)
    with torch.device("meta"):
        outline = type(model)(model.config)
    assert active_params(outline, text) == found
    assert found == reached_by_one_token(model)
    total = sum(p.numel() for p in model.parameters())
    assert found == total if name == "llama" else 0 < found < total
    assert shape_of(model, text, 4, checkpointing=False).active_params == found


@pytest.mark.parametrize(
    ("name", "billions", "changes"),
    [("DeepseekV3", 37.6, {}), ("Qwen3Moe", 3.3, {"num_experts": 128, "head_dim": 128, "num_key_value_heads": 4})],
)
def test_published_counts(name: str, billions: float, changes: dict[str, Any]) -> None:
    """DeepSeek-V3 says 37B of 671B, Qwen3-30B-A3B 3.3B."""
    if name == "Qwen3Moe":
        changes |= {"num_hidden_layers": 48, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    config = getattr(transformers, f"{name}Config")(**changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert active_params(model, config) == pytest.approx(billions * 1e9, rel=0.02)


def test_sizes_that_differ_by_layer() -> None:
    """Gemma 4's wide heads of full attention, and Gemma 3n's lists of widths, are averaged."""
    config = transformers.Gemma4TextConfig(num_hidden_layers=6)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape_of(model, config, 2, checkpointing=False).head_dim == round((5 * 256 + 512) / 6)
    config = transformers.Gemma3nTextConfig(intermediate_size=[100] * 10 + [200] * 25)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape_of(model, config, 2, checkpointing=False).intermediate == round((10 * 100 + 25 * 200) / 35)
