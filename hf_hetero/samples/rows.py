"""This module looks at one row, as it is read: how many tokens it has, and whether it can be a sample at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_hetero.errors import BadSample

PACKED_COLUMN = "seq_lengths"
"""Tokens of each document of a packed row, as TRL's packing leaves them."""


def tokens_of_row(example: Mapping[str, Any], row: int) -> int:
    """Return the tokens of one example that are not padding.

    Raises:
        BadSample: no `input_ids`, or nested ones, with its row.
    """
    if "input_ids" not in example:
        raise BadSample(f"Row {row} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
    ids, mask = example["input_ids"], example.get("attention_mask")
    if is_nested(ids):
        raise nested(f"Row {row}")
    return len(ids) if mask is None else int(np.count_nonzero(as_array(mask)))


def as_array(values: Any) -> NDArray[Any]:
    """Return lists, arrays, and tensors wherever they lie, as an array."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def documents_of_row(example: Mapping[str, Any]) -> list[int] | None:
    """Return the tokens of each document of a packed row; None: it was not packed."""
    return list(map(int, example[PACKED_COLUMN])) if PACKED_COLUMN in example else None


def last_token(ids: Sequence[int], pad_token_id: int | None) -> int:
    """Return the place of the token whose score is that of its sequence: the last one that is no padding.

    As transformers finds it, which takes an end of text for padding where both are the same token.

    Args:
        ids: of a sequence; of one of padding alone it is the first.
        pad_token_id: of the model; None: no token is padding.
    """
    return max((place for place, token in enumerate(ids) if token != pad_token_id), default=0)


def is_nested(ids: Any) -> bool:
    """Return whether tokens are not simply one after the other: lists of lists, arrays of other than one dimension."""
    if hasattr(ids, "ndim"):
        return ids.ndim != 1
    # a list may hold tensors of no dimension, which have a `__len__` that raises
    return (
        len(ids) > 0 and hasattr(ids[0], "__len__") and not isinstance(ids[0], str) and getattr(ids[0], "ndim", 1) > 0
    )


def nested(name: str) -> BadSample:
    """Say what is wrong with a row that is a batch of rows."""
    return BadSample(
        f"{name}: input_ids is nested, a batch of rows where one row of tokens is needed, shape (num_tokens,). "
        "Keep its first entry, or tokenise each row without return_tensors."
    )


def checked(lengths: NDArray[np.int64], first: int = 0) -> NDArray[np.int64]:
    """Return the same lengths, if each row has a token.

    Args:
        lengths: tokens of rows that follow one another, shape (num_rows,).
        first: number of the first of them.

    Raises:
        BadSample: an empty sample, with its row.
    """
    if lengths.size and lengths.min() < 1:
        row = int(lengths.argmin())
        raise BadSample(f"Row {first + row} has {lengths[row]} tokens. Filter empty samples out of the dataset.")
    return lengths
