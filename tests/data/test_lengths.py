"""Tokens are counted right, whatever the dataset looks like."""

from __future__ import annotations

import errno
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from hf_hetero.data import lengths
from hf_hetero.data.lengths import read_lengths
from hf_hetero.errors import BadSample

ROWS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def test_column_is_taken_as_it_is() -> None:
    """A length column is believed; nothing is counted."""
    dataset = datasets.Dataset.from_dict({"input_ids": ROWS, "length": [9, 8, 7, 6], "tokens": [1, 2, 3, 4]})
    assert read_lengths(dataset, "length").tolist() == [9, 8, 7, 6]
    assert read_lengths(dataset, "tokens").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["table", "shuffled", "sliced", "torch", "list"])
def test_counted(form: str) -> None:
    """Without a column, input_ids are counted: in tables, views of tables, formatted tables, and plain lists."""
    dataset: Any = datasets.Dataset.from_dict({"input_ids": ROWS})
    expected = [3, 1, 2, 4]
    if form == "shuffled":
        dataset, expected = dataset.select([2, 0, 3]), [2, 3, 4]
    if form == "sliced":
        dataset, expected = dataset.select(range(1, 3)), [1, 2]
    if form == "torch":
        dataset = dataset.with_format("torch")
    if form == "list":
        dataset = [{"input_ids": row} for row in ROWS]
    assert read_lengths(dataset, "length").tolist() == expected


@pytest.mark.parametrize("as_table", [True, False])
def test_padding_does_not_count(as_table: bool) -> None:
    """Where rows are padded, the attention mask tells what is trained on."""
    rows: Any = {"input_ids": [[1, 2, 0], [3, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]]}
    table = datasets.Dataset.from_dict(rows)
    assert read_lengths(table if as_table else table.to_list(), "length").tolist() == [2, 1]


@pytest.mark.parametrize("as_table", [True, False])
def test_bad_rows_are_named(as_table: bool) -> None:
    """An empty sample, or a dataset without tokens, is refused with its row or columns."""
    table = datasets.Dataset.from_dict({"input_ids": [[1], [], [2]]})
    with pytest.raises(BadSample, match="Row 1 has 0 tokens"):
        read_lengths(table if as_table else table.to_list(), "length")
    text = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(BadSample, match="no input_ids"):
        read_lengths(text if as_table else text.to_list(), "length")


def test_empty_dataset() -> None:
    """No rows, no lengths."""
    assert read_lengths([], "length").tolist() == []


def test_whole_numbers_of_another_type() -> None:
    """Whole numbers that a file made floats, or unsigned ones, are still lengths."""
    for values in ([3.0, 4.0], np.asarray([3, 4], dtype=np.uint16)):
        lengths = read_lengths(datasets.Dataset.from_dict({"length": values}), "length")
        assert (lengths.tolist(), lengths.dtype) == ([3, 4], np.int64)


@pytest.mark.parametrize("value", [2.5, "12", True, None, float("inf")])
def test_what_is_no_length(value: Any) -> None:
    """Anything but a whole number in a length column is refused with its row, never rounded."""
    values = [value if type(value) in (str, bool) else 1.0, value]
    with pytest.raises(BadSample, match=rf"Row [01]: length is {value!r}; it must be a whole number"):
        read_lengths(datasets.Dataset.from_dict({"length": values}), "length")


def test_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are kept under the table's fingerprint: read back, made again if spoilt, never taken for another's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lengths, "WORTH_KEEPING", 3)
    counts: list[int] = []
    of_lists = lengths._of_lists

    def counting(column: Any, name: str) -> Any:
        counts.append(1)
        return of_lists(column, name)

    monkeypatch.setattr(lengths, "_of_lists", counting)
    table = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 4)]})
    for _ in range(2):
        assert read_lengths(table, "length").tolist() == [3, 1, 4]
    assert len(counts) == 1
    [kept] = (tmp_path / "hf_hetero").iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])
    assert read_lengths(table, "length").tolist() == [3, 1, 4]
    assert len(counts) == 2
    masked = table.add_column("attention_mask", [[1] * n for n in (2, 1, 1)])
    assert read_lengths(masked, "length").tolist() == [2, 1, 1]
    assert read_lengths(table.select([2, 0, 1]), "length").tolist() == [4, 3, 1]
    assert len(list((tmp_path / "hf_hetero").iterdir())) == 3


def spoilt(whole: bytes) -> dict[str, bytes]:
    """What a cut write, another writer or a bad disk may leave of a cache file."""
    archive = io.BytesIO()
    np.savez(archive, np.arange(3))
    return {
        "empty": b"",
        "cut in its header": whole[:50],
        "cut in its numbers": whole[:-3],
        "longer": whole[:128] + bytes(8),
        "zeros": whole[:128] + bytes(len(whole) - 128),
        "text": b"lengths",
        "an archive": archive.getvalue(),
        "half an archive": archive.getvalue()[:50],
        "a huge shape": whole.replace(b"(3,), }            ", b"(9999999999999,), }"),
        "a header that is none": whole[:10] + b"{'descr':}" + whole[20:],
        "code": b"\x93NUMPY\x01\x00" + pickle.dumps([1, 2, 3]),
        "objects": saved_array(np.asarray([3, 1, 4], dtype=object)),
        "another shape": saved_array(np.asarray([[3, 1, 4]])),
        "another type": saved_array(np.asarray([3.0, 1.0, 4.0])),
    }


