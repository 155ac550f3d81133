"""Data are known again by what their rows hold, in whatever holds them; data that change at each reading are not."""

from __future__ import annotations

import random
import time
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hf_hetero.data.contents import NUM_ROWS, checksum_of, contents_of, learnt_columns

ROWS = [{"input_ids": [3 + n, 5, 6], "labels": [-100, 5, 6 + n % 2], "source": f"page {n}"} for n in range(20)]


class Dataset:
    """Rows of any kind, made anew when they are read."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> Any:
        return self.make(ROWS[row])


WEIGHED = [{**row, "importance": 0.1 * n, "spans": [0.5, n / 3, 1.0]} for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("column", ["importance", "spans"])
def test_weights_are_learnt(column: str) -> None:
    """Another weight is other data, where the loss is weighed by that column; and the same in whatever holds it."""
    columns = learnt_columns(column)
    other = [{**row} for row in WEIGHED]
    other[3][column] = 7.0 if column == "importance" else [0.5, 7.0, 1.0]
    table = datasets.Dataset.from_list(WEIGHED)
    same = contents_of(WEIGHED, 20, columns)
    tensors = [{name: torch.tensor(row[name]) for name in columns} for row in WEIGHED]
    for data in (table, table.with_format("torch"), tensors):
        assert contents_of(data, 20, columns) == same
    found = contents_of(datasets.Dataset.from_list(other), 20, columns)
    assert [row for row in same if found[row] != same[row]] == ["3"]
    assert contents_of(other, 20) == contents_of(WEIGHED, 20) == contents_of(ROWS, 20)
    assert checksum_of(other, columns=columns) != checksum_of(WEIGHED, columns=columns)


def held(make: Any) -> dict[str, int]:
    return contents_of(Dataset(make), len(ROWS))


def test_the_same_in_whatever_holds_them() -> None:
    """A list, a table under any format, arrays, tensors: the same tokens, the same fingerprint."""
    table = datasets.Dataset.from_list(ROWS)
    found = [
        contents_of(ROWS, len(ROWS)),
        contents_of(table, len(ROWS)),
        contents_of(table.with_format("torch"), len(ROWS)),
        contents_of(table.remove_columns("source"), len(ROWS)),
        held(lambda row: {name: np.asarray(row[name], dtype=np.int32) for name in ("input_ids", "labels")}),
        held(lambda row: {name: torch.tensor(row[name]) for name in ("labels", "input_ids")}),
    ]
    assert set(found[0]) == set(map(str, range(20)))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(("row", "name", "at"), [(0, "input_ids", 0), (19, "labels", 2), (7, "labels", 0)])
def test_other_rows(row: int, name: str, at: int) -> None:
    """One other token or label, in data of the same lengths."""
    other = [{key: list(one[key]) for key in ("input_ids", "labels")} for one in ROWS]
    other[row][name][at] = 50
    for data in (other, datasets.Dataset.from_list(other)):
        found, same = contents_of(data, 20), contents_of(ROWS, 20)
        assert [n for n in same if found[n] != same[n]] == [str(row)]


def test_text_that_is_tokenised_when_read() -> None:
    """Without tokens in the table, what is stored counts."""
    texts = [datasets.Dataset.from_dict({"text": ["a b", word]}) for word in ("c d", "c d", "d c")]
    for table in texts:
        table.set_transform(lambda batch: {"input_ids": [[1, 2]] * len(batch["text"])})
    same, again, other = (contents_of(table, 2) for table in texts)
    assert same == again != other


def test_rows_that_cannot_be_read() -> None:
    """Whoever needs the row will say so."""

    def broken(row: Any) -> Any:
        raise OSError("gone")

    assert held(broken) == {}


def test_random_rows_tell_nothing() -> None:
    """Rows that are others at each reading have no checksum, and reading them draws nothing from anyone."""

    def drawn(row: Any) -> Any:
        return {"input_ids": [random.random(), np.random.rand(), float(torch.rand(()))], "labels": row["labels"]}

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert held(drawn) == {}
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_few_rows_are_read() -> None:
    """However large the data, and the first and the last row among them."""

    class Large:
        def __getitem__(self, row: int) -> Any:
            return ROWS[row % 20]

    found = contents_of(Large(), 10**9)
    assert len(found) == NUM_ROWS
    assert {"0", str(10**9 - 1)} <= set(found)


def test_little_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows take long to read, fewer are; the next time some of the same are."""
    monkeypatch.setattr("hf_hetero.data.contents.MOST_S", 0.05)

    def slow(row: Any) -> Any:
        time.sleep(0.01)
        return row

    first, second = held(slow), held(slow)
    assert 0 < len(first) < 10
    assert first.keys() & second.keys()


def test_rows_one_after_another() -> None:
    """A checksum goes on where another ended."""
    assert checksum_of(ROWS[4:], checksum_of(ROWS[:4])) == checksum_of(ROWS)
