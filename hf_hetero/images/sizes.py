"""How many tokens pictures of sizes of their own become, as their models have it.

Pictures of a tower that takes any size become their patches, merged. Of a model that takes tiles a picture becomes
itself as a whole, small, and then its tiles side by side, without what only fills them up, and a token that ends each
row of them (LLaVA-NeXT, arXiv:2407.07895). LLaVA-OneVision (arXiv:2408.03326) shrinks what would be more than a number
of tiles, and takes no tiles of pictures that their row has several of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SIZES = "image_sizes"
"""Heights and widths of pictures, in pixels."""
NUMBERS = "batch_num_images"
"""How many pictures each row of a batch has, where that decides what they become."""
SHRINKS = 1.1  # how much more than the most it may be along a side


@dataclass(frozen=True, slots=True)
class PixelSizes:
    """`PixelSizes` are of pictures whose patches are tokens.

    Args:
        side: pixels along a side of what becomes one token.
    """

    side: int

    def tokens(self, sizes: Sequence[tuple[int, int]], alone: bool = True) -> list[int]:
        """Return the tokens of each picture.

        Args:
            sizes: heights and widths.
            alone: the row has no other picture; here that decides nothing.
        """
        del alone
        return [(height // self.side) * (width // self.side) for height, width in sizes]


@dataclass(frozen=True, slots=True)
class TileSizes:
    """`TileSizes` are of pictures that are cut into tiles.

    Args:
        side: pixels along a side of a tile.
        patches: of a tile, along a side.
        pinpoints: heights and widths that tiles may fill together.
        most: tiles that have all their patches; what would be more is shrunk. None: all have.
    """

    side: int
    patches: int
    pinpoints: tuple[tuple[int, int], ...]
    most: int | None = None

    def tokens(self, sizes: Sequence[tuple[int, int]], alone: bool = True) -> list[int]:
        """Return the tokens of each picture.

        Args:
            sizes: heights and widths.
            alone: the row has no other picture, where that decides whether pictures are cut into tiles.
        """
        if self.most is not None and not alone:
            return [self.patches**2 + 1] * len(sizes)
        return [self._of(size) for size in sizes]

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Count the tiles of a picture, itself as a whole included, as its model counts them."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(list(size), [list(pinpoint) for pinpoint in self.pinpoints], self.side)

    def _of(self, size: tuple[int, int]) -> int:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        rows, columns = get_anyres_image_grid_shape(size, [list(pinpoint) for pinpoint in self.pinpoints], self.side)
        grid = torch.empty(1, rows * self.patches, columns * self.patches, device="meta")
        _, height, width = unpad_image(grid, size).shape
        if self.most is not None:
            ratio = math.sqrt(height * width / (self.most * self.patches**2))
            if ratio > SHRINKS:
                height, width = int(height // ratio), int(width // ratio)
        return self.patches**2 + height * (width + 1)
