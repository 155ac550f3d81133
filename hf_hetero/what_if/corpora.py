"""This module opens datasets from wherever a user has them, and counts the tokens of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.progress import progress
from hf_hetero.what_if.mixes import Lengths

ROWS_AT_ONCE = 1000


def open_table(where: str, file_format: str | None, split: str, config: str | None = None) -> datasets.Dataset:
    """Open the dataset that a file, a folder of `save_to_disk`, or a hub name holds.

    Args:
        where: path or name.
        file_format: of a file, as `datasets` calls it; None for a folder or a name.
        split: of a dataset that has several.
        config: of a hub dataset that has several.

    Raises:
        ConfigError: no such thing, or no such split, with what `datasets` said.
    """
    try:
        if file_format is not None:
            return datasets.load_dataset(file_format, data_files=where, split=split)
        if not Path(where).is_dir():
            return datasets.load_dataset(where, config, split=split)
        on_disk = datasets.load_from_disk(where)
    except Exception as error:  # `datasets`, pyarrow and the hub's client raise errors of a dozen kinds
        raise ConfigError(f"Cannot load the dataset {where!r}, split {split!r}: {said_in_a_line(error)}") from error
    if isinstance(on_disk, datasets.Dataset):  # saved without splits
        return on_disk
    if split not in on_disk:
        raise ConfigError(f"The dataset {where!r} has no split {split!r}, only {', '.join(map(str, on_disk))}.")
    return on_disk[split]


def tokenised_lengths(dataset: datasets.Dataset, column: str, tokenizer: str) -> Lengths:
    """Count the tokens of each row's text, special tokens included, under a progress bar. int64, shape (num_rows,).

    Args:
        dataset: with that column.
        column: of texts, or of chats (lists of messages), which go through the chat template.
        tokenizer: folder or hub name.

    Raises:
        ConfigError: no such tokenizer, or one without a chat template.
        BadSample: a row without text, with its row.
    """
    from transformers import AutoTokenizer

    try:
        # said outright, because transformers would ask at the terminal
        tokens: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:  # `transformers` and the hub's client raise errors of many kinds
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"The tokenizer {tokenizer!r} brings code of its own, which is not run. Count its tokens yourself and "
                "name their column (--length-column)."
            ) from error
        raise ConfigError(f"Cannot load the tokenizer {tokenizer!r}: {said_in_a_line(error)}") from error
    texts, counted = dataset.select_columns([column]).with_format(None), list[int]()
    with progress(len(texts), "Counting tokens", "samples") as count:
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows: list[Any] = texts[start : start + ROWS_AT_ONCE][column]
            if (empty := next((row for row, text in enumerate(rows) if not text), None)) is not None:
                raise BadSample(f"Row {start + empty} has no {column}. Filter empty samples out of the dataset.")
            if not isinstance(rows[0], str | list):  # a column is of one type
                raise BadSample(f"Row {start}: {column} is {rows[0]!r:.60}; it must be text, or a list of messages.")
            if not isinstance(rows[0], str) and tokens.chat_template is None:
                raise ConfigError(f"The tokenizer {tokenizer!r} has no chat template to count {column!r} with.")
            try:
                if isinstance(rows[0], str):
                    encoded = tokens(rows, verbose=False)
                else:
                    encoded = tokens.apply_chat_template(rows, tokenize=True, return_dict=True)
            except Exception as error:  # of the template, too
                raise BadSample(
                    f"Rows {start} to {start + len(rows) - 1}: {column} cannot be tokenised: {said_in_a_line(error)}"
                ) from error
            counted += [len(ids) for ids in encoded["input_ids"]]
            count(len(rows))
    return np.asarray(counted, dtype=np.int64)


def said_in_a_line(error: Exception) -> str:
    """Return the first line of what a library said, or the kind of its error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
