"""Tokens of every sample: read from a column, or counted once. The only door to `datasets`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.samples import Samples, packed_rows, whole_rows

Lengths = NDArray[np.int64]

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
WORTH_KEEPING = 10_000
"""Fewer rows are counted in less time than it takes to look."""
PACKED_COLUMN = "seq_lengths"
"""Tokens of each document of a packed row, as TRL's packing leaves them."""


def read_lengths(dataset: Any, column: str) -> Lengths:
    """Tokens of each row of a map-style dataset. int64, shape (num_rows,).

    A column of lengths is taken as it is. Otherwise `input_ids` are counted, or the ones in `attention_mask` where rows
    are padded: in a `datasets.Dataset` once, without decoding the tokens, and kept in its cache by its fingerprint;
    elsewhere row by row under a progress bar.

    Raises:
        BadSample: rows without `input_ids`, an empty sample, or a length that is no whole number, with its row.
    """
    if isinstance(dataset, datasets.Dataset):
        lengths = _of_table(dataset, column)
    else:
        rows = (_of_row(dataset[row], row) for row in range(len(dataset)))
        counted = tqdm(rows, total=len(dataset), desc="Counting tokens", unit=" samples", leave=False, delay=1)
        lengths = np.fromiter(counted, dtype=np.int64, count=len(dataset))
    if lengths.size and lengths.min() < 1:
        row = int(lengths.argmin())
        raise BadSample(f"Row {row} has {lengths[row]} tokens. Filter empty samples out of the dataset.")
    return lengths


def read_samples(dataset: Any, column: str) -> Samples:
    """The samples of a map-style dataset: its rows, or, where rows were packed (`seq_lengths`, of TRL), the documents.

    Raises:
        BadSample: as `read_lengths`; or a row whose documents are not all of it.
    """
    documents = _documents(dataset)
    if documents is None:
        return whole_rows(read_lengths(dataset, column))
    lengths = read_lengths(dataset, column)
    num_documents = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return packed_rows(lengths, num_documents, np.asarray([n for row in documents for n in row], dtype=np.int64))


def _documents(dataset: Any) -> list[list[int]] | None:
    if isinstance(dataset, datasets.Dataset):
        return dataset.with_format(None)[PACKED_COLUMN][:] if PACKED_COLUMN in dataset.column_names else None
    if not len(dataset) or PACKED_COLUMN not in dataset[0]:
        return None
    return [list(dataset[row][PACKED_COLUMN]) for row in range(len(dataset))]


