"""The samples that models are trained on: of text, with an image each where a type takes no text alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

LEFT = frozenset({"cpmant"})  # types that expect padding on the left: samples of one length need none
STEPS = ((11, 1, 6, 23, 9, 14, 3, 30), (17, 2, 28, 5, 8, 21, 12, 4))
"""Tokens of the samples of each step."""
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


def steps_of(model: Any) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of the samples of each step."""
    return tuple((max(step) - 9,) * len(step) for step in STEPS) if model.config.model_type in LEFT else STEPS


def rows(model: Any, extras: Sequence[str]) -> list[dict[str, Any]]:
    """Make the samples, all of whose tokens are learned; with zeros for inputs that tell images from text."""
    generator, vocab = torch.Generator().manual_seed(0), model.config.get_text_config(decoder=True).vocab_size
    found: list[dict[str, Any]] = []
    for length in (length for step in steps_of(model) for length in step):
        ids = torch.randint(min(3, vocab - 1), vocab, (length,), generator=generator).tolist()
        row: dict[str, Any] = {"input_ids": ids, "labels": ids, **{name: [0] * length for name in extras}}
        found.append(with_image(model, row, generator))
    return found


def as_batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch, padded on the right; of one sample, without a mask."""

    def padded(name: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(example[name]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    batch = {name: padded(name, -100 if name == "labels" else 0) for name, x in examples[0].items() if is_text(x)}
    batch |= {name: torch.cat([one[name] for one in examples]) for name in set(examples[0]) - set(batch)}
    if len(examples) == 1 or "input_ids" not in batch:  # a mask would be of what an encoder is given
        return batch
    lengths = torch.tensor([len(example["labels"]) for example in examples])
    return {**batch, "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


def is_text(values: Any) -> bool:
    """Return whether a row's values are of tokens; those of images are tensors."""
    return isinstance(values, list)
