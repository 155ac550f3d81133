"""This module says which samples rows hold: usually one each; several where rows were packed, or are too long.

A step draws rows, as Trainer would. The planner shares out samples: stretches of a row that attend to nothing outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hf_hetero.errors import BadSample

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """`Samples` are stretches of rows, as arrays of int64.

    Args:
        row_tokens: tokens of each row, shape (num_rows,).
        first: number of the first sample of each row, and at the end the number of samples, shape (num_rows + 1,).
        starts: position in its row at which each sample starts, shape (num_samples,).
        lengths: its tokens, shape (num_samples,).
        tower_tokens: what its images take, in tokens of text, as float64 of shape (num_samples,); None: there are none,
            or nobody knows.
    """

    row_tokens: Integers
    first: Integers
    starts: Integers
    lengths: Integers
    tower_tokens: Floats | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row_tokens)

    def fingerprint(self) -> str:
        """Return a fingerprint, which is the same for the same samples, whatever a model makes of their images."""
        content = hashlib.sha256()
        for values in (self.row_tokens, self.first, self.starts, self.lengths):
            content.update(np.ascontiguousarray(values, dtype=np.int64).tobytes())
        return content.hexdigest()[:16]

    def of(self, rows: Sequence[int]) -> Drawn:
        """Return the samples of some rows, row by row."""
        picked = np.asarray(rows, dtype=np.int64)
        counts = self.first[picked + 1] - self.first[picked]
        # all at once, for a batch may have many rows: numbers of one row's samples are its first one and what follows
        before = np.cumsum(counts) - counts
        numbers = np.arange(counts.sum()) + np.repeat(self.first[picked] - before, counts)
        row_of = np.repeat(picked, counts)
        return Drawn(
            rows=tuple(row_of.tolist()),
            starts=tuple(self.starts[numbers].tolist()),
            lengths=tuple(self.lengths[numbers].tolist()),
            row_tokens=tuple(self.row_tokens[row_of].tolist()),
            tower_tokens=() if self.tower_tokens is None else tuple(self.tower_tokens[numbers].tolist()),
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """`Drawn` are the samples of a step: for each, its row, where it starts there, its tokens, and the row's tokens.

    `tower_tokens` are as in `Samples`; () where there are none. Beside plans nothing depends on them, so that they are
    no part of what a step is told by.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    row_tokens: tuple[int, ...]
    tower_tokens: tuple[float, ...] = field(default=(), repr=False)

    @property
    def num_rows(self) -> int:
        """Return how many rows were drawn; a row that a sampler draws twice counts twice."""
        return sum(start == 0 for start in self.starts)  # a row's first sample starts with it

    def kept_starts(self) -> tuple[int, ...]:
        """Return where each sample starts among the tokens of its row that are in any sample: others were cut off."""
        # samples of a row stand in its order, so that each starts where those before it end
        ends: dict[int, int] = {}
        starts: list[int] = []
        for row, length in zip(self.rows, self.lengths, strict=True):
            starts.append(ends.get(row, 0))
            ends[row] = starts[-1] + length
        return tuple(starts)


def whole_rows(lengths: Integers | Sequence[int]) -> Samples:
    """Return samples of which each is a whole row."""
    tokens = np.asarray(lengths, dtype=np.int64)
    return Samples(tokens, np.arange(len(tokens) + 1), np.zeros_like(tokens), tokens)


