"""This module fingerprints what the rows of a dataset hold, to know the data again when a run is resumed."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from hf_hetero.data.lengths import raw_rows

NUM_ROWS = 64
"""Rows that are looked at, spread over the dataset."""
MOST_S = 1.0
"""Where rows are made as they are read, as many are read as this gives time for."""
LEARNT_COLUMNS = ("input_ids", "labels")
"""The columns that learning depends on; a row without the first is told by all of its columns."""


def contents_of(dataset: Any, num_rows: int, columns: Sequence[str] = LEARNT_COLUMNS) -> dict[str, int]:
    """Return checksums of some rows of a map-style dataset, by row; none of a row that is another at each reading.

    Reading them leaves no trace in the random states.

    Args:
        dataset: map-style.
        num_rows: of the dataset.
        columns: that learning depends on.
    """
    rows = sorted({int(row) for row in np.linspace(0, num_rows - 1, min(num_rows, NUM_ROWS))})
    if (raw := raw_rows(dataset, rows, columns)) is not None:
        return {str(row): checksum_of([example], columns=columns) for row, example in zip(rows, raw, strict=True)}
    random.Random(0).shuffle(rows)  # as many as there is time for are spread, too
    checksums: dict[str, int] = {}
    end = time.monotonic() + MOST_S
    with random_states_kept(), suppress(Exception):  # the step that needs a row says why it cannot be read
        for row in rows:
            if time.monotonic() > end:
                break
            # augmentation draws anew at each reading: such a row would differ in a resumed run whose data are the same
            first, second = (checksum_of([dataset[row]], columns=columns) for _ in range(2))
            if first == second:
                checksums[str(row)] = first
    return checksums


def learnt_columns(weight_column: str | None) -> tuple[str, ...]:
    """Return the columns that learning depends on, where one weighs the loss, or none does."""
    return LEARNT_COLUMNS if weight_column is None else (*LEARNT_COLUMNS, weight_column)


def checksum_of(examples: Sequence[Mapping[str, Any]], before: int = 0, columns: Sequence[str] = LEARNT_COLUMNS) -> int:
    """Return a 32-bit checksum of what is learnt, whatever holds it; of all columns where there are no tokens.

    Args:
        examples: rows.
        before: checksum of the rows before them.
        columns: that learning depends on; the first is of tokens.
    """
    for example in examples:
        is_tokenised = columns[0] in example
        names = [name for name in columns if name in example] if is_tokenised else sorted(example)
        for name in names:
            before = zlib.crc32(_bytes_of(example[name]), zlib.crc32(name.encode(), before))
    return before


def _bytes_of(value: Any) -> bytes:
    """Return the same bytes for equal values, whether a list, an array or a tensor holds them."""
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of other lengths
        return repr(value).encode()
    # in one type, because the same tokens are int64 in a list and maybe int32 in a table, and weights fp32 in a tensor
    kinds = {"i": np.int64, "u": np.int64, "b": np.int64, "f": np.float32}
    if (kind := kinds.get(numbers.dtype.kind)) is None:
        return repr(numbers.shape).encode() + repr(value).encode()
    return repr(numbers.shape).encode() + numbers.astype(kind).tobytes()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states at the end: what is drawn meanwhile is drawn again after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
