"""Rows with images are read as the model would see them alone, or refused in words."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seers import IMAGE, SEEING
from sights import (
    OF_IMAGES,
    OF_TOKENS,
    features_of,
    image_of,
    joined,
    num_features,
    rows_with_images,
    seeing_model,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from hf_hetero.checks.tiny import build, shrunk
from hf_hetero.collators import PackedCollator
from hf_hetero.errors import BadSample
from hf_hetero.images.families import why_blind
from hf_hetero.images.features import merging_part
from hf_hetero.images.reading import sight_of
from hf_hetero.images.sight import Sight

FRAMES = ("pixel_values", "pixel_attention_mask")
INPUTS = frozenset({*OF_IMAGES, *OF_TOKENS, "pixel_values_videos"})


def sight(name: str) -> Sight:
    model: Any = seeing_model(name)
    kind = type(merging_part(model))
    has_positions = hasattr(kind, "get_rope_index")
    found = sight_of(model, build(shrunk(model.config), "meta", kind) if has_positions else None)  # pyright: ignore
    assert found is not None
    return found


def packer(name: str) -> PackedCollator:
    return PackedCollator(sight=sight(name), model_inputs=INPUTS)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm-4.1v"])
def test_positions_are_the_models_own(name: str) -> None:
    """Those that stock transformers hands its language model for the row alone."""
    model, positions, is_plain = seeing_model(name), list[torch.Tensor](), list[bool]()
    model.model.language_model.register_forward_pre_hook(
        lambda part, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    for row in rows_with_images(name):
        if "pixel_values" in row:
            images = {key: row[key] for key in ("pixel_values", "image_grid_thw")}
            marks = torch.tensor([row["mm_token_type_ids"]])
            model(input_ids=torch.tensor([row["input_ids"]]), mm_token_type_ids=marks, **images)
            found = packer(name).sample(row, "row 0").positions
            assert found is not None
            assert torch.equal(found.T, positions[-1][:, 0])
            is_plain.append(torch.equal(found[:, 0], found[:, 1]))
    assert not all(is_plain)  # they are no positions of text


def test_a_sight_travels_to_workers() -> None:
    """It is pickled, and makes the same positions there."""
    again, row = pickle.loads(pickle.dumps(packer("qwen3-vl"))), rows_with_images("qwen3-vl")[2]
    assert torch.equal(again.sample(row, "row 2").positions, packer("qwen3-vl").sample(row, "row 2").positions)


@pytest.mark.parametrize("name", SEEING)
def test_an_image_that_stands_in_can_be_encoded(name: str) -> None:
    """By the real tower, from its config alone."""
    model, found = seeing_model(name), sight(name)
    images = {key: values for key, values in found.stand_in.items() if key in found.inputs}
    features_of(model, images)


def test_images_are_told_apart() -> None:
    """By their grids or sizes; those of LLaVA-OneVision that are two, and so not cut into tiles, stay together."""
    nums = {}
    for name in ("qwen3-vl", "llava", "llava-next", "llava-onevision", "idefics2", "gemma4", "lfm2-vl", "smolvlm"):
        seen = packer(name).sample(rows_with_images(name)[2], "row 2").seen  # with two images
        assert seen is not None
        nums[name] = [picture.num_tokens for picture in seen.pictures]
    assert {name: len(found) for name, found in nums.items()} == {
        "qwen3-vl": 2,
        "llava": 2,
        "llava-next": 2,
        "llava-onevision": 1,
        "idefics2": 2,
        "gemma4": 2,
        "lfm2-vl": 2,
        "smolvlm": 4,
    }
    assert nums["qwen3-vl"] == nums["gemma4"] == nums["lfm2-vl"] == [2, 18]


def test_frames_of_zeros_only_fill_a_row_up() -> None:
    """As in a row of a batch that has other rows with more frames, with or without the dim of that batch."""
    row, found = rows_with_images("smolvlm")[2], packer("smolvlm")
    expected = found.sample(row, "row 2").seen
    filled = {key: torch.cat([row[key], torch.zeros_like(row[key])], dim=1) for key in FRAMES}
    for images in (filled, {key: values[0] for key, values in filled.items()}):
        seen = found.sample({**row, **images}, "row 2").seen
        assert seen is not None
        assert expected is not None
        assert len(seen.pictures) == len(expected.pictures)
        for one, other in zip(seen.pictures, expected.pictures, strict=True):
            assert one.num_tokens == other.num_tokens
            assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in FRAMES)


BAD_FRAMES: dict[str, tuple[Any, str]] = {
    "of no row": (lambda row: {**row, "pixel_values": row["pixel_values"][0, 0]}, "begins with the number of frames"),
    "another mask": (lambda row: {**row, "pixel_attention_mask": torch.ones(1, 1, 4, 4)}, "begins with the number of"),
    "one too many": (
        lambda row: {**row, **{key: torch.cat([row[key]] * 2, dim=1) for key in FRAMES}},
        r"16 tokens of images \(90\), and images that become 32",
    ),
    "all zeros": (lambda row: {**row, "pixel_values": 0 * row["pixel_values"]}, "and images that become 0"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frames_are_refused(case: str) -> None:
    """With the row, what is wrong, and what to do."""
    change, words = BAD_FRAMES[case]
    with pytest.raises(BadSample, match=words):
        packer("smolvlm").sample(change(rows_with_images("smolvlm")[2]), "row 2")


@pytest.mark.parametrize("name", SEEING)
def test_a_picture_that_is_one_too_many_is_refused(name: str) -> None:
    """As by the model itself, which has features left over, also where tokens could be shared out evenly."""
    row, found = rows_with_images(name)[0], packer(name)
    assert found.sample(row, "row 0").seen is not None
    dim = 1 if "pixel_attention_mask" in row and row["pixel_values"].ndim == 5 else 0
    images = {key: torch.cat([row[key]] * 2, dim=dim) for key in OF_IMAGES if key in row}
    with pytest.raises(BadSample, match="and images that become"):
        found.sample({**row, **images}, "row 0")


@pytest.mark.parametrize("name", [name for name in SEEING if "image_sizes" in sight(name).inputs])
def test_tokens_by_sizes_are_the_models_own(name: str) -> None:
    """For pictures of each form, wider and higher than any tile or pinpoint, too, alone and beside another."""
    model, found = seeing_model(name), sight(name)
    assert found.sizes is not None
    generator, alone, both = torch.Generator().manual_seed(0), set[int](), set[int]()
    for height in (4, 7, 8, 11, 20, 24):
        for width in (4, 6, 9, 13, 24, 60):
            image = sized(model, (height, width), generator)
            [tokens] = found.sizes.tokens([(height, width)])
            if tokens == 1:  # some models squeeze away the dim of one
                continue
            assert tokens == num_features(model, image), (height, width)
            alone.add(tokens)
            if "batch_num_images" in image:
                [one, other] = found.sizes.tokens([(height, width)] * 2, alone=False)
                two = {**image, **{key: torch.cat([image[key]] * 2) for key in ("pixel_values", "image_sizes")}}
                assert one + other == num_features(model, {**two, "batch_num_images": torch.tensor([2])})
                both.add(one)
    assert len(alone) > 4
    assert not both or both == {(model.config.vision_config.image_size // 2) ** 2 + 1}


def sized(model: Any, size: tuple[int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture of any size, with as many tiles as its model wants, where it is cut into tiles."""
    image = image_of(model, size, generator)
    if (pinpoints := getattr(model.config, "image_grid_pinpoints", None)) is None:
        return image
    side = model.config.vision_config.image_size
    num = image_size_to_num_patches(list(size), pinpoints, side)
    pixels = torch.randn(1, num, 3, side, side, generator=generator)
    return {**image, "pixel_values": pixels, "image_sizes": torch.tensor([size])}


