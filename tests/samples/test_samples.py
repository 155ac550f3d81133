"""Rows hold samples: one, several packed ones, or parts of one that is too long; no token is lost without a word."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_hetero.data.lengths import read_samples
from hf_hetero.errors import BadSample
from hf_hetero.samples.samples import Samples, limited, packed_rows, samples_of, whole_rows

PACKED = {"input_ids": [[1, 2, 3, 4, 5], [6], [7, 8, 9]], "seq_lengths": [[2, 3], [1], [1, 1, 1]]}


def drawn(samples: Samples) -> list[tuple[int, int, int]]:
    found = samples.of(range(len(samples)))
    return list(zip(found.rows, found.starts, found.lengths, strict=True))


def test_whole_rows() -> None:
    """Usually each row is one sample; rows come in the order asked for."""
    found = whole_rows([5, 2, 9]).of([2, 0])
    assert (found.rows, found.starts, found.lengths, found.row_tokens) == ((2, 0), (0, 0), (9, 5), (9, 5))


@pytest.mark.parametrize("as_table", [True, False])
def test_packed_rows(as_table: bool) -> None:
    """The documents of a packed row are samples of their own."""
    table = datasets.Dataset.from_dict(PACKED)
    samples = read_samples(table if as_table else list(table), "length")
    assert drawn(samples) == [(0, 0, 2), (0, 2, 3), (1, 0, 1), (2, 0, 1), (2, 1, 1), (2, 2, 1)]
    assert len(samples) == 3


@pytest.mark.parametrize(
    ("documents", "message"),
    [([[2, 2], [1], [3]], "Row 0 has 5 tokens, but its seq_lengths add up to 4"), ([[5], [1], [3, 0]], "Row 2")],
)
def test_bad_packing_is_named(documents: Any, message: str) -> None:
    """Documents that are not all of their row are an error that names it."""
    with pytest.raises(BadSample, match=message):
        read_samples(datasets.Dataset.from_dict({**PACKED, "seq_lengths": documents}), "length")


def test_error_names_the_longest() -> None:
    """Longer samples are refused with their number, the longest one's row, and the remedies."""
    with pytest.raises(BadSample, match=r"2 of 3 samples have more than 4 tokens; the longest, in row 1, has 9.*split"):
        limited(whole_rows([5, 9, 4]), 4, "error")


def test_truncate_says_how_much() -> None:
    """The rest of a longer sample is dropped, and counted."""
    samples, said = limited(whole_rows([5, 9, 4]), 4, "truncate")
    assert drawn(samples) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert said == "2 of 3 samples have more than 4 tokens; 6 tokens are cut off."


def test_split_keeps_each_token() -> None:
    """A longer sample becomes several, one after the other; also inside a packed row."""
    samples, said = limited(whole_rows([5, 9, 4]), 4, "split")
    assert drawn(samples) == [(0, 0, 4), (0, 4, 1), (1, 0, 4), (1, 4, 4), (1, 8, 1), (2, 0, 4)]
    assert said.startswith("2 of 3 samples have more than 4 tokens and are split into 5")
    packed, _ = limited(read_samples(datasets.Dataset.from_dict(PACKED), "length"), 2, "split")
    assert drawn(packed)[:4] == [(0, 0, 2), (0, 2, 2), (0, 4, 1), (1, 0, 1)]


def test_nothing_to_say() -> None:
    """Where no sample is longer, nothing changes."""
    samples = whole_rows([3, 4])
    assert limited(samples, 4, "error") == (samples, "")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(2, 20))
def test_split_covers_rows_once(lengths: list[int], most: int) -> None:
    """Whatever the lengths, the parts of a row follow one another and end where it ends."""
    samples, _ = limited(whole_rows(lengths), most, "split")
    ends = [0] * len(lengths)
    for row, start, length in drawn(samples):
        assert start == ends[row]
        assert 1 <= length <= most
        ends[row] += length
    assert ends == lengths
    assert np.diff(samples.first).sum() == len(samples.lengths)


def test_starts_among_kept_tokens() -> None:
    """Tokens that were cut off leave no gap in a row's outputs."""
    samples, _ = limited(packed_rows(np.array([9, 4]), np.array([3, 1]), np.array([4, 2, 3, 4])), 3, "truncate")
    drawn = samples.of([1, 0])
    assert drawn.starts == (0, 0, 4, 6)
    assert drawn.lengths == (3, 3, 2, 3)
    assert drawn.kept_starts() == (0, 0, 3, 5)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_drawing_is_row_by_row(documents: list[list[int]], data: st.DataObject) -> None:
    """Any rows, in any order, also twice: the samples of each, in their order, with the tokens of the whole row."""
    tokens = np.asarray([sum(row) for row in documents])
    samples = packed_rows(tokens, np.asarray([len(row) for row in documents]), np.concatenate(documents))
    rows = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=6))
    found = samples.of(rows)
    expected = [
        (row, sum(documents[row][:number]), length, sum(documents[row]))
        for row in rows
        for number, length in enumerate(documents[row])
    ]
    assert list(zip(found.rows, found.starts, found.lengths, found.row_tokens, strict=True)) == expected
    assert all(type(value) is int for value in (*found.rows, *found.starts, *found.lengths, *found.row_tokens))


def test_rows_that_were_drawn() -> None:
    """A row with several samples counts once, and one that is drawn again counts again."""
    samples = packed_rows(np.array([4, 5]), np.array([1, 2]), np.array([4, 3, 2]))
    assert samples.of([0, 1]).num_rows == 2
    assert samples.of([1, 0, 1, 1]).num_rows == 4


def test_tower_tokens_go_with_their_samples() -> None:
    """Drawn in the order asked for; parts of a row that is split have them together; rows without images none."""
    lengths, towers = np.asarray([5, 2, 9]), np.asarray([0.0, 7.5, 9.0])
    samples = samples_of(lengths, None, towers)
    assert samples.of([2, 0, 1]).tower_tokens == (9.0, 0.0, 7.5)
    assert samples.fingerprint() == whole_rows(lengths).fingerprint()
    split, _ = limited(samples, 4, "split")
    assert split.of([0, 1, 2]).tower_tokens == (0.0, 0.0, 7.5, 3.0, 3.0, 3.0)
    cut, _ = limited(samples, 4, "truncate")
    assert cut.of([2]).tower_tokens == (9.0,)
    assert samples_of(lengths, None, np.zeros(3)).of([0]).tower_tokens == whole_rows(lengths).of([0]).tower_tokens == ()
