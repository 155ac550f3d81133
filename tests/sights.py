"""Tiny models that see, rows with images for them, and each row alone in stock transformers as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from helpers import IGNORE, gradients_of
from seers import IMAGE, MOST_PATCHES, SEEING
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import _get_current_function_mode_stack
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from hf_hetero.checks.in_double import InDouble, in_double
from hf_hetero.images.families import side_of
from hf_hetero.images.reading import SQUARE

GRIDDED = ("qwen2", "qwen3", "glm", "exaone4_5", "paddleocr_vl", "ernie4_5_vl_moe", "kimi_k25")
"""How the types begin whose images are patches with a grid; and those that want it said which tokens are of images."""
MARKED = ("qwen2", "qwen3", "glm", "gemma4", "paddleocr_vl", "ernie4_5_vl_moe")
OF_TOKENS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
OF_IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids", "pixel_attention_mask")
OF_IMAGES += ("spatial_shapes", "batch_num_images", "high_res_pixel_values")
UNCAST = ("llama4", "deepseek-vl-hybrid", "kimi-k2.5")
"""Whose towers take pixels in the type of their own weights only."""
SIZES = [(20, 24), (16, 24), (4, 8), (24, 12), (12, 20)]
"""Heights and widths of images, in pixels."""
LENGTHS = [40, 3, 17, 1, 9, 5, 28, 64, 2, 11, 7, 33, 21, 4, 13, 50, 6, 1, 19, 8, 5, 26, 3, 12]
"""Tokens of text in each row."""
NUM_IMAGES = [1, 0, 2, 0, 1, 0, 0, 2, 0, 1, 0, 1, 0, 0, 2, 1, 0, 1, 0, 0, 1, 2, 0, 0]


def seeing_model(name: str) -> Any:
    """A model with random weights, the same for the same name, whose towers count for something."""
    torch.manual_seed(0)
    kind, text, tower, own = SEEING[name]
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=tower, **own)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():  # as large as what text has, so that what is wrong with images is seen in all gradients
        for key, weight in model.named_parameters():
            if not any(part in key for part in ("language_model", "text_model", "lm_head")) and weight.ndim > 1:
                weight.normal_(0, 0.3)
            if "alpha" in key:  # of DeepSeek-VL's larger pictures, which it would not see else
                weight.fill_(0.5)
    return model


def image_of(model: Any, size: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The inputs of a tower for one image, in fp32, as rows have them."""
    vision, kind = model.config.vision_config, model.config.model_type
    height, width = size
    if kind.startswith(GRIDDED):
        rows, columns = height // vision.patch_size, width // vision.patch_size
        shape = (3, vision.patch_size, vision.patch_size)
        if kind not in SQUARE:
            shape = (3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2,)
        return {
            "pixel_values": torch.randn(rows * columns, *shape, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
    if kind == "llava_onevision":
        num_tiles = image_size_to_num_patches([height, width], model.config.image_grid_pinpoints, vision.image_size)
        return {
            "pixel_values": torch.randn(1, num_tiles, 3, vision.image_size, vision.image_size, generator=generator),
            "image_sizes": torch.tensor([[height, width]]),
            "batch_num_images": torch.tensor([1]),
        }
    if kind == "idefics2":
        mask = torch.ones(1, 1, height, width, dtype=torch.int64)
        return {"pixel_values": torch.randn(1, 1, 3, height, width, generator=generator), "pixel_attention_mask": mask}
    if kind == "deepseek_vl_hybrid":
        sides = {"pixel_values": vision.image_size}
        sides["high_res_pixel_values"] = model.config.high_res_vision_config.image_size
        return {name: torch.randn(1, 3, side, side, generator=generator) for name, side in sides.items()}
    if kind == "llava_next":
        pinpoint = (height, width) if [height, width] in model.config.image_grid_pinpoints else (8, 8)
        num_tiles = 1 + pinpoint[0] * pinpoint[1] // vision.image_size**2
        return {
            "pixel_values": torch.randn(1, num_tiles, 3, vision.image_size, vision.image_size, generator=generator),
            "image_sizes": torch.tensor([pinpoint]),
        }
    if kind == "gemma4":
        rows, columns = height // vision.patch_size, width // vision.patch_size
        places = torch.full((1, MOST_PATCHES, 2), -1)
        places[0, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
        patches = torch.zeros(1, MOST_PATCHES, 3 * vision.patch_size**2)
        patches[0, : rows * columns] = torch.rand(rows * columns, patches.shape[2], generator=generator)
        return {"pixel_values": patches, "image_position_ids": places}
    if kind in ("idefics3", "smolvlm"):
        num, side = 1 + height * width % 5 % 3, vision.image_size
        mask = torch.ones(1, num, side, side, dtype=torch.int64)
        mask[:, 0, side - vision.patch_size :] = 0  # the lowest patches of the first frame only fill it up
        return {"pixel_values": torch.randn(1, num, 3, side, side, generator=generator), "pixel_attention_mask": mask}
    if kind == "lfm2_vl":
        rows, columns = height // vision.patch_size, width // vision.patch_size
        patches = torch.zeros(1, MOST_PATCHES, 3 * vision.patch_size**2)
        patches[0, : rows * columns] = torch.randn(rows * columns, patches.shape[2], generator=generator)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": (torch.arange(MOST_PATCHES) < rows * columns).int()[None],
            "spatial_shapes": torch.tensor([[rows, columns]]),
        }
    if vision.model_type == "pixtral":
        return {
            "pixel_values": torch.randn(1, 3, height, width, generator=generator),
            "image_sizes": torch.tensor([[height, width]]),
        }
    side = side_of(vision.image_size)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def features_of(model: Any, images: dict[str, torch.Tensor]) -> Any:
    """What a tower makes of images."""
    if model.config.model_type == "llama4":
        return model.multi_modal_projector(model.get_image_features(**images, return_dict=True).last_hidden_state)
    return model.model.get_image_features(**images, return_dict=True).pooler_output


def num_features(model: Any, images: dict[str, torch.Tensor]) -> int:
    """How many tokens images become, as the tower itself has it."""
    with torch.no_grad():
        found = features_of(model, images)
    return sum(x.shape[:-1].numel() for x in found) if not isinstance(found, torch.Tensor) else found.shape[:-1].numel()


def rows_with_images(
    name: str, lengths: Sequence[int] = LENGTHS, num_images: Sequence[int] = NUM_IMAGES
) -> list[dict[str, Any]]:
    """Rows of text with so many images in them: two after one another, or before and after text."""
    model, generator = seeing_model(name), torch.Generator().manual_seed(1)
    kind, vision = model.config.model_type, model.config.vision_config
    rows: list[dict[str, Any]] = []
    for number, (length, images) in enumerate(zip(lengths, num_images, strict=True)):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()  # none of those that stand around images
        seen: list[dict[str, torch.Tensor]] = []
        for n in range(images):
            seen.append(image_of(model, SIZES[(number + n) % len(SIZES)], generator))
            at = min(len(ids), n * (number % 3) + number % 4)
            alone = kind != "llava_onevision" or images == 1  # of several pictures it makes fewer tokens
            num = num_features(model, seen[-1]) if alone else (vision.image_size // vision.patch_size) ** 2 + 1
            places = [92, *[IMAGE] * num, 93]  # so that no two images touch
            end = len(ids) if n else at  # a second one stands at the end
            ids = ids[:end] + places + ids[end:]
        labels = [IGNORE if token in (IMAGE, 92) or place < length // 3 else token for place, token in enumerate(ids)]
        row: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if kind.startswith(MARKED):
            row["mm_token_type_ids"] = [int(token == IMAGE) for token in ids]
        if kind.startswith("ernie") and seen:
            row["moe_mm_token_type_ids"] = [int(token in (IMAGE, 92, 93)) for token in ids]
        if kind == "gemma3" and (seen or number % 2):
            row["token_type_ids"] = [int(token == IMAGE) for token in ids]
        if kind == "paligemma":  # the answer begins behind the images
            begins = max([0, *(place + 2 for place, token in enumerate(ids) if token == IMAGE)])
            row["token_type_ids"] = [int(place >= max(begins, length // 3)) for place in range(len(ids))]
        if seen:
            row |= joined(seen)
        rows.append(row)
    return rows


def joined(images: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The images of a row, as a processor joins them: other sizes are filled up with zeros, frames stand in one row."""
    found: dict[str, torch.Tensor] = {}
    if images[0]["pixel_values"].ndim == 5 and "pixel_attention_mask" in images[0]:
        height, width = (max(image["pixel_values"].shape[dim] for image in images) for dim in (-2, -1))
        filled = [{key: filled_up(values, height, width) for key, values in image.items()} for image in images]
        return {key: torch.cat([image[key] for image in filled], dim=1) for key in images[0]}
    for key in images[0]:
        if key == "batch_num_images":
            found[key] = torch.tensor([len(images)])
            continue
        tensors = [image[key] for image in images]
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
        whole = torch.zeros(sum(map(len, tensors)), *shape, dtype=tensors[0].dtype)
        start = 0
        for x in tensors:
            whole[(slice(start, start + len(x)), *map(slice, x.shape[1:]))] = x
            start += len(x)
        found[key] = whole
    return found


def in_double_too(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their pixels in fp64."""
    return [
        {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in row.items()}
        for row in rows
    ]


def filled_up(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pictures with zeros below and on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1], 0, height - values.shape[-2]))


def loss_alone(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """The sum of a row's token losses: one process, one row, stock attention, nothing of this package."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([row["input_ids"]])}
    inputs |= {key: torch.tensor([row[key]]) for key in OF_TOKENS if key in row}
    inputs |= {key: row[key] for key in OF_IMAGES if key in row}
    for key in ("pixel_values", "high_res_pixel_values"):
        if key in inputs:
            inputs[key] = inputs[key].to(model.dtype)
    logits = model(**inputs, use_cache=False).logits[0]
    labels = torch.tensor(row["labels"])[1:]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORE, reduction="sum")
    return loss + 0 * logits.sum()


def reference(model: Any, data: Sequence[dict[str, Any]], steps: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Each row alone, token losses summed, divided once by the targets of the step, plain gradient descent."""
    gradients, losses = [], []
    model.train()
    for rows in steps:
        model.zero_grad()
        count = sum(label != IGNORE for row in rows for label in data[row]["labels"][1:])
        total = 0.0
        for row in rows:
            loss = loss_alone(model, data[row]) / count
            loss.backward()
            total += loss.item()
        gradients.append(gradients_of(model))
        losses.append(total)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return {
        "gradients": gradients,
        "losses": losses,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }


@contextmanager
def all_in_double(model: Any) -> Iterator[None]:
    """Modules that are computed again in backward, where no mode of torch follows, enter it anew."""
    entered: list[bool] = []

    def enter(*_: Any) -> None:
        entered.append(not _get_current_function_mode_stack())
        if entered[-1]:
            InDouble().__enter__()

    def leave(*_: Any) -> None:
        if entered.pop():
            _get_current_function_mode_stack()[-1].__exit__(None, None, None)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with in_double(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
