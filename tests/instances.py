"""Tiny instances of the models that transformers knows, by type: what `benchmarks/checks/measure_models.py` trains."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from hf_hetero.checks.tiny import build, num_numbers, shrunk, text_of

KINDS = {
    "text": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    "images": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ),
}
"""What a model is of -> names and classes of the models, by type."""
MOST_NUMBERS = 800_000_000
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
GLM = {"head_dim": 128, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
BY_KIND = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
OPT = {"text_config": {"model_type": "opt", "word_embed_proj_dim": 256}}  # as wide as a few heads
SETTINGS: dict[str, dict[str, Any]] = {  # what a type's default config lacks to be built, or to be small
    "blt": {"num_hidden_layers": 2},
    "cpmant": {"init_std": 0.02, "dim_ff": 48},  # by default so steep that two steps lose half of all digits
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_attention_heads": 16}
    },
    "chameleon": {"vocabulary_map": {"<image>": 1, "IMGIMGAZ": 2}},
    "cohere_compass": {"text_config": BY_KIND},
    "cohere_compass_text": BY_KIND,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 31], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    **{name: {"text_config": GLM} for name in ("glm46v", "glm4v", "glm4v_moe", "glmga")},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "qwen3_omni_moe_thinker": {"text_config": {"num_attention_heads": 32}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "step3p7": {"text_config": {"sliding_window": 512}},
    **{name: {**OPT, "image_token_index": 1} for name in ("blip-2", "instructblip")},
    "instructblipvideo": {**OPT, "video_token_index": 1},
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 128}},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "udop": {"decoder_start_token_id": 0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "mistral3": {"image_token_index": 1},  # none of the numbers that text has
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "num_hidden_layers": 2},
}


def config_of(model_type: str) -> Any:
    """Make a small config of a type, without dropout or noise, and as a decoder where it could be an encoder."""
    config: Any = shrunk(CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {})))
    parts = [config, text_of(config)]
    for part in [*parts, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]:
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
        if hasattr(part, "encoder_hidden_size") and hasattr(config, "vision_config"):
            part.encoder_hidden_size = config.vision_config.hidden_size  # which few heads have made narrower
        part._experts_implementation = "eager"  # torch's grouped product knows no fp64
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def model_of(model_type: str, kind: str) -> Any:
    """Build the tiny instance, the same each time, in fp64."""
    config = config_of(model_type)
    architecture = KINDS[kind][1][type(config)]
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    if (numbers := num_numbers(build(config, "meta", architecture))) > MOST_NUMBERS:
        raise ValueError(f"a tiny instance would still have {numbers:,} weights")
    return build(config, "cpu", architecture).double()
