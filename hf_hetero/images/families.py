"""This table knows the models that see whose images can be kept whole while their tokens are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from hf_hetero.images.features import READY, merging_part
from hf_hetero.images.mutual import PREFIX, MutualTokens
from hf_hetero.images.pictures import IMAGE_ROWS, MASK, PLACES
from hf_hetero.images.positions import KINDS as MARKS
from hf_hetero.images.positions import RotaryPositions
from hf_hetero.images.sight import GRID, PIXELS, SHAPES, Sight

PATCHES, PICTURES, TILES, PLACED = "patches", "pictures", "tiles", "patches with places"
FRAMES, SHAPED = "frames", "patches with a shape"
KINDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), PATCHES),
        **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), PATCHES),
        **dict.fromkeys(("llava", "vipllava", "mistral3", "gemma3", "paligemma"), PICTURES),
        **dict.fromkeys(("internvl", "aya_vision", "cohere2_vision"), PICTURES),
        "llava_next": TILES,
        "gemma4": PLACED,
        **dict.fromkeys(("idefics3", "smolvlm"), FRAMES),
        "lfm2_vl": SHAPED,
    }
)
"""Type of a model -> how its images come: patches and their grid, pictures, tiles of pictures of many sizes, patches
that each have a place, filled up to one number an image, pictures that are cut into frames of one size, or patches
that fill a shape of rows and columns, filled up as well."""
MISSING: Mapping[str, str] = MappingProxyType(
    {
        "llama4": "it takes features ready that its projector has not seen yet",
        "llava_onevision": "how many tiles a picture becomes depends on how many of them its row has",
        "mllama": "its text attends to images, which take the place of no tokens",
    }
)
"""Type of a model -> what is in the way of sharing out its images."""
OF_TEXT = "token_type_ids"
"""What says of each token whether it is of an image (1), as Gemma 3's processor gives it, or of an answer (1), as
PaliGemma's does."""
SIZES = "image_sizes"


def why_blind(model: Any) -> str:
    """Say in words why rows with images are refused; "" where they are not."""
    kind = model.config.model_type
    if kind in MISSING:
        return f"nor images by a model of type {kind!r}: {MISSING[kind]}"
    if kind not in KINDS:
        return f"{', '.join(sorted(KINDS))} can, and a model of type {kind!r} was not compared with plain training yet"
    if getattr(model.config, "vision_config", None) is None:
        return "its config has no vision_config"
    if merging_part(model) is None:
        return f"this release of transformers gives {type(model).__name__} no {READY}; use a newer one"
    return ""


def sight_of(model: Any, shell: Any) -> Sight | None:
    """Return how a model's rows hold images; None where rows with images are refused.

    Args:
        model: of transformers.
        shell: the part of it that merges features into text, of the same class, without weights; None: it makes no
            positions of its own.
    """
    if why_blind(model):
        return None
    config, kind = model.config, KINDS[model.config.model_type]
    stand_in = _stand_in(config, kind)
    return Sight(
        token=config.image_token_id,
        inputs=tuple(stand_in),
        merged=_merged(config, kind),
        whole=whole_tokens(config) if kind == PICTURES and len(stand_in) == 1 else None,
        stand_in={**stand_in, IMAGE_ROWS: torch.zeros(0, dtype=torch.int64)},
        positions=None if shell is None else RotaryPositions(shell),
        mutual=mutual_of(config),
    )


def merged_side(config: Any) -> int:
    """Return how many patches along a side become one token."""
    vision = config.vision_config
    if shrinks := getattr(config, "downsample_ratio", None):  # InternVL's
        return round(1 / shrinks)
    for part, name in ((vision, "spatial_merge_size"), (vision, "pooling_kernel_size"), (config, "spatial_merge_size")):
        if number := getattr(part, name, None):
            return number
    return getattr(config, "scale_factor", None) or getattr(config, "downsample_factor", 1)


def whole_patches(config: Any) -> int:
    """Return how many patches a picture, or a tile, has whose size is that of the config; a class token counts."""
    vision = config.vision_config
    patches = (side_of(vision.image_size) // side_of(vision.patch_size)) ** 2
    return patches + (vision.model_type in ("clip_vision_model", "internvl_vision"))


def whole_tokens(config: Any) -> int:
    """Return how many tokens these become."""
    drops_first = config.model_type == "vipllava" or getattr(config, "vision_feature_select_strategy", "") == "default"
    fed = whole_patches(config) - drops_first
    return getattr(config, "mm_tokens_per_image", None) or fed // merged_side(config) ** 2


def _merged(config: Any, kind: str) -> int | None:
    """Return how many patches, or pixels of a frame, become one token; None where that is not all that decides."""
    if kind == FRAMES:
        return (merged_side(config) * side_of(config.vision_config.patch_size)) ** 2
    return merged_side(config) ** 2 if kind in (PATCHES, PLACED, SHAPED) else None


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


def _stand_in(config: Any, kind: str) -> dict[str, torch.Tensor]:
    """Make an image of zeros, as small as the tower takes."""
    vision = config.vision_config
    names = ("num_channels", "in_channels", "in_chans")
    channels = next((number for name in names if isinstance(number := getattr(vision, name, None), int)), 3)
    if kind == PATCHES:
        side, size = vision.spatial_merge_size, vision.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        numbers = channels * vision.temporal_patch_size * height * width
        return {PIXELS: torch.zeros(side**2, numbers), GRID: torch.tensor([[1, side, side]])}
    if kind == PLACED:
        side = vision.pooling_kernel_size
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        return {PIXELS: torch.zeros(1, side**2, channels * vision.patch_size**2), PLACES: places.unsqueeze(0)}
    side = merged_side(config)
    if kind == SHAPED:
        numbers = channels * side_of(vision.patch_size) ** 2
        return {
            PIXELS: torch.zeros(1, side**2, numbers),
            SHAPES: torch.tensor([[side, side]]),
            MASK: torch.ones(1, side**2, dtype=torch.int64),
        }
    if kind == FRAMES:
        size = side * side_of(vision.patch_size)
        # frames that are zero are left out, as what only fills up a batch
        return {PIXELS: torch.ones(1, 1, channels, size, size), MASK: torch.ones(1, 1, size, size, dtype=torch.int64)}
    size = side_of(vision.image_size)
    if vision.model_type == "pixtral":  # pictures of any size
        size = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        # of two tokens, because models squeeze away the dim of one
        return {PIXELS: torch.zeros(1, channels, size, 2 * size), SIZES: torch.tensor([[size, 2 * size]])}
    if kind == PICTURES:
        return {PIXELS: torch.zeros(1, channels, size, size)}
    height, width = min(config.image_grid_pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])
    num_tiles = 1 + (height // size) * (width // size)  # and the picture as a whole
    return {PIXELS: torch.zeros(1, num_tiles, channels, size, size), SIZES: torch.tensor([[height, width]])}
