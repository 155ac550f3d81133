"""This module has all ranks count what the rows of a dataset hold, and see that it is the same on all of them.

Where lengths lie in a table, rank 0 takes them from there. Where only reading tells, because rows are made as they are
read or a collator makes them shorter or longer, each rank reads a share. Either way ranks meet every second, so that
none waits for another for longer than that, however long counting takes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from hf_hetero.collators import PackedCollator
from hf_hetero.collators.row_counts import column_of_sizes, count_row, stored_tower_tokens
from hf_hetero.data.contents import LEARNT_COLUMNS, random_states_kept
from hf_hetero.data.lengths import fingerprint, is_plain_table, is_table, table_documents, table_lengths, table_rows
from hf_hetero.data.sampler import StepDataset
from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.images.sight import PIXELS
from hf_hetero.ranks.agreement import broadcast, gather, gather_objects, raise_together
from hf_hetero.ranks.rounds import Work, each, in_rounds
from hf_hetero.samples.rows import as_array, checked, documents_of_row
from hf_hetero.samples.samples import Samples, samples_of

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

logger = logging.getLogger(__name__)

COMPARED = 512
"""Rows that every rank reads, to see that all read the same: all of a small dataset, some of a large one."""
READ_TWICE = 8
"""Rows that are read a second time, to see that they have the same length at each reading."""
KNOWN = ("transformers", "trl")
"""Their collators, if they change the number of tokens at all, do so to the longest row, or to any."""
REMEDY = (
    "Give every rank the same rows in the same order: shuffle, split and filter with a fixed seed, from the same files "
    "on all nodes, and do not shard; HeteroTrainer deals the rows out itself."
)


@dataclass(frozen=True, slots=True)
class Source:
    """A `Source` is a dataset, and how training reads it.

    Args:
        dataset: map-style, as the user gave it.
        rows: the same, as it is read.
        collate: makes samples of the rows.
        column: of a table, with each row's tokens.
    """

    dataset: Any
    rows: StepDataset
    collate: Callable[..., Any]
    column: str

    @property
    def has_column(self) -> bool:
        """Return whether there is a column of lengths."""
        return is_table(self.dataset) and self.column in self.dataset.column_names

    @property
    def makes_tokens(self) -> bool:
        """Return whether a collator makes tokens of rows that have none."""
        return isinstance(self.collate, PackedCollator) and self.collate.makes_tokens

    @property
    def collator(self) -> Any:
        """Return the user's own collator; None: samples are made of rows as they are."""
        return self.collate.example_collator if isinstance(self.collate, PackedCollator) else None


@dataclass(frozen=True, slots=True)
class Counted:
    """`Counted` is what a dataset holds.

    Args:
        num_rows: of the dataset.
        samples: that the rows hold; on rank 0 only.
        column: that their lengths are from; None: they were counted.
    """

    num_rows: int
    samples: Samples | None
    column: str | None


def count_together(source: Source, control: dist.ProcessGroup | None) -> Counted:
    """Count the tokens of all rows. A collective of all ranks.

    Raises:
        BadSample: rows that cannot be samples, or have another length at each read; on every rank.
        ConfigError: the dataset is not the same on all ranks; on every rank.
    """
    with random_states_kept():  # rows may draw from the generators that training draws from
        sizes = each(lambda: (len(source.dataset), _identity(source)), control)
        _refuse_others([num_rows for num_rows, _ in sizes], "The dataset differs between ranks: rank {} has {} rows")
        num_rows, identity = sizes[0]
        # tables of one fingerprint need not be compared: then rank 0 counts alone, and the others keep it company,
        # because every rank must take part in the same collectives, whatever it has to count
        is_one = control is None or (bool(identity) and len(set(sizes)) == 1)
        is_first = control is None or dist.get_rank() == 0
        counts = is_first or not is_one
        stored = in_rounds(_stored(source) if counts else _nothing(), num_rows, control)
        # one rank whose table does not tell is enough: reading is a work that all ranks share
        if any(unknown for [unknown] in gather([int(stored is None and counts)], control)):
            logger.info(
                "%d rows are read to count their tokens; a true %r column would spare it.", num_rows, source.column
            )
            return Counted(num_rows, _read_together(source, num_rows, control), None)
        if not is_one:
            _compare(source, in_rounds(_read(source, spread(num_rows, COMPARED)), num_rows, control), control)
            prints = gather_objects(stored.fingerprint() if stored is not None else "", control)
            _refuse_others(prints, "The lengths of rows differ between ranks: rank {} has fingerprint {}")
    return Counted(num_rows, stored if is_first else None, source.column if source.has_column else None)


