"""Tiny configs of models that see: text, tower, and what joins them."""

from __future__ import annotations

from typing import Any

from helpers import EXPERTS, MIXED_LAYERS, MLA, TINY
from hybrids import DELTA, HALF
from hybrids import MOE as DELTA_MOE

IMAGE = 90
"""The token that features of images take the place of."""
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
ERNIE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PATCHED = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
PATCHED |= {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
PICTURED = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PICTURED |= {"patch_size": 2, "image_size": 4}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
LLAMA = {**TINY, "model_type": "llama"}
COHERE = {**TINY, **MIXED_LAYERS, "model_type": "cohere2"}
SIGLIP = {**PICTURED, "model_type": "siglip_vision_model", "image_size": 8, "vision_use_head": False}
EXPERT = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
ROPE_35 = {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
GLM = {**TINY, **ROPE_35}
GLM_IDS = {"image_token_id": IMAGE, "video_token_id": 91, "image_start_token_id": 92, "image_end_token_id": 93}
GLM_TOWER = {**PATCHED, "image_size": 8}
GEMMA4 = {**TINY, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
PLACED = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
PLACED |= {"intermediate_size": 16, "patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 32}
MOST_PATCHES = 128
"""That images of Gemma 4 are filled up to."""
IDS = {"image_token_id": IMAGE, "video_token_id": 91, "boi_token_id": 92, "eoi_token_id": 93, "audio_token_id": 94}
IDS |= {"boa_token_id": 95, "eoa_token_index": 96}
RESAMPLER = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
RESAMPLER |= {"num_key_value_heads": 1}
SAM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16, "output_channels": 8}
SAM |= {"patch_size": 2, "image_size": 8, "window_size": 2, "global_attn_indexes": [1]}
LOOKS_AHEAD = ("gemma3", "gemma4", "paligemma")
"""Of these, those whose tokens look at each other."""
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # text, tower, and what joins them
    "qwen2-vl": (
        "Qwen2VL",
        {**TINY, **MROPE},
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 2}
        | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        TOKENS,
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {**TINY, **MROPE},
        {**PATCHED, "fullatt_block_indexes": [1], "window_size": 8, "tokens_per_second": 2},
        TOKENS,
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {**TINY, **MROPE},
        {**PATCHED, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        TOKENS,
    ),
    "qwen3.5": (
        "Qwen3_5",
        {**TINY, **DELTA, **HALF, **ROPE_35},
        {**PATCHED, "num_position_embeddings": 16},
        TOKENS,
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoe",
        {**TINY, **MROPE, **EXPERT},
        {**PATCHED, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        TOKENS,
    ),
    "qwen3.5-moe": (
        "Qwen3_5Moe",
        {**TINY, **DELTA, **HALF, **DELTA_MOE, **ROPE_35},
        {**PATCHED, "num_position_embeddings": 16},
        TOKENS,
    ),
    "glm-4.1v": ("Glm4v", GLM, GLM_TOWER, GLM_IDS),
    "glm-4.5v": ("Glm4vMoe", {**GLM, **EXPERTS, "first_k_dense_replace": 1}, GLM_TOWER, GLM_IDS),
    "glm-ocr": ("GlmOcr", GLM, GLM_TOWER, GLM_IDS),
    "glm-4.6v": (
        "Glm46V",
        {**GLM, "model_type": "glm4v_text"},
        {**GLM_TOWER, "model_type": "glm4v_vision"},
        GLM_IDS,
    ),
    "llava": ("Llava", LLAMA, {**PICTURED, "model_type": "clip_vision_model"}, {"image_token_index": IMAGE}),
    "llava-pixtral": (
        "Llava",
        LLAMA,
        {**PICTURED, "model_type": "pixtral", "head_dim": 8, "image_size": 24},
        {"image_token_index": IMAGE, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "llava-next": (
        "LlavaNext",
        LLAMA,
        {**PICTURED, "model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "image_grid_pinpoints": [[4, 8], [8, 4], [8, 8]]},
    ),
    "mistral3": (
        "Mistral3",
        {**TINY, "model_type": "mistral"},
        {**PICTURED, "model_type": "pixtral", "head_dim": 8, "image_size": 24},
        {"image_token_index": IMAGE, "spatial_merge_size": 2},
    ),
    "gemma3": (  # a window that is smaller than an image
        "Gemma3",
        {**TINY, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        {**PICTURED, "image_size": 16, "vision_use_head": False},
        {"image_token_index": IMAGE, "mm_tokens_per_image": 16},
    ),
    "gemma4": ("Gemma4", {**GEMMA4, "use_bidirectional_attention": "vision"}, PLACED, IDS),
    "gemma4-small": ("Gemma4", {**GEMMA4, "num_kv_shared_layers": 0}, PLACED, IDS),  # whose images look back only
    "paligemma": (
        "PaliGemma",
        {**TINY, "model_type": "gemma"},
        SIGLIP,
        {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32, "vocab_size": 97},
    ),
    "vip-llava": (
        "VipLlava",
        LLAMA,
        {**PICTURED, "model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "vision_feature_layer": [-1, -2]},
    ),
    "internvl": (
        "InternVL",
        {**TINY, "model_type": "qwen2"},
        {**PICTURED, "image_size": [8, 8], "patch_size": [2, 2]},
        {"image_token_id": IMAGE},
    ),
    "aya-vision": ("AyaVision", COHERE, SIGLIP, {"image_token_index": IMAGE}),
    "cohere2-vision": (
        "Cohere2Vision",
        COHERE,
        SIGLIP,
        {"image_token_id": IMAGE, "alignment_intermediate_size": 16},
    ),
    "idefics3": ("Idefics3", LLAMA, {**PICTURED, "image_size": 8}, {"image_token_id": IMAGE}),
    "smolvlm": ("SmolVLM", LLAMA, {**PICTURED, "image_size": 8}, {"image_token_id": IMAGE}),
    "lfm2-vl": (
        "Lfm2Vl",
        {**TINY, "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        {**PICTURED, "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
        {"image_token_id": IMAGE, "projector_hidden_size": 16},
    ),
    "llama4": (
        "Llama4",
        {**TINY, "num_local_experts": 4, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "head_dim": 8},
        {**PICTURED, "image_size": 8, "intermediate_size": 64, "vision_output_dim": 32}
        | {"projector_input_dim": 32, "projector_output_dim": 32},
        {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93},
    ),
    "llava-onevision": (
        "LlavaOnevision",
        {**TINY, "model_type": "qwen2"},
        {**SIGLIP, "image_size": 4},
        {"image_token_index": IMAGE, "image_grid_pinpoints": [[4, 8], [8, 4], [8, 8], [8, 16]]}
        | {"vision_aspect_ratio": "anyres_max_2"},
    ),
    "idefics2": (
        "Idefics2",
        {**TINY, "model_type": "mistral"},
        {**PICTURED, "image_size": 24},
        {"image_token_id": IMAGE, "perceiver_config": {**RESAMPLER, "hidden_size": 32}},
    ),
    "paddleocr-vl": (
        "PaddleOCRVL",
        {**TINY, **MROPE, "head_dim": 8},
        {**PICTURED, "image_size": 8, "spatial_merge_size": 2},
        TOKENS,
    ),
    "ovis2": (
        "Ovis2",
        {**TINY, "model_type": "qwen2"},
        {**PICTURED, "image_size": 8, "hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 2},
        {"image_token_id": IMAGE, "visual_indicator_token_ids": [92, 93], "vocab_size": 97, "hidden_size": 32},
    ),
    "deepseek-vl": ("DeepseekVL", LLAMA, SIGLIP, {"image_token_id": IMAGE}),
    "deepseek-vl-hybrid": (
        "DeepseekVLHybrid",
        LLAMA,
        {**SIGLIP, "image_size": 4},
        {"image_token_id": IMAGE, "high_res_vision_config": SAM},
    ),
    "lighton-ocr": (
        "LightOnOcr",
        {**TINY, "model_type": "qwen3"},
        {**PICTURED, "model_type": "pixtral", "head_dim": 8, "image_size": 24},
        {"image_token_id": IMAGE, "spatial_merge_size": 2},
    ),
    "exaone-4.5": (
        "Exaone4_5_",
        {**TINY, "model_type": "exaone4", "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {**PATCHED, "num_key_value_heads": 1, "fullatt_block_indexes": [1], "window_size": 8},
        {"image_token_id": IMAGE, "video_token_id": 91},
    ),
    "ernie-4.5-vl": (
        "Ernie4_5_VLMoe",
        {**TINY, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], "moe_num_shared_experts": 1}
        | {"mlp_layer_types": ["dense", "sparse"], "rope_parameters": ERNIE_ROPE},
        {key: number for key, number in PATCHED.items() if key != "temporal_patch_size"},
        {**TOKENS, "image_start_token_id": 92, "image_end_token_id": 93},
    ),
    "kimi-k2.5": (
        "Kimi_K25",
        {**TINY, **MLA, **EXPERTS, "model_type": "deepseek_v3", "first_k_dense_replace": 1},
        {**PICTURED, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 1},
        {"image_token_id": IMAGE, "video_token_id": 91, "projection_hidden_size": 16},
    ),
    "got-ocr2": ("GotOcr2", {**TINY, "model_type": "qwen2"}, {**SAM, "image_size": 16}, {"image_token_index": IMAGE}),
    "qianfan-ocr": (
        "QianfanOCR",
        {**TINY, "model_type": "qwen3"},
        {**PICTURED, "image_size": [8, 8], "patch_size": [2, 2], "drop_path_rate": 0.0},
        {"image_token_id": IMAGE},
    ),
}