def test_a_row_whose_numbers_of_pictures_do_not_add_up_is_refused() -> None:
    """LLaVA-OneVision's, which decide how pictures are cut; where a row has none, each counts as alone."""
    found, rows = packer("llava-onevision"), rows_with_images("llava-onevision")
    with pytest.raises(BadSample, match="row 0 has 1 images, and batch_num_images of 2"):
        found.sample({**rows[0], "batch_num_images": torch.tensor([2])}, "row 0")
    without_number = found.sample(without(rows[0], "batch_num_images"), "row 0")
    assert without_number.fingerprint() == found.sample(rows[0], "row 0").fingerprint()
    with pytest.raises(BadSample, match="and images that become"):
        found.sample(without(rows[2], "batch_num_images"), "row 2")


def test_tokens_around_images_that_are_not_there_are_refused() -> None:
    """Ovis 2's have features of their own where a pack has images, and are text where it has none."""
    found, row = packer("ovis2"), rows_with_images("ovis2")[1]
    assert found.sample(row, "row 1").seen is None
    ids = [92, *row["input_ids"][1:]]
    with pytest.raises(BadSample, match=r"row 1 has tokens \[92\], which stand around images, and no image"):
        found.sample({**row, "input_ids": ids}, "row 1")


def test_bad_shapes_are_refused() -> None:
    """A shape that has other patches than the mask."""
    row = rows_with_images("lfm2-vl")[0]
    with pytest.raises(BadSample, match="pixel_attention_mask has as many of an image as spatial_shapes"):
        packer("lfm2-vl").sample({**row, "spatial_shapes": torch.tensor([[1, 1]])}, "row 0")


