"""Tokens of every sample: read from a column, or counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_hetero.errors import BadSample

Lengths = NDArray[np.int64]


def read_lengths(dataset: Any, column: str) -> Lengths:
    """Tokens of each row of a map-style dataset. int64, shape (num_rows,).

    A column of lengths is taken as it is. Otherwise `input_ids` are counted, or the ones in `attention_mask` where rows
    are padded: in a `datasets.Dataset` without decoding the tokens, elsewhere row by row under a progress bar.

    Raises:
        BadSample: rows without `input_ids`, or an empty sample, with its row.
    """
    if isinstance(dataset, datasets.Dataset):
        lengths = _of_table(dataset, column)
    else:
        rows = (_of_row(dataset[row], row) for row in range(len(dataset)))
        counted = tqdm(rows, total=len(dataset), desc="Counting tokens", unit=" samples", leave=False)
        lengths = np.fromiter(counted, dtype=np.int64, count=len(dataset))
    if lengths.size and lengths.min() < 1:
        row = int(lengths.argmin())
        raise BadSample(f"Row {row} has {lengths[row]} tokens. Filter empty samples out of the dataset.")
    return lengths


def _of_table(dataset: datasets.Dataset, column: str) -> Lengths:
    names: list[str] = dataset.column_names
    if column in names:
        return np.asarray(dataset.with_format(None)[column], dtype=np.int64)
    if "input_ids" not in names:
        raise BadSample(f"The dataset has no input_ids, only {names}. Tokenise it first.")
    counted = "attention_mask" if "attention_mask" in names else "input_ids"
    arrow: Any = dataset.select_columns([counted]).with_format("arrow")
    tables: Iterable[Any] = arrow.iter(batch_size=1000)
    parts = [
        _of_lists(table.column(counted), counted)
        for table in tqdm(tables, total=-(-len(dataset) // 1000), desc="Counting tokens", leave=False)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _of_lists(column: Any, name: str) -> Lengths:
    if name == "attention_mask":
        return np.asarray([sum(mask) for mask in column.to_pylist()], dtype=np.int64)
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]).astype(np.int64)


def _of_row(example: Mapping[str, Sequence[int]], row: int) -> int:
    if "input_ids" not in example:
        raise BadSample(f"Row {row} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
    mask = example.get("attention_mask")
    return len(example["input_ids"]) if mask is None else int(sum(mask))
