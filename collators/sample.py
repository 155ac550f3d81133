"""This module reads a row of a dataset as what is trained on: its tokens without padding, and what each of them has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_hetero.collators.limits import check_whole_numbers
from hf_hetero.errors import BadSample
from hf_hetero.model.loss import IGNORE_INDEX, shift_labels
from hf_hetero.samples.rows import nested

Example = Mapping[str, Any]
NUMBERS = ("input_ids", "labels", "position_ids")
"""Columns that must hold whole numbers."""
LOSS_WEIGHTS = "loss_weights"
"""What the loss of each token is multiplied by, among the inputs of the model, which hands it to its loss."""
SEEN = (
    "pixel_",
    "image",
    "video",
    "audio",
    "speech",
    "input_features",
    "input_values",
    "aspect_ratio",
    "flattened_patches",
)
"""How inputs begin that are made of images, videos and sounds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A `Sample` is ready to be packed. Each of its tensors has one entry a token, shape (num_tokens, ...).

    Args:
        input_ids: tokens.
        labels: what each token is, where it is to be predicted; None where the sample has no labels.
        positions: given by the row; None: they count from 0.
        inputs: what else the model takes of each token.
        weights: what else there is of each label: `LOSS_WEIGHTS`, and more for a loss of one's own.
        padding: for a model that numbers positions from one after its padding token, and leaves padding tokens out,
            that token; None: they count from 0.
        aligned: a label is the target of its own token, and not of the one before it.
        scored: place of the token whose score is that of the whole sample; None: there is none.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    padding: int | None = None
    aligned: bool = False
    scored: int | None = None

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
        return int.from_bytes(digest.digest(), "big") >> 1

    def part(self, start: int, end: int) -> Sample:
        """Cut out a stretch, as a sample of its own."""
        stretch = slice(start, end)
        return Sample(
            self.input_ids[stretch],
            None if self.labels is None else self.labels[stretch],
            None if self.positions is None else self.positions[stretch],
            {name: values[stretch] for name, values in self.inputs.items()},
            {name: values[stretch] for name, values in self.weights.items()},
            self.padding,
            self.aligned,
        )

    def position_ids(self, start: int, end: int) -> torch.Tensor:
        """Return the positions of a span. Shape (end - start,)."""
        if self.positions is not None:
            return self.positions[start:end]
        if self.padding is None:
            return torch.arange(start, end)
        is_token = (self.input_ids != self.padding).long()
        return (is_token.cumsum(0) * is_token + self.padding)[start:end]


@dataclass(frozen=True, slots=True)
class Row:
    """A `Row` holds what a row of a dataset has of each of its tokens.

    Args:
        values: by name, without `attention_mask`; each of shape (num_tokens, ...).
        unpadded: where in the row these tokens are; around them is padding.
        is_masked: whether the row had an attention mask.
    """

    values: dict[str, torch.Tensor]
    unpadded: slice
    is_masked: bool

    def positions(self, is_packed: bool, name: str) -> torch.Tensor | None:
        """Return the positions of its tokens, if they are not simply 0, 1, 2, ...

        Args:
            is_packed: its documents are known.
            name: of the row, for messages.

        Raises:
            BadSample: transformers would take it for several documents.
        """
        if "position_ids" not in self.values:
            # as in stock, where padding on the left takes the first positions
            start, stop = self.unpadded.start or 0, self.unpadded.stop
            return torch.arange(start, stop) if start and not is_packed else None
        positions = self.values["position_ids"].long()
        steps = positions.diff()
        if not is_packed and bool((steps < 0).any()):
            raise BadSample(
                f"{name} was packed: its position_ids start anew within it. Give the dataset a seq_lengths column "
                "with the tokens of each document, as TRL's packing does, or do not pack: steps are packed anyway."
            )
        if not is_packed and not self.is_masked and bool((steps != 1).any()):
            raise BadSample(
                f"{name}: its position_ids skip some, which transformers takes for the start of another document "
                "where there is no attention_mask. Give the row an attention_mask of ones if it is one sample."
            )
        return positions


def read_row(example: Example, model_inputs: frozenset[str], name: str) -> Row:
    """Read a row's values, without its padding.

    Args:
        example: with `input_ids`.
        model_inputs: what the model takes beside them.
        name: of the row, for messages.

    Raises:
        BadSample: something cannot be shared out token by token, or is not what a row may hold.
    """
    input_ids = torch.as_tensor(example["input_ids"])
    if input_ids.ndim != 1:
        raise nested(name)
    per_token = {key: _per_token(values, len(input_ids)) for key, values in example.items()}
    values = {key: tensor for key, tensor in per_token.items() if tensor is not None}
    _check_carried(example, values, model_inputs, name)
    mask = values.pop("attention_mask", None)
    check_whole_numbers({key: values[key] for key in NUMBERS if key in values}, name)
    unpadded = _without_padding(mask, name)
    _check_padding_labels(mask, values.get("labels"), name)
    return Row({key: tensor[unpadded] for key, tensor in values.items()}, unpadded, mask is not None)