def packed_rows(row_tokens: Integers, num_documents: Integers, document_tokens: Integers) -> Samples:
    """Return the samples of rows that were packed: each of their documents is one.

    Args:
        row_tokens: shape (num_rows,).
        num_documents: of each row, shape (num_rows,).
        document_tokens: of all documents, row by row.

    Raises:
        BadSample: a row whose documents are not all of it.
    """
    # documents are counted through the whole dataset, and so are their tokens: a row's are differences of these sums
    first = np.concatenate([[0], np.cumsum(num_documents)])
    ends = np.concatenate([[0], np.cumsum(document_tokens)])
    for row in np.flatnonzero(ends[first[1:]] - ends[first[:-1]] != row_tokens)[:1]:
        raise BadSample(
            f"Row {row} has {row_tokens[row]} tokens, but its seq_lengths add up to "
            f"{ends[first[row + 1]] - ends[first[row]]}. Pack again, or remove the seq_lengths column."
        )
    if len(document_tokens) and document_tokens.min() < 1:
        row = int(np.searchsorted(first, document_tokens.argmin(), side="right")) - 1
        raise BadSample(f"Row {row}: seq_lengths holds a document of {document_tokens.min()} tokens.")
    return Samples(row_tokens, first, ends[:-1] - np.repeat(ends[first[:-1]], num_documents), document_tokens)


def samples_of(
    lengths: Integers, documents: Sequence[Sequence[int] | None] | None, tower_tokens: Floats | None = None
) -> Samples:
    """Return the samples of rows of so many tokens.

    Args:
        lengths: tokens of each row, shape (num_rows,).
        documents: tokens of the documents of each row; None: a row is one.
        tower_tokens: of the images of each row, shape (num_rows,); None: it has none, or nobody knows.

    Raises:
        BadSample: a row whose documents are not all of it.
    """
    if documents is None or not any(row is not None for row in documents):
        # a dataset without images carries nothing
        towers = tower_tokens if tower_tokens is not None and tower_tokens.any() else None
        return replace(whole_rows(lengths), tower_tokens=towers)
    by_row = [[int(length)] if row is None else list(row) for row, length in zip(documents, lengths, strict=True)]
    num_documents = np.fromiter(map(len, by_row), dtype=np.int64, count=len(by_row))
    return packed_rows(lengths, num_documents, np.asarray([n for row in by_row for n in row], dtype=np.int64))


def limited(samples: Samples, most_tokens: int, policy: str) -> tuple[Samples, str]:
    """Return samples of at most so many tokens, and in words what was done about longer ones; "" if none were.

    Args:
        samples: of the dataset.
        most_tokens: a sample may have.
        policy: "error"; "truncate" drops the rest of a sample; "split" makes several samples of it.

    Raises:
        BadSample: under "error", with the number of longer samples and the longest one's row.
    """
    longer = np.flatnonzero(samples.lengths > most_tokens)
    if not len(longer):
        return samples, ""
    what = f"{len(longer)} of {len(samples.lengths)} samples have more than {most_tokens} tokens"
    if policy == "error":
        longest = int(samples.lengths.argmax())
        row = int(np.searchsorted(samples.first, longest, side="right")) - 1
        raise BadSample(
            f"{what}; the longest, in row {row}, has {samples.lengths[longest]}. Raise HeteroConfig.max_sample_tokens, "
            "or say what to do with them: longer_samples='truncate' or 'split'."
        )
    if policy == "truncate":
        cut = int((samples.lengths[longer] - most_tokens).sum())
        return replace(samples, lengths=np.minimum(samples.lengths, most_tokens)), f"{what}; {cut} tokens are cut off."
    # each sample in as few parts as do, all full but its last; `offset` is where a part starts in its sample
    parts = -(-samples.lengths // most_tokens)
    before = np.concatenate([[0], np.cumsum(parts)])
    offset = (np.arange(before[-1]) - np.repeat(before[:-1], parts)) * most_tokens
    lengths = np.minimum(np.repeat(samples.lengths, parts) - offset, most_tokens)
    towers = None if samples.tower_tokens is None else np.repeat(samples.tower_tokens / parts, parts)
    starts = np.repeat(samples.starts, parts) + offset
    split = Samples(samples.row_tokens, before[samples.first], starts, lengths, towers)
    return split, f"{what} and are split into {int(parts[longer].sum())}; no token sees across a cut."
