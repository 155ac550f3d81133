"""This module says how many tokens every sample has: it reads a column, or counts once."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_hetero.collators.row_counts import RowCount
from hf_hetero.errors import BadSample
from hf_hetero.progress import each, progress
from hf_hetero.samples.rows import PACKED_COLUMN, checked, documents_of_row, nested, tokens_of_row
from hf_hetero.samples.samples import Samples, samples_of

if TYPE_CHECKING:
    import datasets

Lengths = NDArray[np.int64]

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
WORTH_KEEPING = 10_000
"""Fewer rows are counted in less time than it takes to look."""

Counting = Generator[int, None, Lengths]
"""Gives, after each stretch of work, how many rows it has counted; returns the tokens of all."""


def read_lengths(dataset: Any, column: str) -> Lengths:
    """Return the tokens of each row of a map-style dataset. int64, shape (num_rows,).

    A column of lengths is taken as it is. Otherwise `input_ids` are counted, or the ones in `attention_mask` where rows
    are padded: in a `datasets.Dataset` once, without decoding the tokens, and kept in its cache by its fingerprint;
    elsewhere, and where a table has a transform of the user's, as rows are read, one by one under a progress bar.

    Raises:
        BadSample: rows without `input_ids`, an empty sample, or a length that is no whole number, with its row.
    """
    if is_plain_table(dataset):
        return finished(table_lengths(dataset, column), len(dataset))
    rows = each(range(len(dataset)), "Counting tokens", "samples")
    return checked(np.fromiter((tokens_of_row(dataset[row], row) for row in rows), np.int64, len(dataset)))


def read_samples(dataset: Any, column: str, count: Callable[[Any, int], RowCount] | None = None) -> Samples:
    """Return the samples of a map-style dataset: its rows, or the documents of packed rows (`seq_lengths`, of TRL).

    Args:
        dataset: map-style; a list of examples is one.
        column: of lengths, where it is a table.
        count: what an example, and its row, holds, where that is not simply its `input_ids`.

    Raises:
        BadSample: as `read_lengths`; or a row whose documents are not all of it.
    """
    if is_plain_table(dataset) and count is None:
        return samples_of(read_lengths(dataset, column), table_documents(dataset))
    rows = [dataset[row] for row in range(len(dataset))]
    counts = [
        RowCount(tokens_of_row(example, row)) if count is None else count(example, row)
        for row, example in enumerate(rows)
    ]
    lengths = np.asarray([one.tokens for one in counts], dtype=np.int64)
    towers = np.asarray([one.tower_tokens for one in counts], dtype=np.float64)
    return samples_of(checked(lengths), [documents_of_row(example) for example in rows], towers)


def is_table(dataset: Any) -> bool:
    """Return whether a dataset is a `datasets.Dataset`."""
    return _is_a("Dataset", dataset)


def is_plain_table(dataset: Any) -> bool:
    """Return whether a table gives what lies in it: a transform of the user's may make anything of a row."""
    return is_table(dataset) and dataset.format["type"] != "custom"


def _is_a(kind: str, dataset: Any) -> bool:
    """Return whether a dataset is of a class of `datasets`. Whoever has one has imported that package already."""
    found = getattr(sys.modules.get("datasets"), kind, None)
    return isinstance(found, type) and isinstance(dataset, found)


def fingerprint(dataset: datasets.Dataset) -> str:
    """Return what is the same for a table made by the same steps; tables that differ in it may hold the same rows."""
    return str(dataset._fingerprint)  # pyright: ignore[reportPrivateUsage]


def gives_tokens(dataset: Any) -> bool:
    """Return whether rows are read with `input_ids`. Of what is no plain table the first row is read."""
    if is_plain_table(dataset):
        return "input_ids" in dataset.column_names
    if not hasattr(dataset, "__len__") or not len(dataset):
        return False
    first: Any = dataset[0]
    return isinstance(first, Mapping) and "input_ids" in first


def table_documents(dataset: datasets.Dataset) -> list[list[int]] | None:
    """Return the tokens of each document of a table of packed rows; None: it has no such column."""
    return dataset.with_format(None)[PACKED_COLUMN][:] if PACKED_COLUMN in dataset.column_names else None


def finished(counting: Counting, num_rows: int) -> Lengths:
    """Count to the end, under a progress bar."""
    with progress(num_rows, "Counting tokens", "samples") as count:
        while True:
            try:
                count(next(counting))
            except StopIteration as end:
                return end.value


def table_rows(dataset: datasets.Dataset, column: str) -> Iterator[list[Any]]:
    """Give a column of a table as it is stored, some rows at a time."""
    arrow: Any = dataset.select_columns([column]).with_format("arrow")
    for table in arrow.iter(batch_size=ROWS_AT_ONCE):
        yield table.column(column).to_pylist()


