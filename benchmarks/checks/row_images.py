"""What a row has beside text, of types that can be trained only where every row has an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

SIDE, FRAMES, PATCHES = 224, 4, 8
BEFORE = {"blip-2": "num_query_tokens", "instructblip": "num_query_tokens", "instructblipvideo": "num_query_tokens"}
BEFORE |= {"kosmos-2": "latent_query_num"}
"""What says of how many tokens a type's image takes the place; they stand before the text."""
PLACE = 1
"""The token whose place it takes."""


def pictures(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make one picture, as large as the tower takes."""
    side = _side(config)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def _with_questions(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make one picture, and what is asked of it."""
    ids = torch.randint(3, 90, (1, 5), generator=generator)
    return {**pictures(config, num_tokens, generator), "qformer_input_ids": ids}


def _of_frames(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make one video, and what is asked of it."""
    found = _with_questions(config, num_tokens, generator)
    return {**found, "pixel_values": found["pixel_values"].unsqueeze(1).repeat(1, FRAMES, 1, 1, 1)}


def _looked_at(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make one picture, which all tokens look at."""
    found = pictures(config, num_tokens, generator)["pixel_values"].unsqueeze(1)
    return {"pixel_values": found, "image_attention_mask": torch.ones(1, num_tokens, 1, dtype=torch.int64)}


def _placed(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make one picture, and say where its tokens are."""
    is_image = (torch.arange(num_tokens) < config.latent_query_num)[None]
    return {**pictures(config, num_tokens, generator), "image_embeds_position_mask": is_image}


def _flattened(config: Any, num_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make patches, each with its row and column."""
    places = torch.cartesian_prod(torch.arange(1, 3), torch.arange(1, 1 + PATCHES // 2)).float()
    numbers = config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.cat([places, torch.randn(PATCHES, numbers, generator=generator)], dim=1)[None]}


IMAGES: dict[str, Callable[[Any, int, torch.Generator], dict[str, torch.Tensor]]] = {
    **dict.fromkeys(("blip", "blip-2", "git", "pp_formulanet", "vision-encoder-decoder"), pictures),
    "instructblip": _with_questions,
    "instructblipvideo": _of_frames,
    "idefics": _looked_at,
    "kosmos-2": _placed,
    "pix2struct": _flattened,
}
"""Type -> what makes a row's image."""


def num_before(config: Any) -> int:
    """Return how many tokens an image takes the place of."""
    if (kind := config.model_type) not in BEFORE:
        return 0
    return getattr(config, BEFORE[kind]) * (FRAMES if kind == "instructblipvideo" else 1)


def with_image(model: Any, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Return a row with an image, if its model's type wants one in every row; else as it is."""
    config, kind = model.config, model.config.model_type
    if kind not in IMAGES:
        return row
    before = num_before(config)
    row = {**row, "input_ids": [PLACE] * before + row["input_ids"], "labels": [-100] * before + row["labels"]}
    images = IMAGES[kind](config, len(row["input_ids"]), generator)
    if "input_ids" not in inspect.signature(model.forward).parameters:  # its text is what it is to say
        del row["input_ids"]
    return {
        **row,
        **{name: values.double() if values.is_floating_point() else values for name, values in images.items()},
    }


def _side(config: Any) -> int:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
    side = getattr(vision, "image_size", None) or SIDE
    return side if isinstance(side, int) else side[0]
