"""Rotary positions of a sample with images have three parts, time, row and column, and are made of the whole sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_hetero.errors import BadSample

KINDS = "mm_token_type_ids"
"""What says of each token whether it is text (0) or of an image (1), as processors of transformers give it."""


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """`RotaryPositions` makes the positions of a sample as its model would make them, were it alone.

    Args:
        shell: a model of the same class without weights, which is asked for them.
    """

    shell: Any = field(compare=False)  # made anew for each run

    def of(
        self, input_ids: torch.Tensor, tokens: Mapping[str, torch.Tensor], images: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """Return the positions of a sample with images. int64, shape (num_tokens, 3).

        Args:
            input_ids: shape (num_tokens,).
            tokens: what else there is of each token.
            images: inputs of the tower, of all images of the sample.
            name: of the row, for messages.

        Raises:
            BadSample: the row does not say which tokens are of images.
        """
        if KINDS not in tokens:
            raise BadSample(
                f"{name} has images and no {KINDS}, without which the model does not know where they are. Keep what "
                "the processor returns under that name (return_mm_token_type_ids=True)."
            )
        grids = {key: values for key, values in images.items() if key != "pixel_values"}
        positions, _ = self.shell.get_rope_index(input_ids[None], mm_token_type_ids=tokens[KINDS][None], **grids)
        return positions[:, 0].T.contiguous()
