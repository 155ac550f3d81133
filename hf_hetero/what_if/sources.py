"""Sources give the lengths of a what-if: a text file, a dataset, or a named mix. Files and mixes need no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.planner import MAX_TOKENS
from hf_hetero.what_if.mixes import MIXES, Lengths, Mix, draw_lengths

MOST_DRAWN = 10_000_000
TABLE_SUFFIXES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True, slots=True)
class Reading:
    """A `Reading` says how a dataset is read.

    Args:
        split, config: of a dataset that has several.
        length_column: tokens of each row, where the dataset has them; else `input_ids` are counted.
        text_column: what a tokenizer counts; rows with `messages` instead go through its chat template.
        tokenizer: folder or hub name; None leaves text uncounted.
        usual_tokenizer: the same, for rows that nothing else counts.
    """

    split: str = "train"
    config: str | None = None
    length_column: str = "length"
    text_column: str = "text"
    tokenizer: str | None = None
    usual_tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A `Source` holds lengths to plan with.

    Args:
        name: for people.
        lengths: tokens of each sample kept, int64, shape (num_samples,), in the source's order.
        longest_tokens: the longest sample that this source may give; of a mix, its limit.
        num_dropped: samples left out because they were above the maximum length.
        is_drawn: in random order already.
    """

    name: str
    lengths: Lengths
    longest_tokens: int
    num_dropped: int = 0
    is_drawn: bool = False


def read_source(
    where: str, num_samples: int, seed: int = 0, max_tokens: int | None = None, reading: Reading | None = None
) -> Source:
    """Read the lengths that `where` names; a mix's name means the mix, `./web` a file of that name.

    Args:
        where: a mix; a text file with a length a line; a json, jsonl, parquet, csv or arrow file; a folder saved by
            `save_to_disk`; a dataset's name on the hub.
        num_samples: how many a mix is asked for; everything else gives all it has.
        seed: of the mix.
        max_tokens: longer samples are left out, and counted.
        reading: of a dataset.

    Raises:
        ConfigError: nothing of that name, a dataset without tokens to count, or a number out of range.
        BadSample: a length that is none, with its line or row, or no sample left.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"The maximum length is {max_tokens}; it must be at least 1 token.")
    if seed < 0:
        raise ConfigError(f"The seed is {seed}; it must be 0 or more.")
    if (mix := MIXES.get(where)) is not None:
        return _of_mix(mix, num_samples, seed, max_tokens)
    lengths = _of_table(where, reading or Reading()) if _is_table(where) else _of_text(where)
    fitting = lengths if max_tokens is None else lengths[lengths <= max_tokens]
    if not fitting.size:
        longer = f": all {lengths.size} are longer than {max_tokens} tokens" if lengths.size else ""
        raise BadSample(f"{where!r} has no samples{longer}.")
    return Source(where, fitting, int(fitting.max()), lengths.size - fitting.size)


def global_batches(source: Source, batch_size: int, num_steps: int, seed: int = 0) -> list[list[int]]:
    """Deal out the lengths of each step, no sample twice; the first batch does not depend on how many follow.

    Raises:
        ConfigError: a number below 1, or more samples than the source has.
    """
    for name, value in (("samples a batch", batch_size), ("steps", num_steps)):
        if value < 1:
            raise ConfigError(f"{value} {name}: it must be at least 1.")
    available = source.lengths.size
    if batch_size * num_steps > available:
        raise ConfigError(
            f"{num_steps:,} batches of {batch_size:,} samples need {batch_size * num_steps:,}; {source.name!r} "
            f"has {available:,}, enough for {available // batch_size:,}. Take fewer steps, or a smaller batch."
        )
    # all are shuffled, not only those that are needed: the first batch must not depend on how many follow
    order = np.arange(available) if source.is_drawn else np.random.default_rng(seed).permutation(available)
    chosen = source.lengths[order[: batch_size * num_steps]]
    return chosen.reshape(num_steps, batch_size).tolist()


def _of_mix(mix: Mix, num_samples: int, seed: int, max_tokens: int | None) -> Source:
    """Draw a source from a mix."""
    if num_samples > MOST_DRAWN:
        raise ConfigError(f"{num_samples:,} samples of {mix.name!r}: a mix is drawn from {MOST_DRAWN:,} times at most.")
    lengths, num_dropped = draw_lengths(mix, num_samples, seed, max_tokens)
    return Source(mix.name, lengths, min(mix.limit_tokens, max_tokens or mix.limit_tokens), num_dropped, is_drawn=True)


def _is_table(where: str) -> bool:
    """Tell whether `datasets` reads this. A name that is no file, and does not look like one, may be on the hub."""
    path = Path(where)
    if path.suffix in TABLE_SUFFIXES or os.path.isdir(path):
        return True
    looks_like_a_file = path.is_absolute() or where.startswith((".", "~")) or path.suffix == ".txt"
    return not os.path.exists(path) and not looks_like_a_file and where.count("/") == 1


def _of_text(where: str) -> Lengths:
    """Read a text file with a length a line; empty lines are passed over."""
    try:
        lines = Path(where).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"Cannot read the lengths {where!r}: {error.strerror}. Name a text file, a dataset, or one of the mixes "
            f"{', '.join(MIXES)}."
        ) from error
    except ValueError as error:
        raise ConfigError(f"Cannot read the lengths {where!r}: it is not a text file.") from error
    numbers = [_whole(line, f"{where}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return np.asarray(numbers, dtype=np.int64)


def _whole(text: str, place: str) -> int:
    """Read a whole number of tokens; `place` says where it stands."""
    try:
        tokens = int(text)
    except ValueError:
        raise BadSample(f"{place}: {text.strip()[:40]!r} is not a whole number of tokens.") from None
    if not 1 <= tokens <= MAX_TOKENS:
        raise BadSample(f"{place}: a sample of {text.strip()[:40]} tokens; it must have 1 to {MAX_TOKENS:,}.")
    return tokens


def _of_table(where: str, reading: Reading) -> Lengths:
    """Read the lengths of a dataset: tokenise its texts if a tokenizer is named, else count what it has."""
    from hf_hetero.data.lengths import read_lengths  # only here: `datasets` takes a while to import
    from hf_hetero.what_if import corpora

    table = corpora.open_table(where, TABLE_SUFFIXES.get(Path(where).suffix), reading.split, reading.config)
    texts = [name for name in (reading.text_column, "messages") if name in table.column_names]
    uncounted = bool(texts) and not {reading.length_column, "input_ids"} & set(table.column_names)
    tokenizer = reading.tokenizer or (reading.usual_tokenizer if uncounted else None)
    if texts and tokenizer is not None:
        lengths = corpora.tokenised_lengths(table, texts[0], tokenizer)
    elif uncounted:
        raise ConfigError(
            f"{where!r} has text in {texts[0]!r} but neither {reading.length_column!r} nor 'input_ids'. "
            "Name a tokenizer (--tokenizer) to count its tokens."
        )
    else:
        lengths = read_lengths(table, reading.length_column)
    if lengths.size and lengths.max() > MAX_TOKENS:
        raise BadSample(f"{where}, row {lengths.argmax()}: {lengths.max()} tokens; it must have 1 to {MAX_TOKENS:,}.")
    return lengths
