"""A `Sight` is what a collator must know of a model that sees, to read rows with images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_hetero.errors import BadSample
from hf_hetero.images.mutual import MutualTokens
from hf_hetero.images.pictures import MASK, NO_PLACE, PLACES, Picture, Seen, joined_inputs
from hf_hetero.images.positions import RotaryPositions
from hf_hetero.images.sizes import NUMBERS, SIZES, PixelSizes, TileSizes

PIXELS, GRID = "pixel_values", "image_grid_thw"
SHAPES = "spatial_shapes"
"""How many rows and columns of patches an image has."""
REMEDY = "Tokenise text and images together, with the model's own processor, and cut nothing off."


@dataclass(frozen=True, slots=True)
class Sight:
    """A `Sight` says how rows hold images.

    Args:
        token: that features of images take the place of.
        inputs: of the tower, all of which a row with images has.
        merged: patches of an image that become one token, where images are rows of patches, or pixels of a frame; None:
            where they are pictures of one size, or of several, of which the model knows how many tokens they become.
        whole: tokens that a picture becomes, where all become as many.
        stand_in: inputs of the tower that take the least time.
        positions: makes positions of samples with images; None: they count from 0, as those of text.
        mutual: which tokens look at each other; None: all look back.
        sizes: tokens that pictures become by their sizes, where each has its own.
        beside: tokens around those of images, which the model has features for, too, where there are images.
    """

    token: int
    inputs: tuple[str, ...]
    merged: int | None
    # rows are read alike whatever it is, and tensors do not compare as a whole
    stand_in: Mapping[str, torch.Tensor] = field(repr=False, compare=False)
    positions: RotaryPositions | None = field(default=None, repr=False)
    mutual: MutualTokens | None = None
    whole: int | None = None
    sizes: PixelSizes | TileSizes | None = None
    beside: frozenset[int] = frozenset()

    @property
    def mutual_in_windows(self) -> bool:
        """Return whether tokens look at each other only in layers with a sliding window."""
        return self.mutual is not None and self.mutual.in_windows

    def marks(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a row says of its tokens that does not say whether they look at each other."""
        return {} if self.mutual is None else self.mutual.marks(input_ids)

    def stretches(self, inputs: Mapping[str, torch.Tensor], name: str) -> tuple[tuple[int, int], ...]:
        """Return the stretches of a sample whose tokens look at each other (`MutualTokens.stretches`)."""
        return () if self.mutual is None else self.mutual.stretches(inputs, name)

    def inputs_of(self, example: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
        """Return the inputs of the tower that an example has; none where it has no image.

        Raises:
            BadSample: what there is cannot be read as numbers, or numbers of images are missing.
        """
        found: dict[str, torch.Tensor] = {}
        for key in self.inputs:
            if (values := example.get(key)) is None or (hasattr(values, "__len__") and not len(values)):
                continue
            try:
                found[key] = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadSample(f"{name}: {key} is no tensor, and no lists of one shape. {REMEDY}") from error
        if NUMBERS in self.inputs and NUMBERS not in found and SIZES in found:  # as models take it: each by itself
            found[NUMBERS] = torch.ones(len(found[SIZES]), dtype=torch.int64)
        if found and (missing := [key for key in self.inputs if key not in found]):
            raise BadSample(f"{name} has {sorted(found)} and no {', '.join(missing)}. {REMEDY}")
        return found

    def seen(self, images: Mapping[str, torch.Tensor], input_ids: torch.Tensor, name: str) -> Seen | None:
        """Return the images of a sample, and where their tokens are; None where it has none.

        Args:
            images: inputs of the tower.
            input_ids: shape (num_tokens,).
            name: of the row, for messages.

        Raises:
            BadSample: images and tokens do not match.
        """
        is_image = input_ids == self.token
        num_tokens = int(is_image.sum())
        if not images:
            if num_tokens:
                raise BadSample(f"{name} has {num_tokens} tokens of images ({self.token}) and no {PIXELS}. {REMEDY}")
            if found := self.beside & set(input_ids.tolist()):
                raise BadSample(f"{name} has tokens {sorted(found)}, which stand around images, and no image. {REMEDY}")
            return None
        pictures = self._pictures(images, num_tokens, name)
        if (expected := sum(picture.num_tokens for picture in pictures)) != num_tokens or not num_tokens:
            raise BadSample(
                f"{name} has {num_tokens} tokens of images ({self.token}), and images that become {expected}. {REMEDY}"
            )
        return Seen(pictures, is_image)

    def _pictures(self, images: Mapping[str, torch.Tensor], num_tokens: int, name: str) -> tuple[Picture, ...]:
        if MASK in images:
            return self._by_shapes(images, name) if SHAPES in images else self._frames(images, name)
        if self.merged is None:
            return self._whole(images, num_tokens, name)
        return self._by_places(images, name) if PLACES in images else self._by_patches(images, name)

    def _whole(self, images: Mapping[str, torch.Tensor], num_tokens: int, name: str) -> tuple[Picture, ...]:
        """Tell pictures apart, by what each becomes; but not those that are several, and so are not cut into tiles."""
        num = len(images[PIXELS])
        tensors = {key: values for key, values in images.items() if key != NUMBERS}
        if images[PIXELS].ndim < 4 or any(len(values) != num for values in tensors.values()):
            shapes = {key: tuple(values.shape) for key, values in images.items()}
            raise BadSample(f"{name} has images of shapes {shapes}; each begins with the number of images. {REMEDY}")
        if self.sizes is None:
            count = num_tokens // num if self.whole is None else self.whole
            return tuple(Picture({key: values[n : n + 1] for key, values in images.items()}, count) for n in range(num))
        numbers: list[int] = images[NUMBERS].flatten().tolist() if NUMBERS in images else [1] * num
        if sum(numbers) != num:
            raise BadSample(f"{name} has {num} images, and {NUMBERS} of {sum(numbers)}. {REMEDY}")
        found, start, sides = list[Picture](), 0, images[SIZES].long().reshape(-1, 2).tolist()
        for number in numbers:
            part = {key: values[start : start + number] for key, values in tensors.items()}
            if NUMBERS in images:
                part[NUMBERS] = torch.tensor([number])
            sizes: list[tuple[int, int]] = [(height, width) for height, width in sides[start : start + number]]
            found.append(Picture(part, sum(self.sizes.tokens(sizes, alone=number == 1))))
            start += number
        return tuple(found)

    def _by_places(self, images: Mapping[str, torch.Tensor], name: str) -> tuple[Picture, ...]:
        """Tell images apart that are filled up to as many patches; those with a place are an image's own."""
        assert self.merged is not None
        places, patches = images[PLACES], images[PIXELS]
        if places.ndim != 3 or patches.ndim != 3 or places.shape[:2] != patches.shape[:2]:
            shapes = {key: tuple(values.shape) for key, values in images.items()}
            raise BadSample(f"{name} has images of shapes {shapes}; each begins with images and patches. {REMEDY}")
        counts: list[int] = (places != NO_PLACE).all(-1).sum(-1).tolist()
        parts = zip(patches.split(1), places.split(1), counts, strict=True)
        return tuple(Picture({PIXELS: part, PLACES: where}, count // self.merged) for part, where, count in parts)

    def _by_shapes(self, images: Mapping[str, torch.Tensor], name: str) -> tuple[Picture, ...]:
        """Tell images apart that are filled up to as many patches; those that a mask has are an image's own."""
        assert self.merged is not None
        patches, mask, sides = images[PIXELS], images[MASK], images[SHAPES].long().reshape(-1, 2)
        counts = mask.sum(-1).flatten()
        if patches.ndim != 3 or mask.shape != patches.shape[:2] or counts.tolist() != sides.prod(-1).tolist():
            shapes = {key: tuple(values.shape) for key, values in images.items()}
            raise BadSample(
                f"{name} has images of shapes {shapes}; each begins with images and patches, and {MASK} has as many of "
                f"an image as {SHAPES}. {REMEDY}"
            )
        parts = zip(patches.split(1), mask.split(1), sides.split(1), counts.tolist(), strict=True)
        return tuple(
            Picture({PIXELS: part, MASK: own, SHAPES: side}, count // self.merged) for part, own, side, count in parts
        )

    def _frames(self, images: Mapping[str, torch.Tensor], name: str) -> tuple[Picture, ...]:
        """Tell the frames of a sample's pictures apart, which all have one size; those of zeros only fill it up.

        Where frames are pictures that become as many tokens each, they may be filled up to another size.
        """
        pixels, mask = images[PIXELS], images[MASK]
        if pixels.ndim == 4 and mask.ndim == 3:  # of one row of a batch
            pixels, mask = pixels[None], mask[None]
        if pixels.ndim != 5 or mask.shape != pixels.shape[:2] + pixels.shape[3:]:
            shapes = {key: tuple(values.shape) for key, values in images.items()}
            raise BadSample(f"{name} has images of shapes {shapes}; each begins with the number of frames. {REMEDY}")
        pixels, mask = pixels.flatten(0, 1), mask.flatten(0, 1)
        tokens = self.whole or pixels.shape[2] * pixels.shape[3] // (self.merged or 1)
        parts, fills = zip(pixels.split(1), mask.split(1), strict=True), self.whole is not None
        return tuple(Picture({PIXELS: part[None], MASK: own[None]}, tokens, fills) for part, own in parts if part.any())

    def _by_patches(self, images: Mapping[str, torch.Tensor], name: str) -> tuple[Picture, ...]:
        """Tell images apart whose patches stand one after the other; their grids say how many each has."""
        assert self.merged is not None
        grids, patches = images[GRID].long().reshape(-1, 3), images[PIXELS]
        counts: list[int] = grids.prod(-1).tolist()
        if patches.ndim != self.stand_in[PIXELS].ndim or sum(counts) != len(patches):
            raise BadSample(
                f"{name} has {PIXELS} of shape {tuple(patches.shape)}, and {GRID} of {sum(counts)} patches. {REMEDY}"
            )
        parts = zip(patches.split(counts), grids.split(1), strict=True)
        return tuple(Picture({PIXELS: part, GRID: grid}, len(part) // self.merged) for part, grid in parts)


def all_inputs(seen: Seen) -> dict[str, torch.Tensor]:
    """Return the inputs of the tower for all images of a sample."""
    return joined_inputs(seen.pictures)
