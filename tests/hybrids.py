"""Tiny models with layers that carry state, one of each family of hf_hetero.state_layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from helpers import EXPERTS, MLA, TINY
from torch.overrides import TorchFunctionMode

DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MAMBA_1 = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4, "use_mambapy": False}
LATENT = {**MLA, "qk_rope_head_dim": 4, "num_key_value_heads": 4}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {**DELTA, **HALF, **MOE, "decoder_sparse_step": 1}),
    "qwen3_5": ("Qwen3_5Text", {**DELTA, **HALF}),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**DELTA, **HALF, **MOE}),
    "olmo_hybrid": ("OlmoHybrid", {**DELTA, **HALF, "linear_num_key_heads": 8}),
    "kimi_linear": ("KimiLinear", {**LATENT, **EXPERTS, **HALF, "linear_num_heads": 4, "linear_head_dim": 8}),
    "bamba": ("Bamba", {**MAMBA_2, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **MAMBA_2,
            "mamba_n_groups": 1,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "falcon_h1": ("FalconH1", {**MAMBA_2, "mamba_d_ssm": 64}),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 4,
            "conv_kernel": 4,
            "chunk_size": 16,
            "expand": 2,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 4,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "num_key_value_heads": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 4, "chunk_size": 16, "expand": 2},
    ),
    "jamba": (
        "Jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "falcon_mamba": ("FalconMamba", MAMBA_1),
    "mamba": ("Mamba", MAMBA_1),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 256},
    ),
    "minimax": ("MiniMax", {**HALF, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8}),
}
"""Name -> name of the transformers classes, and what makes the family itself."""


ALONE = ("mamba", "mamba2", "falcon_mamba")
"""Models of layers with state alone, which have no heads of attention."""


def hybrid_config(name: str, **changes: Any) -> Any:
    classes, special = HYBRIDS[name]
    of_attention = {"num_attention_heads", "num_key_value_heads", "head_dim"} if name in ALONE else set[str]()
    common = {field: value for field, value in TINY.items() if field not in of_attention}
    return getattr(transformers, f"{classes}Config")(**{**common, **special, **changes})


def hybrid_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A two-layer model with random weights, the same for the same arguments."""
    torch.manual_seed(0)
    config = hybrid_config(name, **changes)
    kind = getattr(transformers, f"{HYBRIDS[name][0].removesuffix('Text')}ForCausalLM")
    # other ways to compute experts do without fp64
    return kind._from_config(config, attn_implementation="eager", experts_implementation="eager").to(dtype)


class InFloat64(TorchFunctionMode):
    """`InFloat64` has modules compute in fp64 what they would compute in fp32 whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)
