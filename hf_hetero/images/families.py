"""This table knows the models that see whose images can be kept whole while their tokens are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hf_hetero.images.features import READY, cut_late, merging_part
from hf_hetero.images.mutual import PREFIX, MutualTokens
from hf_hetero.images.positions import KINDS as MARKS

PATCHES, PICTURES, TILES, PLACED = "patches", "pictures", "tiles", "patches with places"
FRAMES, SHAPED, SAMPLED = "frames", "patches with a shape", "sampled pictures"
KINDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), PATCHES),
        **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), PATCHES),
        **dict.fromkeys(("exaone4_5", "paddleocr_vl", "ernie4_5_vl_moe", "kimi_k25"), PATCHES),
        **dict.fromkeys(("llava", "vipllava", "mistral3", "lighton_ocr", "gemma3", "paligemma"), PICTURES),
        **dict.fromkeys(("internvl", "qianfan_ocr", "aya_vision", "cohere2_vision"), PICTURES),
        **dict.fromkeys(("llama4", "ovis2", "deepseek_vl", "deepseek_vl_hybrid", "got_ocr2"), PICTURES),
        **dict.fromkeys(("llava_next", "llava_onevision"), TILES),
        "gemma4": PLACED,
        **dict.fromkeys(("idefics3", "smolvlm"), FRAMES),
        "idefics2": SAMPLED,
        "lfm2_vl": SHAPED,
    }
)
"""Type of a model -> how its images come: patches and their grid, pictures, tiles of pictures of many sizes, patches
that each have a place, filled up to one number an image, pictures that are cut into frames of one size, patches that
fill a shape of rows and columns, filled up as well, or pictures of any size that become as many tokens each."""
OF_TIMM = "its tower is one of timm's, with which nothing was compared yet"
MISSING: Mapping[str, str] = MappingProxyType(
    {
        "mllama": "its text attends to images, which take the place of no tokens",
        "florence2": "it has an encoder, whose text attends to images in both directions",
        "video_llava": "its images and videos have towers of their own, and rows of both were not compared yet",
        **dict.fromkeys(("gemma3n", "perception_lm", "fast_vlm"), OF_TIMM),
    }
)
"""Type of a model -> what is in the way of sharing out its images."""
OWN_EXPERTS = frozenset({"ernie4_5_vl_moe"})
"""Types with experts for tokens of images, which are not called where a rank has none of these tokens."""
OF_TEXT = "token_type_ids"
"""What says of each token whether it is of an image (1), as Gemma 3's processor gives it, or of an answer (1), as
PaliGemma's does."""
WITH_CLASS = ("clip_vision_model", "internvl_vision", "qianfan_ocr_vision", "llama4_vision_model")
"""Types of towers that have a class token among the patches."""
WITHOUT_CLASS = ("vipllava", "llama4")
"""Types of models that leave it out, whatever their config says."""


def why_blind(model: Any) -> str:
    """Say in words why rows with images are refused; "" where they are not."""
    kind = model.config.model_type
    if kind in MISSING:
        return f"nor images by a model of type {kind!r}: {MISSING[kind]}"
    if kind not in KINDS:
        known = "hf_hetero/images/README.md lists those that were"
        return f"a model of type {kind!r} was not compared with plain training yet; {known}"
    if getattr(model.config, "vision_config", None) is None:
        return "its config has no vision_config"
    if merging_part(model) is None and cut_late(model) is None:
        return f"this release of transformers gives {type(model).__name__} no {READY}; use a newer one"
    return ""


def merged_side(config: Any) -> int:
    """Return how many patches along a side become one token."""
    vision = config.vision_config
    if config.model_type == "got_ocr2":  # by two convolutions
        return 4
    # InternVL's, and Llama 4's
    if shrinks := getattr(config, "downsample_ratio", None) or getattr(vision, "pixel_shuffle_ratio", None):
        return round(1 / shrinks)
    if sides := getattr(vision, "merge_kernel_size", None):
        return side_of(sides)
    names = ((vision, "spatial_merge_size"), (vision, "pooling_kernel_size"), (vision, "hidden_stride"))
    for part, name in (*names, (config, "spatial_merge_size")):
        if number := getattr(part, name, None):
            return number
    return getattr(config, "scale_factor", None) or getattr(config, "downsample_factor", 1)


def whole_patches(config: Any) -> int:
    """Return how many patches a picture, or a tile, has whose size is that of the config; a class token counts."""
    vision = config.vision_config
    patches = (side_of(vision.image_size) // side_of(vision.patch_size)) ** 2
    return patches + (vision.model_type in WITH_CLASS)


def whole_tokens(config: Any) -> int:
    """Return how many tokens these become."""
    if number := getattr(config, "mm_tokens_per_image", None):
        return number
    if (merged := merged_side(config)) > 1:  # of a square, the last ones are filled up
        vision = config.vision_config
        side = side_of(vision.image_size) // side_of(vision.patch_size)
        return (-(-side // merged)) ** 2
    kind, strategy = config.model_type, getattr(config, "vision_feature_select_strategy", "")
    return whole_patches(config) - (kind in WITHOUT_CLASS or strategy == "default")


def side_of(size: int | Sequence[int]) -> int:
    """Return the side of a square that a config has as one number, or as two.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, int):
        return size
    if len(set(size)) > 1:
        raise ValueError(f"{tuple(size)} is no square")
    return size[0]


def mutual_of(config: Any) -> MutualTokens | None:
    """Return which tokens of a model's samples look at each other, as transformers' own masks have it.

    Gemma 3: each run of tokens of images, within a window back where a layer has one. Gemma 4: the same, in layers with
    a window only, and only in models that ask for it. PaliGemma: all that comes before the answer.
    """
    text = config.get_text_config()
    if config.model_type == "gemma3":
        return MutualTokens(OF_TEXT, frozenset({1}), other=0)
    if config.model_type == "gemma4" and text.use_bidirectional_attention == "vision":
        return MutualTokens(MARKS, frozenset({1, 2}), other=0, in_windows=True)
    if config.model_type in PREFIX:
        return MutualTokens(
            OF_TEXT, frozenset({0}), other=1, is_prefix=True, longest=getattr(text, "sliding_window", None)
        )
    return None
