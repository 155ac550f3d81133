"""A fingerprint of what the rows of a dataset hold, to know the data again when a run is resumed."""

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
"""Where reading a row is work that takes long, as many as this gives time for."""
NAMES = ("input_ids", "labels")


def contents_of(dataset: Any, num_rows: int) -> dict[str, int]:
    """Checksums of some rows of a map-style dataset, by row; none of a row that is another at each reading.

    Reading them leaves no trace in the random states.
    """
    rows = sorted({int(row) for row in np.linspace(0, num_rows - 1, min(num_rows, NUM_ROWS))})
    if (raw := raw_rows(dataset, rows, NAMES)) is not None:
        return {str(row): checksum_of([example]) for row, example in zip(rows, raw, strict=True)}
    random.Random(0).shuffle(rows)  # as many as there is time for are spread, too
    found: dict[str, int] = {}
    end = time.monotonic() + MOST_S
    with random_states_kept(), suppress(Exception):  # the step that needs a row says why it cannot be read
        for row in rows:
            if time.monotonic() > end:
                break
            first, second = (checksum_of([dataset[row]]) for _ in range(2))
            if first == second:
                found[str(row)] = first
    return found


def checksum_of(examples: Sequence[Mapping[str, Any]], before: int = 0) -> int:
    """32-bit checksum of tokens and labels, whatever holds them; of all columns where there are no tokens.

    Args:
        examples: rows.
        before: checksum of the rows before them.
    """
    for example in examples:
        names = [name for name in NAMES if name in example] if NAMES[0] in example else sorted(example)
        for name in names:
            before = zlib.crc32(_bytes_of(example[name]), zlib.crc32(name.encode(), before))
    return before


def _bytes_of(value: Any) -> bytes:
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of other lengths
        return repr(value).encode()
    whole = numbers.dtype.kind in "iub"
    return repr(numbers.shape).encode() + (numbers.astype(np.int64).tobytes() if whole else repr(value).encode())


@contextmanager
def random_states_kept() -> Iterator[None]:
    """What is drawn meanwhile is drawn again after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