def saved_array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def test_a_spoilt_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies there instead of counts costs a second count, runs no code, and is whole afterwards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lengths, "WORTH_KEEPING", 1)
    table = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 4)]})
    read_lengths(table, "length")
    [kept] = (tmp_path / "hf_hetero").iterdir()
    whole = kept.read_bytes()
    for name, content in spoilt(whole).items():
        assert content != whole, name
        kept.write_bytes(content)
        assert read_lengths(table, "length").tolist() == [3, 1, 4], name
        assert kept.read_bytes() == whole, name


def test_a_cut_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while counts are kept is left as it was."""

    def full(file: Any, values: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lengths, "WORTH_KEEPING", 1)
    monkeypatch.setattr(lengths.np, "save", full)
    assert read_lengths(datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), "length").tolist() == [2]
    assert list((tmp_path / "hf_hetero").iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": ["abc"]}, "input_ids are of type string, not lists"),
        ({"input_ids": [["a"]]}, r"input_ids are of type .*string.*, not lists of numbers"),
        ({"input_ids": [[1, 2]], "attention_mask": [["a", "b"]]}, r"attention_mask are of type .*string"),
        ({"input_ids": [[1, 2]], "attention_mask": ["ab"]}, "attention_mask are of type string"),
        ({"input_ids": [[1, 2]], "attention_mask": [[[1], [1]]]}, "attention_mask are of type"),
        ({"input_ids": [[1, 2]], "attention_mask": [None]}, "attention_mask are of type null"),
        ({"length": [[3], [4, 5]]}, r"Row 0: length is \[3\]"),
    ],
)
def test_columns_of_another_kind(columns: dict[str, Any], message: str) -> None:
    """What holds no numbers is named by its type, whatever it is."""
    with pytest.raises(BadSample, match=message):
        read_lengths(datasets.Dataset.from_dict(columns), "length")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting goes on without it."""
    (tmp_path / "hf_hetero").write_text("a file where the folder would be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(lengths, "WORTH_KEEPING", 1)
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    assert read_lengths(table, "length").tolist() == [2]


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view", "large_list_view", "fixed"])
def test_every_kind_of_list(kind: str) -> None:
    """Lists of any arrow type are counted, and so are masks of them, in a slice and with a hole in it as well."""
    of = pa.list_(pa.int64(), 3) if kind == "fixed" else getattr(pa, kind)(pa.int64())
    lists = pa.chunked_array([pa.array([[9, 9, 9], [1, 1, 0], None, [0, 0, 1]], type=of).slice(1)])
    assert lengths._of_lists(lists, "input_ids").tolist() == [3, 0, 3]
    assert lengths._of_lists(lists, "attention_mask").tolist() == [2, 0, 1]


def test_tables_of_rows_of_one_length() -> None:
    """So are tables of fixed-size lists, which `datasets` makes of packed data, and of large ones."""
    kinds = [datasets.List(datasets.Value("int32"), length=3), datasets.LargeList(datasets.Value("int32"))]
    for kind in kinds:
        dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4}, features=datasets.Features(input_ids=kind))
        assert read_lengths(dataset.select([1, 2]), "length").tolist() == [3, 3]


def test_a_transform_decides_what_is_read() -> None:
    """Of a table with a transform of the user's, rows are counted as they are read, not as they lie in it."""
    texts = datasets.Dataset.from_dict({"text": ["a b", "c", "d e f"]})
    tokenising = texts.with_transform(
        lambda batch: {"input_ids": [[*map(ord, text.split())] for text in batch["text"]]}
    )
    assert read_lengths(tokenising, "length").tolist() == [2, 1, 3]
    table = datasets.Dataset.from_dict({"input_ids": ROWS, "length": [3, 1, 2, 4]})
    shortening = table.with_transform(lambda batch: {"input_ids": [row[:2] for row in batch["input_ids"]]})
    assert read_lengths(shortening, "length").tolist() == [2, 1, 2, 2]


@pytest.mark.parametrize("form", ["lists", "tensors", "arrays", "table"])
def test_a_batch_is_no_row(form: str) -> None:
    """A row of shape (1, num_tokens) is refused by name, never counted as one token."""
    make: Any = {"tensors": torch.tensor, "arrays": np.asarray}.get(form, list)
    rows = [{"input_ids": make([[1, 2, 3]]), "attention_mask": make([[1, 1, 1]])}] * 2
    dataset: Any = datasets.Dataset.from_list(rows) if form == "table" else rows
    with pytest.raises(BadSample, match="Row 0: input_ids is nested"):
        read_lengths(dataset, "length")
    assert read_lengths([{"input_ids": make([1, 2, 3])}], "length").tolist() == [3]


def test_input_ids_that_are_no_lists() -> None:
    """A column of another type is refused with that type."""
    with pytest.raises(BadSample, match="of type string, not lists of tokens"):
        read_lengths(datasets.Dataset.from_dict({"input_ids": ["a", "b"]}), "length")


def test_a_long_column_is_read_at_once() -> None:
    """A column of lengths costs no Python object a row, shuffled or not: no more than the array that is returned."""
    dataset = datasets.Dataset.from_dict({"length": np.arange(1, 200_001)}).shuffle(seed=0)
    tracemalloc.start()
    try:
        found = read_lengths(dataset, "length")
        _, most = tracemalloc.get_traced_memory()
        assert most < 2 * found.nbytes
        tracemalloc.reset_peak()
        listed = dataset[:]["length"]
        assert tracemalloc.get_traced_memory()[1] > 4 * found.nbytes  # as many objects as rows would be seen
    finally:
        tracemalloc.stop()
    assert listed[-5:] == found[-5:].tolist()
    assert found[:5].tolist() == dataset[:5]["length"]
