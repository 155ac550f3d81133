"""A sample is what is trained on: the tokens of a row, or of a stretch of one, and what each of them has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_hetero.errors import BadSample
from hf_hetero.images.pictures import Seen
from hf_hetero.model.loss import IGNORE_INDEX, shift_labels

Example = Mapping[str, Any]
LOSS_WEIGHTS = "loss_weights"
"""What the loss of each token is multiplied by, among the inputs of the model, which hands it to its loss."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A `Sample` is ready to be packed. Each of its tensors has one entry a token, shape (num_tokens, ...).

    Its images have not, so they stay whole.

    Args:
        input_ids: tokens.
        labels: what each token is, where it is to be predicted; None where the sample has no labels.
        positions: given by the row, shape (num_tokens,), or made of it and its images, (num_tokens, 3); None: they
            count from 0.
        inputs: what else the model takes of each token.
        weights: what else there is of each label: `LOSS_WEIGHTS`, and more for a loss of one's own.
        padding: for a model that numbers positions from one after its padding token, and leaves padding tokens out,
            that token; None: they count from 0.
        aligned: a label is the target of its own token, and not of the one before it.
        scored: place of the token whose score is that of the whole sample; None: there is none.
        seen: its images; None: it has none.
        mutual: stretches whose tokens look at each other: the first token of each, and its end.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    padding: int | None = None
    aligned: bool = False
    scored: int | None = None
    seen: Seen | None = None
    mutual: tuple[tuple[int, int], ...] = ()

    @property
    def targets(self) -> torch.Tensor:
        """Return the label after each token, the last of which has nothing to predict; or else each token's own."""
        if self.labels is None:
            return torch.full_like(self.input_ids, IGNORE_INDEX)
        return self.labels if self.aligned else shift_labels(self.labels)

    def of_targets(self, name: str) -> torch.Tensor:
        """Return one of its weights beside the token that is to predict the label. Shape (num_tokens, ...)."""
        values = self.weights[name]
        if self.aligned:
            return values
        moved = values.roll(-1, dims=0)
        moved[-1] = 0
        return moved

    @property
    def num_positions(self) -> int:
        """Return one more than its last position, counted from 0."""
        return len(self.input_ids) if self.positions is None else int(self.positions.max()) + 1

    def fingerprint(self) -> int:
        """Hash all that is its own into 63 bits, which a signed tensor of 64 carries."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.input_ids, self.labels, self.positions, *self.inputs.values(), *self.weights.values()):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
        for picture in self.seen.pictures if self.seen is not None else ():
            for tensor in picture.inputs.values():  # as bytes, because numpy has no bf16
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return int.from_bytes(digest.digest(), "big") >> 1

    def part(self, start: int, end: int, name: str = "A row") -> Sample:
        """Cut out a stretch, as a sample of its own.

        Args:
            start, end: of its tokens.
            name: of its row, for messages.

        Raises:
            BadSample: it has images, and the stretch is not all of it.
        """
        if (start, end) == (0, len(self.input_ids)):
            return self
        if self.seen is not None:
            raise BadSample(
                f"{name} has images, and only tokens {start} to {end} of {len(self.input_ids)} are to be a sample. "
                "Rows with images stay whole: do not pack them, and raise HeteroConfig.max_sample_tokens."
            )
        stretch = slice(start, end)
        return Sample(
            self.input_ids[stretch],
            None if self.labels is None else self.labels[stretch],
            None if self.positions is None else self.positions[stretch],
            {name: values[stretch] for name, values in self.inputs.items()},
            {name: values[stretch] for name, values in self.weights.items()},
            self.padding,
            self.aligned,
            mutual=tuple((max(a, start) - start, min(b, end) - start) for a, b in self.mutual if a < end and b > start),
        )

    def position_ids(self, start: int, end: int) -> torch.Tensor:
        """Return the positions of a span. Shape (end - start,), or (end - start, 3)."""
        if self.positions is not None:
            return self.positions[start:end]
        if self.padding is None:
            return torch.arange(start, end)
        is_token = (self.input_ids != self.padding).long()
        return (is_token.cumsum(0) * is_token + self.padding)[start:end]