def _check_carried(
    example: Example, per_token: Mapping[str, torch.Tensor], model_inputs: frozenset[str], name: str
) -> None:
    """Refuse what a rank that holds a part of the row could not be given its part of."""
    num_tokens = len(per_token["input_ids"])
    refuse_seen(example, model_inputs, name)
    if example.get("labels") is not None and "labels" not in per_token:
        raise BadSample(
            f"{name} has {num_tokens} input_ids but {torch.as_tensor(example['labels']).numel()} labels. Give "
            f"every token a label; {IGNORE_INDEX} marks those not to learn from."
        )
    for key in sorted((model_inputs & set(example)) - set(per_token)):
        if example[key] is not None:
            raise BadSample(
                f"{name}: {key} is an input of the model and does not have one value for each of the {num_tokens} "
                "tokens, so it cannot be shared out with them. Remove it, or train with plain Trainer."
            )


def weights_of(example: Example, column: str, name: str) -> torch.Tensor:
    """Return the factors of a row's loss: a number for all of its tokens, shape (), or one for each, (num_tokens,).

    Args:
        example: a row of the dataset.
        column: that has them.
        name: of the row, for messages.

    Raises:
        BadSample: it has none, or they are no finite numbers.
    """
    if (values := example.get(column)) is None:
        raise BadSample(
            f"{name} has no {column}, only {sorted(example)}. Give each row its weight, or a weight for each of its "
            "tokens, or remove HeteroConfig.weight_column."
        )
    try:
        weights = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadSample(f"{name}: {column} is {values!r:.60}, and weights are numbers.") from error
    if weights.ndim > 1 or not bool(weights.isfinite().all()):
        raise BadSample(
            f"{name}: {column} is {values!r:.60}. It must be a finite number, or one for each token of the row."
        )
    return weights


def refuse_seen(example: Example, model_inputs: frozenset[str], name: str) -> None:
    """Refuse what a model sees or hears beside its text, however long it is.

    Raises:
        BadSample: it names the row and the key.
    """
    for key in sorted(model_inputs & set(example)):
        values = example[key]
        if key.startswith(SEEN) and values is not None and (not hasattr(values, "__len__") or len(values)):
            raise BadSample(
                f"{name} has {key}: images, videos and sounds cannot be shared out among ranks yet, only text. Leave "
                "such rows out of the dataset, or train with plain Trainer."
            )


def has_rows(values: Any) -> bool:
    """Tell whether a collator's value is of a batch with one row."""
    return isinstance(values, torch.Tensor | Sequence | np.ndarray) and len(values) == 1


def _per_token(values: Any, num_tokens: int) -> torch.Tensor | None:
    """Return a tensor with one entry a token; None for anything else."""
    if values is None or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        return None
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):  # text, or lists of unlike lengths
        return None
    return tensor if tensor.ndim and len(tensor) == num_tokens else None


def _without_padding(mask: torch.Tensor | None, name: str) -> slice:
    """Find the tokens of a padded row."""
    if mask is None:
        return slice(None)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BadSample(
            f"{name} was packed: its attention_mask numbers its documents. Give the dataset a seq_lengths column with "
            "the tokens of each document instead."
        )
    tokens = torch.nonzero(mask).flatten()
    if not len(tokens):
        return slice(0, 0)
    first, last = int(tokens[0]), int(tokens[-1])
    if last - first + 1 != len(tokens):  # a slice cannot leave them out, and packed attention would see them
        raise BadSample(
            f"{name} has holes in its attention_mask: only padding at its ends can be left out. Remove the masked "
            "tokens from the row, or train with plain Trainer."
        )
    return slice(first, last + 1)


def _check_padding_labels(mask: torch.Tensor | None, labels: torch.Tensor | None, name: str) -> None:
    """Refuse labels on padding, which is left out here: Trainer's loss would learn it."""
    if mask is None or labels is None:
        return
    labels = labels if labels.ndim == 1 else labels[:, 0]  # a label may be several numbers
    if bool((learnt := (mask == 0) & (labels != IGNORE_INDEX)).any()):
        place = int(torch.nonzero(learnt)[0])
        raise BadSample(
            f"{name} has the label {int(labels[place])} at token {place}, which its attention_mask says is padding: "
            f"Trainer would learn it. Give padding the label {IGNORE_INDEX}, or leave it out: no padding is needed."
        )