def still_holds(source: Source, tokens: Integers) -> bool:
    """Return whether rows are as they were when they were counted, as far as some show; of a plain table all are.

    Args:
        source: the dataset of now.
        tokens: of each row, as they were counted, shape (num_rows,).
    """
    if is_plain_table(source.dataset) and source.collator is None:
        return True  # a table never changes: whatever is done to it makes another one
    with random_states_kept():
        for row in spread(len(tokens), COMPARED):
            [example] = source.rows.read([row])
            if count_row(source.collate, example, row).tokens != tokens[row]:
                return False
    return True


def spread(num_rows: int, most: int) -> list[int]:
    """Return so many rows, evenly over the dataset, the first and the last among them; all, if there are no more."""
    return np.unique(np.linspace(0, num_rows - 1, min(num_rows, most)).round().astype(np.int64)).tolist()


def _identity(source: Source) -> str:
    """Return what is equal only where rows are; "" where that cannot be told."""
    return fingerprint(source.dataset) if is_plain_table(source.dataset) else ""


def _nothing() -> Work[None]:
    """Do no work, in rounds in which others do theirs."""
    yield 0


def _stored(source: Source) -> Work[Samples | None]:
    """Return the samples of a table, by what lies in it; None where reading may give other lengths."""
    dataset, collator = source.dataset, source.collator
    is_known = is_plain_table(dataset) and (collator is None or _module(collator) in KNOWN)
    if not is_table(dataset) or not (is_known or source.has_column):
        return None
    if source.makes_tokens and not {source.column, "input_ids"} & set(dataset.column_names):
        return None
    lengths = yield from table_lengths(dataset, source.column)
    # what a transform or a collator of the user's makes of rows is only known by reading: the longest row is asked
    # because limits and padding show there
    if len(lengths) and not (is_plain_table(dataset) and collator is None):
        asked = [int(lengths.argmax()), int(lengths.argmin()), *spread(len(lengths), READ_TWICE)]
        rows_read = yield from _read(source, asked)
        for row, tokens in rows_read.tokens.items():
            if tokens != lengths[row]:
                logger.warning(
                    "Row %d has %d tokens in the table, and %d as it is read: all rows are read now, to count them.",
                    *(row, lengths[row], tokens),
                )
                return None
        if any(rows_read.towers.values()) and PIXELS not in dataset.column_names:
            logger.warning(
                "Rows have images, but lengths are taken from %r: what the tower computes for them is in no plan. "
                "Without that column all rows are read once, and it is.",
                source.column,
            )
    towers = list[float]()
    if (told_by := column_of_sizes(source.collate, dataset.column_names)) is not None:
        for values in table_rows(dataset, told_by):
            towers += stored_tower_tokens(source.collate, values)
            yield 0
    return samples_of(lengths, table_documents(dataset), np.asarray(towers) if towers else None)


@dataclass(frozen=True, slots=True)
class _RowsRead:
    """`_RowsRead` holds by row: tokens, those of towers and of each document, and, if asked for, a fingerprint."""

    tokens: dict[int, int]
    towers: dict[int, float]
    documents: dict[int, list[int] | None]
    contents: dict[int, int]


def _read(source: Source, rows: Sequence[int], prints: bool = True) -> Work[_RowsRead]:
    """Read some rows, one after the other."""
    rows_read = _RowsRead({}, {}, {}, {})
    for row in rows:
        [example] = source.rows.read([row])
        rows_read.tokens[row], rows_read.towers[row] = count_row(source.collate, example, row)
        checked(np.asarray([rows_read.tokens[row]]), first=row)
        rows_read.documents[row] = documents_of_row(example)
        if prints:
            rows_read.contents[row] = _content(example)
        yield 1
    return rows_read