def test_a_row_reads_the_same_whatever_holds_it() -> None:
    """Lists, as a table gives them, and tensors make the same fingerprint; other pixels another one."""
    row, found = rows_with_images("qwen3-vl")[0], packer("qwen3-vl")
    as_lists = {key: values.tolist() if isinstance(values, torch.Tensor) else values for key, values in row.items()}
    assert found.sample(row, "row 0").fingerprint() == found.sample(as_lists, "row 0").fingerprint()
    other = {**row, "pixel_values": row["pixel_values"] + 1}
    assert found.sample(row, "row 0").fingerprint() != found.sample(other, "row 0").fingerprint()


def test_a_collator_may_make_tokens_and_images() -> None:
    """Of rows that have neither; one that only makes labels may give images another dim."""
    row = rows_with_images("qwen3-vl")[0]
    inputs = {key: torch.as_tensor(row[key])[None] for key in ("input_ids", "labels", "mm_token_type_ids")}
    images = {key: row[key] for key in ("pixel_values", "image_grid_thw")}

    def make(rows: list[Any]) -> dict[str, Any]:
        assert rows == [{"text": "raw"}]
        return {**inputs, **images}

    def add_dim(rows: list[Any]) -> dict[str, Any]:
        return {**inputs, **{key: values[None] for key, values in images.items()}}

    expected = packer("qwen3-vl").sample(row, "row 0").fingerprint()
    for raw, collate in (({"text": "raw"}, make), (row, add_dim)):
        found = PackedCollator(collate, sight=sight("qwen3-vl"), model_inputs=INPUTS).sample(raw, "row 0")
        assert found.fingerprint() == expected
    with pytest.raises(BadSample, match="row 0: the data_collator makes no input_ids of it, only"):
        PackedCollator(lambda rows: images, sight=sight("qwen3-vl"), model_inputs=INPUTS).sample({"text": ""}, "row 0")


def without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values for key, values in row.items() if key not in keys}


BAD: dict[str, tuple[Any, str]] = {
    "no images": (
        lambda row: without(row, "pixel_values", "image_grid_thw"),
        rf"row 0 has 30 tokens of images \({IMAGE}\) and no pixel_values",
    ),
    "no grid": (lambda row: without(row, "image_grid_thw"), r"row 0 has \['pixel_values'\] and no image_grid_thw"),
    "no pixels": (lambda row: without(row, "pixel_values"), r"row 0 has \['image_grid_thw'\] and no pixel_values"),
    "another grid": (
        lambda row: {**row, "image_grid_thw": [[1, 4, 4]]},
        r"pixel_values of shape \(120, 24\), and image_grid_thw of 16 patches",
    ),
    "cut off": (
        lambda row: {**row, **{key: row[key][:3] for key in ("input_ids", "labels", "mm_token_type_ids")}},
        "and images that become 30",
    ),
    "no kinds of tokens": (lambda row: without(row, "mm_token_type_ids"), "row 0 has images and no mm_token_type_ids"),
    "unlike lists": (lambda row: {**row, "pixel_values": [[1.0], [1.0, 2.0]]}, "pixel_values is no tensor"),
    "a video": (lambda row: {**row, "pixel_values_videos": torch.ones(1, 2)}, "row 0 has pixel_values_videos"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused(case: str) -> None:
    """With the row, what is wrong, and what to do."""
    change, words = BAD[case]
    row = rows_with_images("qwen3-vl")[0]
    with pytest.raises(BadSample, match=words):
        packer("qwen3-vl").sample(change(row), "row 0")


def test_a_part_of_a_row_with_images_is_refused() -> None:
    """What is cut has lost an image, or its place."""
    sample = packer("qwen3-vl").sample(rows_with_images("qwen3-vl")[0], "row 0")
    assert sample.part(0, len(sample.input_ids)) is sample
    with pytest.raises(BadSample, match="row 7 has images, and only tokens 0 to 9 of"):
        sample.part(0, 9, "row 7")


def test_why_others_are_blind() -> None:
    """Each type that is not in the table is refused for a reason."""
    assert why_blind(seeing_model("llava")) == ""
    model = seeing_model("gemma4")
    model.config.vision_config = None
    assert "no vision_config" in why_blind(model)
    model = seeing_model("llava")
    model.config = SimpleNamespace(model_type="another")
    assert "'another' was not compared" in why_blind(model)
    model.config = SimpleNamespace(model_type="mllama")
    assert "which take the place of no tokens" in why_blind(model)


def test_the_rows_of_the_tests_are_as_a_processor_joins_them() -> None:
    """Two images of other sizes become one tensor, filled up with zeros."""
    found = joined([{"pixel_values": torch.ones(1, 3, 4, 8)}, {"pixel_values": torch.ones(1, 3, 8, 4)}])
    assert found["pixel_values"].shape == (2, 3, 8, 8)
    assert found["pixel_values"].sum() == 3 * (32 + 32)
