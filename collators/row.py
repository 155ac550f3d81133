"""A row of a dataset is read by token: what each token has, without padding, and what is refused of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_hetero.collators.limits import check_whole_numbers
from hf_hetero.collators.sample import Example
from hf_hetero.errors import BadSample
from hf_hetero.model.loss import IGNORE_INDEX, carried_weights
from hf_hetero.samples.rows import nested

NUMBERS = ("input_ids", "labels", "position_ids")
"""Columns that must hold whole numbers."""
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


def read_row(example: Example, model_inputs: frozenset[str], name: str, blind: str = "") -> Row:
    """Read a row's values, without its padding.

    Args:
        example: with `input_ids`, and without the images that its model can be given.
        model_inputs: what the model takes beside them.
        name: of the row, for messages.
        blind: why there can be no images, in words.

    Raises:
        BadSample: something cannot be shared out token by token, or is not what a row may hold.
    """
    example = with_targets(example, name)
    input_ids = torch.as_tensor(example["input_ids"])
    if input_ids.ndim != 1:
        raise nested(name)
    per_token = {key: _per_token(values, len(input_ids)) for key, values in example.items()}
    values = {key: tensor for key, tensor in per_token.items() if tensor is not None}
    _check_carried(example, values, model_inputs, name, blind)
    mask = values.pop("attention_mask", None)
    check_whole_numbers({key: values[key] for key in NUMBERS if key in values}, name)
    unpadded = _without_padding(mask, name)
    _check_padding_labels(mask, values.get("labels"), name)
    return Row({key: tensor[unpadded] for key, tensor in values.items()}, unpadded, mask is not None)


def _check_carried(
    example: Example, per_token: Mapping[str, torch.Tensor], model_inputs: frozenset[str], name: str, blind: str
) -> None:
    """Refuse what a rank that holds a part of the row could not be given its part of."""
    num_tokens = len(per_token["input_ids"])
    refuse_seen(example, model_inputs, name, blind)
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


def of_each_token(weights: torch.Tensor, row: Row, num_in_row: int, name: str, column: str) -> torch.Tensor:
    """Return the weight of each token of a row that is no padding, as it travels. Shape (num_tokens,).

    Args:
        weights: of the row, or of each of its tokens, those of padding too.
        row: without padding.
        num_in_row: tokens of the row with its padding.
        name, column: of the row, and of the weights in it, for messages.

    Raises:
        BadSample: there is another number of weights than of tokens.
    """
    if weights.ndim == 0:
        return carried_weights(weights.repeat(len(row.values["input_ids"])))
    if len(weights) != num_in_row:
        raise BadSample(
            f"{name} has {len(weights)} {column} and {num_in_row} input_ids. Give each token a weight, or the row one "
            "number."
        )
    return carried_weights(weights[row.unpadded])


def source_of(example: Example, column: str, name: str) -> str:
    """Return where a row says that it is from, as text.

    Args:
        example: a row of the dataset.
        column: that says it.
        name: of the row, for messages.

    Raises:
        BadSample: it says nothing, or more than a name or a number.
    """
    source = example.get(column)
    if isinstance(source, bool) or not isinstance(source, str | int):
        raise BadSample(
            f"{name}: {column} is {source!r:.60}, and a source is a name or a whole number. Give each row one, or "
            "remove HeteroConfig.source_column."
        )
    return str(source)


def refuse_seen(example: Example, model_inputs: frozenset[str], name: str, blind: str = "") -> None:
    """Refuse what a model sees or hears beside its text, however long it is.

    Args:
        example: without the images that its model can be given.
        model_inputs: what the model takes beside its tokens.
        name: of the row, for messages.
        blind: why there can be no images, in words.

    Raises:
        BadSample: it names the row and the key.
    """
    for key in sorted(model_inputs & set(example)):
        values = example[key]
        if key.startswith(SEEN) and values is not None and (not hasattr(values, "__len__") or len(values)):
            raise BadSample(
                f"{name} has {key}: images, videos and sounds cannot be shared out among ranks yet, only text"
                f"{blind and f' ({blind})'}. Leave such rows out of the dataset, or train with plain Trainer."
            )


def with_targets(example: Example, name: str) -> dict[str, Any]:
    """Return a row with labels made of its targets (`shift_labels`), where it has some: a model looks at these first.

    Raises:
        BadSample: the last token has a target, which no token of the row is.
    """
    known = dict(example)
    if (targets := known.pop("shift_labels", None)) is None:
        return known
    targets = torch.as_tensor(targets)
    if targets.numel() and int(targets[-1]) != IGNORE_INDEX:
        raise BadSample(
            f"{name}: the last of its shift_labels is {int(targets[-1])}, and no token follows that it could be the "
            f"target of. Give the last one the label {IGNORE_INDEX}, or let the collator make labels only."
        )
    return {**known, "labels": torch.cat([targets.new_full((1,), IGNORE_INDEX), targets[:-1]])}


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
