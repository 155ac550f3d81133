"""What a collator must know of a model that sees, by its config: how its rows hold images, and the smallest image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_hetero.images.families import (
    FRAMES,
    KINDS,
    PATCHES,
    PICTURES,
    PLACED,
    SAMPLED,
    SHAPED,
    TILES,
    merged_side,
    mutual_of,
    side_of,
    whole_tokens,
    why_blind,
)
from hf_hetero.images.pictures import IMAGE_ROWS, MASK, PLACES
from hf_hetero.images.positions import RotaryPositions
from hf_hetero.images.sight import GRID, PIXELS, SHAPES, Sight
from hf_hetero.images.sizes import NUMBERS, SIZES, PixelSizes, TileSizes

SQUARE = ("paddleocr_vl", "kimi_k25")
"""Types whose patches have channels, rows and columns; those of others are a row of numbers."""
LARGE = "high_res_pixel_values"
"""The same pictures in a larger size, for a tower of their own."""


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
        whole=_tokens_of_each(config, kind, stand_in),
        stand_in={**stand_in, IMAGE_ROWS: torch.zeros(0, dtype=torch.int64)},
        positions=None if shell is None else RotaryPositions(shell),
        mutual=mutual_of(config),
        sizes=sizes_of(config, kind) if SIZES in stand_in else None,
        beside=frozenset(getattr(config, "visual_indicator_token_ids", ())),
    )


def _tokens_of_each(config: Any, kind: str, stand_in: Mapping[str, Any]) -> int | None:
    """Return how many tokens each picture becomes; None where they differ."""
    if kind == SAMPLED:
        return config.perceiver_config.resampler_n_latents
    return whole_tokens(config) if kind == PICTURES and SIZES not in stand_in else None


def sizes_of(config: Any, kind: str) -> PixelSizes | TileSizes:
    """Return how many tokens pictures of their own sizes become."""
    vision = config.vision_config
    if kind != TILES:
        return PixelSizes(vision.patch_size * getattr(config, "spatial_merge_size", 1))
    pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
    aspect = getattr(config, "vision_aspect_ratio", None)  # LLaVA-OneVision's
    return TileSizes(
        side=side_of(vision.image_size),
        patches=side_of(vision.image_size) // side_of(vision.patch_size),
        pinpoints=pinpoints,
        most=None if aspect is None else int(aspect.removeprefix("anyres_max_")),
    )


def _merged(config: Any, kind: str) -> int | None:
    """Return how many patches, or pixels of a frame, become one token; None where that is not all that decides."""
    if kind == FRAMES:
        return (merged_side(config) * side_of(config.vision_config.patch_size)) ** 2
    return merged_side(config) ** 2 if kind in (PATCHES, PLACED, SHAPED) else None


def _stand_in(config: Any, kind: str) -> dict[str, torch.Tensor]:
    """Make an image of zeros, as small as the tower takes."""
    vision = config.vision_config
    names = ("num_channels", "in_channels", "in_chans")
    channels = next((number for name in names if isinstance(number := getattr(vision, name, None), int)), 3)
    if kind == PATCHES:
        side, size = merged_side(config), vision.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (channels, height, width)
        if config.model_type not in SQUARE:
            shape = (channels * getattr(vision, "temporal_patch_size", 1) * height * width,)
        return {PIXELS: torch.zeros(side**2, *shape), GRID: torch.tensor([[1, side, side]])}
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
    if kind in (FRAMES, SAMPLED):
        size = side * side_of(vision.patch_size)
        # frames that are zero are left out, as what only fills up a batch
        return {PIXELS: torch.ones(1, 1, channels, size, size), MASK: torch.ones(1, 1, size, size, dtype=torch.int64)}
    size = side_of(vision.image_size)
    if vision.model_type == "pixtral":  # pictures of any size
        size = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        # of two tokens, because models squeeze away the dim of one
        return {PIXELS: torch.zeros(1, channels, size, 2 * size), SIZES: torch.tensor([[size, 2 * size]])}
    if kind == PICTURES:
        large = getattr(config, "high_res_vision_config", None)
        others = {} if large is None else {LARGE: torch.zeros(1, channels, *[side_of(large.image_size)] * 2)}
        return {PIXELS: torch.zeros(1, channels, size, size), **others}
    height, width = min(config.image_grid_pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])
    num_tiles = 1 + (height // size) * (width // size)  # and the picture as a whole
    numbers = {NUMBERS: torch.ones(1, dtype=torch.int64)} if config.model_type == "llava_onevision" else {}
    return {
        PIXELS: torch.zeros(1, num_tiles, channels, size, size),
        SIZES: torch.tensor([[height, width]]),
        **numbers,
    }
