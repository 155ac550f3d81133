"""This module checks a table of rows to fine-tune on, measures its samples, and cuts them to a limit."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning.tokens import PAIR
from hf_hetero.samples.rows import PACKED_COLUMN

if TYPE_CHECKING:
    import datasets


def check_columns(
    data: datasets.Dataset, tokenizer: Any, text_column: str, assistant_only: bool, name: str, split: str
) -> None:
    """Refuse data without rows, without a column to train on, or without what the columns there need.

    Args:
        data: rows as `tokenise` takes them.
        tokenizer, text_column, assistant_only: as `tokenise` takes them.
        name, split: of the dataset, for errors.

    Raises:
        HeteroError: it says what is missing, and what to set instead.
    """
    columns = set(data.column_names)
    if not len(data):
        raise HeteroError(f"dataset={name!r} has no rows in its split {split!r}.")
    if not {"input_ids", "messages", text_column} & columns and not columns >= set(PAIR):
        raise HeteroError(
            f"dataset={name!r} has no 'input_ids', 'messages' or {text_column!r} column, only "
            f"{data.column_names}, and no 'prompt' with its 'completion'. Name the column of plain text: text_column."
        )
    if "input_ids" in columns:
        chats = "assistant_masks" in columns
    else:
        # one row tells, because a column is of one type
        pairs_of_chats = columns >= set(PAIR) and isinstance(data.with_format(None)[0]["prompt"], list)
        chats = "messages" in columns or pairs_of_chats
        if chats and tokenizer.chat_template is None:
            raise HeteroError(
                f"dataset={name!r} holds chats, and the tokenizer has no chat template. Name a tokenizer that "
                "has one, or give it one: a file chat_template.jinja in its folder."
            )
    if assistant_only and not chats:
        raise HeteroError(
            f"assistant_only_loss={assistant_only}, but dataset={name!r} has no 'messages' and no "
            f"'assistant_masks', only {data.column_names}. Give it one of them, or leave assistant_only_loss out."
        )


def sample_lengths(data: datasets.Dataset) -> list[list[int]]:
    """Return the tokens of each row's samples: its documents where rows are packed, else itself."""
    return data[PACKED_COLUMN][:] if PACKED_COLUMN in data.column_names else [[tokens] for tokens in data["length"][:]]


def truncate(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Keep the first `limit` tokens of a sample, or of each document of a packed row; count what is left."""
    parts = row.get(PACKED_COLUMN) or [row["length"]]
    spans = [(end - part, end - part + min(part, limit)) for part, end in zip(parts, accumulate(parts), strict=True)]
    names = [name for name in ("input_ids", "labels") if name in row]
    columns = {name: [x for start, end in spans for x in row[name][start:end]] for name in names}
    if PACKED_COLUMN in row:
        columns[PACKED_COLUMN] = [end - start for start, end in spans]
    return {**columns, "length": len(columns["input_ids"])}
