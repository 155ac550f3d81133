"""This module counts what a row holds, before it is planned: tokens, and what a tower computes for its images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.images.sight import PIXELS, all_inputs
from hf_hetero.samples.rows import tokens_of_row


class RowCount(NamedTuple):
    """A `RowCount` is what a row holds.

    Args:
        tokens: of the sample that is made of it.
        tower_tokens: of its images, in the passes that its collator's rows are for.
    """

    tokens: int
    tower_tokens: float = 0.0


def count_row(collate: Callable[..., Any], example: Any, row: int) -> RowCount:
    """Count what a collator makes of a row.

    Raises:
        BadSample: a row that cannot be a sample.
    """
    if not isinstance(collate, PackedCollator):
        return RowCount(tokens_of_row(example, row))
    if collate.example_collator is not None and ("input_ids" in example or collate.makes_tokens):
        sample = collate.sample(example, f"Row {row}")
        images = {} if sample.seen is None else all_inputs(sample.seen)
        return RowCount(sample.input_ids.numel(), tower_tokens(collate, images))
    # images that lie in a row as they are given to the tower are not made tensors of: it is their sizes that count
    return RowCount(tokens_of_row(example, row), tower_tokens(collate, example))


def tower_tokens(collate: PackedCollator, images: Mapping[str, Any]) -> float:
    """Return the tower tokens of a row's images; 0 where there are none, or the model sees none."""
    return 0.0 if collate.towers is None else collate.towers.tokens(images, learns=collate.needs_labels)


def column_of_sizes(collate: Callable[..., Any], columns: Collection[str]) -> str | None:
    """Return the column of a table of images that tells their sizes; None where there is none, or no image.

    Pixels are not looked at: pictures of one size are counted by the tokens that they become.
    """
    if not isinstance(collate, PackedCollator) or collate.towers is None or PIXELS not in columns:
        return None
    told_by = collate.towers.sizes.told_by
    column = "input_ids" if told_by == PIXELS else told_by
    return column if column in columns else None


def stored_tower_tokens(collate: Callable[..., Any], values: Sequence[Any]) -> list[float]:
    """Return the tower tokens of rows by what `column_of_sizes` holds of each; None: no image."""
    assert isinstance(collate, PackedCollator)
    assert collate.towers is not None
    sizes = collate.towers.sizes
    stored = map(sizes.pictures_of, values) if sizes.told_by == PIXELS else values
    return [tower_tokens(collate, {sizes.told_by: images}) for images in stored]
