"""What towers compute for images is counted here: in operations, and in tokens of text that take as many.

    a weight of the tower         2 a patch forward; 2 backward for what went in, and 2 if it is trained, where anything
                                  of the tower is
    a weight of what joins it     the same a token that images become: of a projector, or of a merger of patches
    a pair of patches that meet   4 D forward, in each layer; twice as many backward

Patches meet all others of their image, or of their window in it. Norms, rotations, the softmax and embeddings that are
looked up are left out, as of text (`hf_hetero.estimate.flops`), and what is computed again counts once. A class token
counts as a patch. Only shapes of images are looked at.

An image's tower tokens are the tokens of text whose linear work takes as many operations, what is computed again
included: what time they take, the cost model knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_hetero.images.families import (
    FRAMES,
    KINDS,
    PATCHES,
    PLACED,
    SHAPED,
    TILES,
    merged_side,
    side_of,
    whole_patches,
    whole_tokens,
)
from hf_hetero.images.pictures import MASK, NO_PLACE, PLACES
from hf_hetero.images.reading import sizes_of
from hf_hetero.images.sight import GRID, PIXELS
from hf_hetero.images.sizes import SIZES, TileSizes

JOINING = (
    *("merger", "downsample", "projector", "connector", "embed_vision", "aligner", "resampler_model"),
    *("vision_adapter", "vision_projection", "head_linear", "visual_embeddings_table"),
)
"""What weights are called that are multiplied with the tokens that images become; others of a tower meet patches."""
LOOKED_UP = ("position", "cls_token", "mask_token", "pos_emb")
"""What weights are called that are added to patches, or stand among them."""
OF_TEXT = ("language_model", "vision_moe")
"""What weights of the language model have in their names."""
UNCOUNTED = ("idefics2", "deepseek_vl_hybrid", "got_ocr2")
"""Types whose towers have parts that nobody counts: latents that look at patches, and relative places of patches."""


class ImageSize(NamedTuple):
    """An `ImageSize` is what of an image decides the work of a tower.

    Args:
        patches: that go through the tower.
        tokens: that they become.
        pairs: of patches that meet where each meets all.
        in_windows: of those that meet where each meets its window.
    """

    patches: int
    tokens: int
    pairs: int
    in_windows: int = 0


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """`ImageSizes` reads the sizes of images from the inputs of their tower.

    Args:
        kind: how images come, one of the values of `families.KINDS`.
        token: that features of images take the place of.
        merged: patches, along a side, that become one token.
        window: patches along a side of a window; 0: there are none.
        patch: pixels along a side of a patch.
        whole: of a picture, or a tile, where all have one size; None: each has its own.
        tiles: that pictures are cut into; None: none.
    """

    kind: str
    token: int
    merged: int
    window: int = 0
    patch: int = 1
    whole: ImageSize | None = None
    tiles: TileSizes | None = None

    @property
    def told_by(self) -> str:
        """Return the input that says how large images are; pictures of one size are as many as there are."""
        named = {PATCHES: GRID, PLACED: PLACES, TILES: SIZES, SHAPED: MASK}
        return named.get(self.kind, PIXELS if self.whole is not None else SIZES)

    def of(self, images: Mapping[str, Any]) -> Iterator[ImageSize]:
        """Give the sizes of a row's images.

        Args:
            images: inputs of the tower, as tensors, arrays or lists; of pictures of one size only the number is asked.
        """
        values = images[self.told_by]
        if self.told_by == PIXELS:
            assert self.whole is not None
            if self.kind == FRAMES and not isinstance(values, range):  # those of zeros only fill a row up
                frames = np.asarray(values)
                values = np.flatnonzero(frames.reshape(-1, *frames.shape[-3:]).any((-3, -2, -1)))
            yield from [self.whole] * len(values)
        elif self.kind in (PLACED, SHAPED):
            marks = np.asarray(values)
            for is_own in marks != 0 if self.kind == SHAPED else (marks != NO_PLACE).all(-1):
                patches = len(is_own)  # those that fill it up are computed, too
                yield ImageSize(patches, int(is_own.sum()) // self.merged**2, patches**2)
        else:
            sizes = np.asarray(values).reshape(-1, 3 if self.kind == PATCHES else 2).tolist()
            for size in sizes:
                yield from self._of_size(size, alone=len(sizes) == 1)

    def pictures_of(self, input_ids: Any) -> range:
        """Return a stand-in for as many pictures of one size as a row's tokens say."""
        assert self.whole is not None
        return range(int((np.asarray(input_ids) == self.token).sum()) // self.whole.tokens)

    def _of_size(self, size: list[int], alone: bool) -> Iterator[ImageSize]:
        """Give the sizes of an image by its frames, rows and columns of patches, or by its height and width."""
        if self.tiles is not None:
            assert self.whole is not None
            height, width = size
            is_cut = alone or self.tiles.most is None
            yield from [self.whole] * (self.tiles.num_tiles((height, width)) if is_cut else 1)
            return
        frames, rows, columns = size if self.kind == PATCHES else (1, *(pixels // self.patch for pixels in size))
        patches = frames * rows * columns
        windows = [
            [min(self.window, n - start) ** 2 for start in range(0, n, self.window or n)] for n in (rows, columns)
        ]
        in_windows = frames * sum(a * b for a, b in product(*windows)) if self.window else 0
        yield ImageSize(patches, patches // self.merged**2, frames * (rows * columns) ** 2, in_windows)


@dataclass(frozen=True, slots=True)
class Rates:
    """`Rates` are the operations of a tower in some passes.

    Args:
        a_patch, a_token: of each patch, and of each token that they become, whatever meets.
        a_pair, in_windows: of each pair of patches, where all meet, and where windows do.
        again: what is computed again counted too, by the rest.
        text: of a token of text in the same passes, without attention; what is computed again included.
    """

    a_patch: float
    a_token: float
    a_pair: float
    in_windows: float
    again: float
    text: float

    def of(self, sizes: Iterable[ImageSize]) -> float:
        """Count the operations of some images."""
        return sum(
            self.a_patch * size.patches
            + self.a_token * size.tokens
            + self.a_pair * size.pairs
            + self.in_windows * size.in_windows
            for size in sizes
        )


@dataclass(frozen=True, slots=True)
class TextRates:
    """`TextRates` are the operations of a token of text, whatever it attends to.

    Args:
        forward: of a forward pass.
        training: of forward and backward.
        again: of what is computed again in backward.
    """

    forward: float
    training: float
    again: float = 0.0


@dataclass(frozen=True, slots=True)
class Towers:
    """`Towers` are what a model computes for images.

    Args:
        sizes: reads them.
        learning: forward and backward.
        looking: forward only.
    """

    sizes: ImageSizes
    learning: Rates
    looking: Rates = field(repr=False)

    def tokens(self, images: Mapping[str, Any], learns: bool = True) -> float:
        """Return the tower tokens of a row's images; 0 where it has none, or none that can be read as such.

        Args:
            images: inputs of the tower, among others.
            learns: in training; else in a forward pass.
        """
        if images.get(self.sizes.told_by) is None:
            return 0.0
        rates = self.learning if learns else self.looking
        try:
            return rates.of(self.sizes.of(images)) * rates.again / rates.text
        except (TypeError, ValueError, IndexError):  # the step that has the row says what is wrong with it
            return 0.0

    def flops(self, tokens: Iterable[float]) -> float:
        """Count the operations, forward and backward, of images with so many tower tokens in training."""
        return sum(tokens) * self.learning.text / self.learning.again


def towers_of(model: Any, text: TextRates) -> Towers:
    """Count what a model of transformers computes for images, with the adapters that it has.

    Args:
        model: of a type that `families.KINDS` has, on any device, with weights that are whole.
        text: operations of a token of text; whether layers are computed again, it says for those of the tower, too.

    Raises:
        ValueError: one whose towers are not counted.
    """
    if (kind := model.config.model_type) in UNCOUNTED:
        raise ValueError(f"towers of type {kind!r} are not counted")
    vision = model.config.vision_config
    num_all, num_in_windows = _num_layers(vision)
    weights = dict(_weights(model))
    towers = [p for p, joins in weights.items() if not joins]
    joining = [p for p, joins in weights.items() if joins]
    learns = any(p.requires_grad for p in towers)
    pair = 4.0 * _width(vision) * (3 if learns else 1)
    forward = Rates(
        a_patch=2.0 * sum(p.numel() for p in towers),
        a_token=2.0 * sum(p.numel() for p in joining),
        a_pair=4.0 * _width(vision) * num_all,
        in_windows=4.0 * _width(vision) * num_in_windows,
        again=1.0,
        text=text.forward,
    )
    a_patch = _training(towers, learns)
    learning = Rates(
        a_patch=a_patch,
        a_token=_training(joining, learns or any(p.requires_grad for p in joining)),
        a_pair=pair * num_all,
        in_windows=pair * num_in_windows,
        # a tower that learns nothing keeps nothing, and computes nothing again
        again=1 + forward.a_patch / a_patch if learns and text.again else 1.0,
        text=text.training + text.again,
    )
    return Towers(_sizes(model.config), learning, forward)


def _training(weights: Iterable[torch.Tensor], goes_back: bool) -> float:
    """Count the operations of weights, forward, and backward where that goes through them."""
    return float(sum(2 * (1 + goes_back + p.requires_grad) * p.numel() for p in weights))


def _weights(model: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Give the weights of towers, and whether tokens, not patches, are multiplied with them."""
    for name, module in model.named_modules():
        is_seen = any(part in name for part in ("vis", *JOINING)) and not any(part in name for part in OF_TEXT)
        if not is_seen or (isinstance(module, torch.nn.Embedding) and not any(part in name for part in JOINING)):
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and not any(part in own for part in LOOKED_UP):
                yield weight, any(part in name for part in JOINING)


def _num_layers(vision: Any) -> tuple[int, int]:
    """Count the layers of a tower in which patches meet all of their image, and their window only."""
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    if not getattr(vision, "window_size", None):
        return layers, 0
    of_all = len(vision.fullatt_block_indexes)
    return of_all, layers - of_all


def _width(vision: Any) -> int:
    """Count the numbers of a patch's query in a layer."""
    heads = getattr(vision, "num_attention_heads", None) or vision.num_heads
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden size is that of text
    return heads * (getattr(vision, "head_dim", None) or hidden // heads)


def _sizes(config: Any) -> ImageSizes:
    """Return how images of a model say their sizes."""
    vision, kind, token = config.vision_config, KINDS[config.model_type], config.image_token_id
    if kind == PATCHES:
        window, merged = (getattr(vision, "window_size", None) or 0) // side_of(vision.patch_size), merged_side(config)
        return ImageSizes(kind, token, merged, window - window % merged)
    if kind in (PLACED, SHAPED):
        return ImageSizes(kind, token, merged_side(config))
    if vision.model_type == "pixtral":
        return ImageSizes(kind, token, getattr(config, "spatial_merge_size", 1), patch=vision.patch_size)
    patches = whole_patches(config)
    whole = ImageSize(patches, whole_tokens(config), patches**2)
    tiles = sizes_of(config, kind) if kind == TILES else None
    return ImageSizes(kind, token, 1, whole=whole, tiles=tiles if isinstance(tiles, TileSizes) else None)