def raw_rows(dataset: Any, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Rows of a `datasets.Dataset` as they are stored, whatever its format; None for other datasets.

    Args:
        dataset: map-style.
        rows: which.
        names: columns to read; all, where the first of them is not there.
    """
    if not isinstance(dataset, datasets.Dataset):
        return None
    if names[0] in dataset.column_names:
        dataset = dataset.select_columns([name for name in names if name in dataset.column_names])
    table: Any = dataset.with_format("arrow")[list(rows)]
    return table.to_pylist()


def tells_where_it_is(dataset: Any) -> bool:
    """Whether a stream's `state_dict` leads back to the same place: one of `datasets` forgets what a buffer holds."""
    if not isinstance(dataset, datasets.IterableDataset):
        return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    sources: list[Any] = [dataset._ex_iterable]  # pyright: ignore[reportPrivateUsage]
    while sources:
        source = sources.pop()
        if "Buffer" in type(source).__name__:
            return False
        sources += [source.ex_iterable] if hasattr(source, "ex_iterable") else getattr(source, "ex_iterables", [])
    return True


def open_table(where: str, file_format: str | None, split: str, config: str | None = None) -> datasets.Dataset:
    """The dataset that a file, a folder of `save_to_disk`, or a hub name holds.

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
        found = datasets.load_from_disk(where)
    except Exception as error:  # `datasets`, pyarrow and the hub's client raise errors of a dozen kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"Cannot load the dataset {where!r}, split {split!r}: {said[0]}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ConfigError(f"The dataset {where!r} has no split {split!r}, only {', '.join(map(str, found))}.")
    return found[split]


def tokenised_lengths(dataset: datasets.Dataset, column: str, tokenizer: str) -> Lengths:
    """Tokens of each row's text, special tokens included, counted under a progress bar. int64, shape (num_rows,).

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
        tokens: Any = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # `transformers` and the hub's client raise errors of many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"Cannot load the tokenizer {tokenizer!r}: {said[0]}") from error
    texts, counted = dataset.select_columns([column]).with_format(None), list[int]()
    with tqdm(total=len(texts), desc="Counting tokens", unit=" samples", leave=False) as bar:
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows: list[Any] = texts[start : start + ROWS_AT_ONCE][column]
            if (empty := next((row for row, text in enumerate(rows) if not text), None)) is not None:
                raise BadSample(f"Row {start + empty} has no {column}. Filter empty samples out of the dataset.")
            if isinstance(rows[0], str):
                encoded = tokens(rows, verbose=False)
            elif tokens.chat_template is None:
                raise ConfigError(f"The tokenizer {tokenizer!r} has no chat template to count {column!r} with.")
            else:
                encoded = tokens.apply_chat_template(rows, tokenize=True, return_dict=True)
            counted += [len(ids) for ids in encoded["input_ids"]]
            bar.update(len(rows))
    return np.asarray(counted, dtype=np.int64)


def _whole_numbers(values: Sequence[object], column: str) -> Lengths:
    for row, value in enumerate(values):
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        if not whole or abs(value) >= 2**62:  # type: ignore[operator]
            raise BadSample(f"Row {row}: {column} is {value!r}; it must be a whole number of tokens.")
    return np.asarray(values, dtype=np.int64)


def _of_table(dataset: datasets.Dataset, column: str) -> Lengths:
    names: list[str] = dataset.column_names
    if column in names:
        values = np.asarray(dataset.with_format(None)[column])
        return values.astype(np.int64) if values.dtype.kind == "i" else _whole_numbers(values.tolist(), column)
    if "input_ids" not in names:
        raise BadSample(f"The dataset has no input_ids, only {names}. Tokenise it first.")
    counted = "attention_mask" if "attention_mask" in names else "input_ids"
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "hf_hetero" / f"{dataset._fingerprint}-{counted}.npy"  # pyright: ignore
    if (lengths := _kept_lengths(kept, len(dataset))) is not None:
        return lengths
    arrow: Any = dataset.select_columns([counted]).with_format("arrow")
    tables: Iterable[Any] = arrow.iter(batch_size=ROWS_AT_ONCE)
    parts = [
        _of_lists(table.column(counted), counted)
        for table in tqdm(tables, total=-(-len(dataset) // ROWS_AT_ONCE), desc="Counting tokens", leave=False)
    ]
    lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    if len(dataset) >= WORTH_KEEPING:
        _keep_lengths(kept, lengths)
    return lengths


def _kept_lengths(path: Path, num_rows: int) -> Lengths | None:
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError):  # none, or one that was cut short
        return None
    return lengths if lengths.shape == (num_rows,) and lengths.dtype == np.int64 else None


def _keep_lengths(path: Path, lengths: Lengths) -> None:
    """Whole or not at all; a cache that cannot be written costs a second count, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
            np.save(file, lengths)
        Path(file.name).replace(path)
    except OSError as error:
        logger.info("Token counts are not kept: %s", error)


def _of_lists(column: Any, name: str) -> Lengths:
    if name == "attention_mask":
        return np.asarray([sum(mask) for mask in column.to_pylist()], dtype=np.int64)
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]).astype(np.int64)


def _of_row(example: Mapping[str, Sequence[int]], row: int) -> int:
    if "input_ids" not in example:
        raise BadSample(f"Row {row} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
    mask = example.get("attention_mask")
    return len(example["input_ids"]) if mask is None else int(sum(mask))