def _read_together(source: Source, num_rows: int, control: dist.ProcessGroup | None) -> Samples | None:
    """Read all rows, a share on each rank, and return their samples on rank 0, None elsewhere."""
    rank, num_ranks = (0, 1) if control is None else (dist.get_rank(), dist.get_world_size())
    # a few rows on every rank before a share on each: only ranks that read the same may count for one another
    compared = spread(num_rows, COMPARED if control is not None else READ_TWICE)
    rows_read = in_rounds(_read(source, compared), len(compared) * num_ranks, control)
    _compare(source, rows_read, control)
    if len(compared) < num_rows:
        share = range(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks)
        rows_read = in_rounds(_read(source, share, prints=False), num_rows, control)
    # arrays, not lists, of what may be millions of rows
    counted, packed = np.fromiter(rows_read.tokens.values(), np.int64), list(rows_read.documents.values())
    towers = np.fromiter(rows_read.towers.values(), np.float64)
    own_share = counted, towers if towers.any() else None, packed if any(row is not None for row in packed) else None
    shares = gather_objects(own_share, control) if len(compared) < num_rows else [own_share]
    samples: list[Samples] = []

    def join_shares() -> None:
        lengths = np.concatenate([counted for counted, _, _ in shares])
        by_tower = [np.zeros(len(counted)) if towers is None else towers for counted, towers, _ in shares]
        documents: Any = None
        if any(packed is not None for _, _, packed in shares):
            documents = [row for counted, _, packed in shares for row in packed or [None] * len(counted)]
        if is_plain_table(source.dataset):  # the column may not be among those that are read
            documents = table_documents(source.dataset)
        samples.append(samples_of(lengths, documents, np.concatenate(by_tower)))

    broadcast(join_shares, control)  # rank 0 alone joins them, and all ranks raise what it refuses
    return samples[0] if samples else None


def _compare(source: Source, rows_read: _RowsRead, control: dist.ProcessGroup | None) -> None:
    """See that rows are read with the same length again, and on all ranks."""
    again = in_rounds(_read(source, list(rows_read.tokens)[:: max(1, len(rows_read.tokens) // READ_TWICE)]), 0, control)
    error: Exception | None = None
    for row, tokens in again.tokens.items():
        if tokens != rows_read.tokens[row]:
            by = "" if source.collator is None else f", and the collator {_name(source.collator)}"
            error = BadSample(
                f"Row {row} had {rows_read.tokens[row]} tokens when it was read first, and {tokens} the next time, so "
                f"its step cannot be planned. Let the dataset {_name(source.dataset)}{by} give a row the same number "
                "of tokens at each read, for instance by a generator seeded with the row; or use plain Trainer."
            )
            break
    raise_together(error, control)
    is_steady = all(rows_read.contents[row] == content for row, content in again.contents.items())
    prints = gather([_print(rows_read.tokens), _print(rows_read.contents), int(is_steady)], control)
    compares_contents = all(steady for _, _, steady in prints)  # else they are drawn anew at each read
    if len({(tokens, contents if compares_contents else 0) for tokens, contents, _ in prints}) == 1:
        return
    # only now the rows themselves, which are many from many ranks
    everywhere = gather_objects((rows_read.tokens, rows_read.contents), control)
    tokens, contents = everywhere[0]
    for rank, (their_tokens, their_contents) in enumerate(everywhere):
        for row in tokens:
            what = f"Row {row} of the dataset differs between ranks: rank {rank} reads"
            if their_tokens[row] != tokens[row]:
                raise ConfigError(f"{what} {their_tokens[row]} tokens, rank 0 {tokens[row]}. {REMEDY}")
            if compares_contents and their_contents[row] != contents[row]:
                raise ConfigError(f"{what} other tokens than rank 0. {REMEDY}")


def _refuse_others(values: Sequence[Any], what: str) -> None:
    """Refuse a value that is not that of rank 0; `what` has room for the rank and its value."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ConfigError(f"{what.format(rank, value)}, rank 0 {values[0]}. {REMEDY}")


def _print(values: Mapping[int, int]) -> int:
    """Return a fingerprint of numbers by row, 64 bits."""
    digest = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _content(example: Mapping[str, Any]) -> int:
    """Return a fingerprint of tokens and labels, 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in LEARNT_COLUMNS:
        if (values := example.get(name)) is None:
            continue
        try:
            numbers = as_array(values)
            digest.update(numbers.astype(np.float64 if numbers.dtype.kind == "f" else np.int64).tobytes())
        except (TypeError, ValueError):  # what only the user's collator makes numbers of
            digest.update(repr(values).encode())
    return int.from_bytes(digest.digest(), "big", signed=True)


def _module(collator: Any) -> str:
    """Return the package that a collator's class comes from."""
    return str(getattr(collator, "__module__", "")).partition(".")[0]


def _name(thing: Any) -> str:
    """Return the name of a function, or of an object's class."""
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
