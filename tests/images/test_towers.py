"""What towers compute is counted as torch counts it, image by image, and as it is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import with_lora
from seers import MOST_PATCHES, SEEING
from sights import features_of, image_of, joined, rows_with_images, seeing_model
from torch.utils.flop_counter import FlopCounterMode

from hf_hetero.images.families import WITH_CLASS, side_of
from hf_hetero.images.reading import sight_of
from hf_hetero.images.towers import UNCOUNTED, TextRates, towers_of

TEXT = TextRates(forward=10.0, training=30.0, again=8.0)
SIZES = [(20, 24), (4, 8), (12, 20)]
COUNTED = [name for name in SEEING if name.replace("-", "_") not in UNCOUNTED]
NO_AGAIN = replace(TEXT, again=0.0)


def inputs_of(model: Any, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return joined([image_of(model, size, generator) for size in sizes])


def counted(model: Any, images: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Operations of products with weights, and of those between patches, as torch counts them in a forward pass."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features_of(model, images)
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    pairs = found.pop("aten.bmm", 0)
    return sum(found.values()), pairs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COUNTED)
def test_as_torch_counts_them(name: str, size: tuple[int, int]) -> None:
    """A forward pass through the tower of each family, to the last operation, for images of several sizes."""
    model = seeing_model(name)
    images = inputs_of(model, [size])
    rates, sizes = towers_of(model, TEXT).looking, list(towers_of(model, TEXT).sizes.of(images))
    weights, pairs = counted(model, images)
    assert replace(rates, a_pair=0, in_windows=0).of(sizes) == weights + of_class_tokens(model, len(sizes))
    assert replace(rates, a_patch=0, a_token=0).of(sizes) == pairs - of_pooling(model)


def of_class_tokens(model: Any, num: int) -> int:
    """What is counted too much of a class token: it is looked up, and counts as a patch that is multiplied."""
    config = model.config.vision_config
    has_class = config.model_type in WITH_CLASS
    return num * 2 * 3 * side_of(config.patch_size) ** 2 * config.hidden_size if has_class else 0


def of_pooling(model: Any) -> int:
    """What is left out of Gemma 4: its means of patches are a product with a matrix of ones and zeros."""
    if model.config.model_type != "gemma4":
        return 0
    config = model.config.vision_config
    return 2 * MOST_PATCHES * MOST_PATCHES // config.pooling_kernel_size**2 * config.hidden_size


@pytest.mark.parametrize("name", ["qwen2.5-vl", "mistral3", "llava-next", "gemma4", "gemma3"])
def test_images_of_a_row_add_up(name: str) -> None:
    """Whatever their sizes; other sizes are another count, where a tower takes them as they are."""
    model = seeing_model(name)
    towers = towers_of(model, TEXT)
    alone = [towers.tokens(inputs_of(model, [size])) for size in SIZES]
    assert towers.tokens(inputs_of(model, SIZES)) == pytest.approx(sum(alone))
    assert (len(set(alone)) > 1) == (name != "gemma3")


def test_trained_frozen_and_by_adapters() -> None:
    """By hand: 6 operations a weight that is trained, 2 where nothing is; between, 4 where gradients go through.

    Qwen2.5-VL's tower of two layers of width 16, one of them with windows, beside a merger of 64 to 64 to 32.
    """
    in_patch, merger = 3 * 2 * 2**2 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 16), 64 * 64 + 64 * 32
    model = seeing_model("qwen2.5-vl")
    assert rates_of(model) == (6 * in_patch, 6 * merger, 3 * 4 * 16, 3 * 4 * 16)
    for name, weight in model.named_parameters():
        weight.requires_grad = "visual" not in name
    assert rates_of(model) == (2 * in_patch, 2 * merger, 4 * 16, 4 * 16)
    for name, weight in model.named_parameters():
        weight.requires_grad = "visual" not in name or "merger" in name
    assert rates_of(model) == (2 * in_patch, 6 * merger, 4 * 16, 4 * 16)
    adapted = with_lora(seeing_model("qwen2.5-vl"), ["qkv"]).get_base_model()
    adapters = 2 * 4 * (16 + 48)
    assert rates_of(adapted) == (4 * in_patch + 6 * adapters, 4 * merger, 3 * 4 * 16, 3 * 4 * 16)


def rates_of(model: Any) -> tuple[float, ...]:
    rates = towers_of(model, TEXT).learning
    return rates.a_patch, rates.a_token, rates.a_pair, rates.in_windows


def test_tower_tokens_by_hand() -> None:
    """Operations of an image by those of a token of text, what is computed again included; and back."""
    model, images = seeing_model("qwen3-vl"), {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    patches, [size] = 24, towers_of(model, TEXT).sizes.of(images)
    assert size == (patches, 6, patches**2, 0)
    operations = towers_of(model, TEXT).learning.of([size])
    for text, again in ((NO_AGAIN, 1.0), (TEXT, 4 / 3)):
        towers = towers_of(model, text)
        assert towers.tokens(images) == pytest.approx(operations * again / (text.training + text.again))
        assert towers.flops([towers.tokens(images), 0.0]) == pytest.approx(operations)
        assert towers.tokens(images, learns=False) == pytest.approx(operations / 3 / text.forward)


def test_a_tower_that_learns_nothing_is_not_computed_again() -> None:
    """Recomputed layers of text take longer, those of a frozen tower do not: it counts as fewer tokens of text."""
    model, images = seeing_model("qwen3-vl"), {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    model.model.visual.requires_grad_(False)
    some, fewer = towers_of(model, NO_AGAIN).tokens(images), towers_of(model, TEXT).tokens(images)
    assert fewer == pytest.approx(some * NO_AGAIN.training / (TEXT.training + TEXT.again))


def test_others_are_said_not_to_be_counted() -> None:
    """Those of the families that are left have parts that nobody counts."""
    assert len(SEEING) - len(COUNTED) == len(UNCOUNTED)
    for name in set(SEEING) - set(COUNTED):
        with pytest.raises(ValueError, match="are not counted"):
            towers_of(seeing_model(name), TEXT)


@pytest.mark.parametrize("name", COUNTED)
def test_rows_tell_sizes_without_pixels(name: str) -> None:
    """As a table stores them: what says how large images are, or as many tokens of images as they become."""
    model = seeing_model(name)
    towers, with_images = towers_of(model, TEXT), 0
    for row in rows_with_images(name)[:8]:
        sizes = towers.sizes
        if sizes.told_by == "pixel_values":
            told = {"pixel_values": sizes.pictures_of(row["input_ids"])}
        else:
            told = {sizes.told_by: row[sizes.told_by].tolist()} if sizes.told_by in row else {}
        assert towers.tokens(told) == towers.tokens(row)
        assert (towers.tokens(row) > 0) == ("pixel_values" in row)
        with_images += "pixel_values" in row
    assert with_images


@pytest.mark.parametrize("wrong", [[["a", 1, 2]], [[1, 2]], 7, "x"])
def test_what_cannot_be_read_counts_for_nothing(wrong: object) -> None:
    """The step that has such a row says what is wrong with it."""
    assert towers_of(seeing_model("qwen3-vl"), TEXT).tokens({"image_grid_thw": wrong}) == 0


def test_what_decides_how_rows_are_read_can_be_compared() -> None:
    """Two runs on one model see rows alike, whatever tensors stand in for images."""
    model = seeing_model("llava")
    assert sight_of(model, None) == sight_of(model, None)
    assert sight_of(model, None) != sight_of(seeing_model("gemma3"), None)
    assert towers_of(model, TEXT) == towers_of(model, TEXT) != towers_of(model, NO_AGAIN)