def raw_rows(dataset: Any, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Return rows of a `datasets.Dataset` as they are stored, whatever its format; None for other datasets.

    Args:
        dataset: map-style.
        rows: which.
        names: columns to read; all, where the first of them is not there.
    """
    if not is_table(dataset):
        return None
    if names[0] in dataset.column_names:
        dataset = dataset.select_columns([name for name in names if name in dataset.column_names])
    table: Any = dataset.with_format("arrow")[list(rows)]
    return table.to_pylist()


def tells_where_it_is(dataset: Any) -> bool:
    """Return whether a stream's `state_dict` leads back to the same place.

    One of `datasets` does not where rows wait in a buffer, as they do to be shuffled: it forgets what that holds.
    """
    if not _is_a("IterableDataset", dataset):
        return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    sources: list[Any] = [dataset._ex_iterable]  # pyright: ignore[reportPrivateUsage]
    while sources:
        source = sources.pop()
        if "Buffer" in type(source).__name__:
            return False
        sources += [source.ex_iterable] if hasattr(source, "ex_iterable") else getattr(source, "ex_iterables", [])
    return True


def _whole_numbers(values: Sequence[object], column: str) -> Lengths:
    """Return the values of a column of lengths; refuse what is no whole number."""
    for row, value in enumerate(values):
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not is_whole or abs(value) >= 2**62:  # type: ignore[operator]
            raise BadSample(f"Row {row}: {column} is {value!r}; it must be a whole number of tokens.")
    return np.asarray(values, dtype=np.int64)


def table_lengths(dataset: datasets.Dataset, column: str) -> Counting:
    """Count the tokens of each row of a plain table, stretch by stretch, without decoding them.

    Raises:
        BadSample: as `read_lengths`.
    """
    import datasets  # here, as pyarrow below: only who has a table needs them

    names: list[str] = dataset.column_names
    if column in names:
        return checked(column_of_lengths(dataset, column))
    if "input_ids" not in names:
        raise BadSample(f"The dataset has no input_ids, only {names}. Tokenise it first.")
    counted = "attention_mask" if "attention_mask" in names else "input_ids"
    folder = Path(datasets.config.HF_DATASETS_CACHE)  # pyright: ignore[reportAttributeAccessIssue]
    cache_file = folder / "hf_hetero" / f"{fingerprint(dataset)}-{counted}.npy"
    if (lengths := _cached_lengths(cache_file, len(dataset))) is not None:
        return checked(lengths)
    arrow: Any = dataset.select_columns(list({counted, "input_ids"})).with_format("arrow")
    tables: Iterable[Any] = arrow.iter(batch_size=ROWS_AT_ONCE)
    parts: list[Lengths] = []
    for table in tables:
        if not is_list(kind := table.schema.field("input_ids").type):
            raise BadSample(f"The dataset's input_ids are of type {kind}, not lists of tokens. Tokenise it first.")
        if is_list(kind.value_type):
            raise nested("Row 0")
        for name in dict.fromkeys(("input_ids", counted)):
            if not _holds_numbers(kind := table.schema.field(name).type):
                raise BadSample(f"The dataset's {name} are of type {kind}, not lists of numbers. Tokenise it again.")
        parts.append(_of_lists(table.column(counted), counted))
        yield len(parts[-1])
    lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    if len(dataset) >= WORTH_KEEPING:
        _cache_lengths(cache_file, lengths)
    return checked(lengths)


def column_of_lengths(dataset: datasets.Dataset, column: str) -> Lengths:
    """Return a column of a table, without a Python object for each row where it holds integers.

    Raises:
        BadSample: a length that is no whole number, with its row.
    """
    import pyarrow

    values: Any = dataset.data.column(column)
    order: Any = dataset._indices  # pyright: ignore[reportPrivateUsage]
    if pyarrow.types.is_integer(values.type) and not values.null_count:
        lengths = values.to_numpy().astype(np.int64, copy=False)
        # a table that was shuffled or selected from keeps its data as they were, and a list of the rows it has
        return lengths if order is None else lengths[order.column(0).to_numpy()]
    return _whole_numbers(dataset.with_format(None)[column][:], column)


def is_list(kind: Any) -> bool:
    """Return whether values of an arrow type are lists of any kind."""
    import pyarrow

    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    # older releases of pyarrow lack the last ones
    return any(getattr(pyarrow.types, test)(kind) for test in tests if hasattr(pyarrow.types, test))


def _holds_numbers(kind: Any) -> bool:
    """Return whether values of an arrow type are lists of numbers, or of what is not known because all are empty."""
    import pyarrow

    tests = ("is_integer", "is_floating", "is_boolean", "is_null")
    return is_list(kind) and any(getattr(pyarrow.types, test)(kind.value_type) for test in tests)


def _cached_lengths(path: Path, num_rows: int) -> Lengths | None:
    """Return what an earlier run counted; None where there is none, or the file cannot be that."""
    try:
        with path.open("rb") as file:
            lengths = np.lib.format.read_array(file, allow_pickle=False)
    except Exception:  # a spoilt file makes numpy raise errors of many kinds
        return None
    is_whole = lengths.shape == (num_rows,) and lengths.dtype == np.int64 and bool((lengths > 0).all())
    return lengths if is_whole else None


def _cache_lengths(path: Path, lengths: Lengths) -> None:
    """Write lengths whole or not at all; a cache that cannot be written costs a second count, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
            new = Path(file.name)
        try:
            with new.open("wb") as file:
                np.save(file, lengths)
            new.replace(path)  # at once, for another process may read it, or count the same table now
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        logger.info("Token counts are not kept: %s", error)


def _of_lists(column: Any, name: str) -> Lengths:
    """Count the entries of each list of a column, whatever kind of arrow list it is; of a mask, those not 0."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made at run time
    parts: list[Lengths] = [np.zeros(0, dtype=np.int64)]
    for chunk in column.chunks:
        # lengths instead of offsets: those of a chunk that is a slice do not begin at 0, and list views have none
        sizes = compute.fill_null(compute.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        if name == "attention_mask":
            is_token = compute.fill_null(compute.list_flatten(chunk), 0).to_numpy(zero_copy_only=False) != 0
            before, ends = np.concatenate([[0], np.cumsum(is_token)]), np.cumsum(sizes)
            sizes = before[ends] - before[ends - sizes]
        parts.append(sizes)
    return np.concatenate(parts)
