"""A step is summed up at once, by arrays, as it would be sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
from runs_to_report import records_of

from hf_hetero.errors import ConfigError
from hf_hetero.report.records import MOST_TOKENS, _checked
from hf_hetero.report.rows import STARTS, length_bin, row_of


def test_where_bins_start() -> None:
    """A length is found in the bin that the formula says, next to each border, too."""
    lengths = {length for start in STARTS.tolist() for length in (start - 1, start, start + 1)} | set(range(1, 3000))
    for length in lengths - {0, MOST_TOKENS + 1}:
        assert STARTS.searchsorted(length, side="right") - 1 == length_bin(length), length


@pytest.mark.parametrize("record", records_of(), ids=lambda record: f"step {record['step']}")
def test_counts(record: dict[str, Any]) -> None:
    """Samples and tokens by degree and bin are those of each sample in its group."""
    samples: dict[tuple[int, int], int] = {}
    tokens: dict[tuple[int, int], int] = {}
    for micro_batch in record["plan"]["micro_batches"]:
        for group in micro_batch["groups"]:
            for length in (record["lengths"][sample] for sample in group["samples"]):
                key = len(group["ranks"]), length_bin(length)
                samples[key] = samples.get(key, 0) + 1
                tokens[key] = tokens.get(key, 0) + length
    row = row_of(record)
    assert row.samples == samples
    assert row.tokens == tokens
    assert all(type(number) is int for counts in (row.samples, row.tokens) for number in (*counts.values(),))


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf, True, "1", None, [1.0]])
def test_one_wrong_second_among_many(place: int, value: object) -> None:
    """Wherever it stands among the seconds of the ranks."""
    [record, *_] = records_of()
    assert _checked(record, "here")
    record["busy_s"][0][place] = value
    with pytest.raises(ConfigError, match="busy_s"):
        _checked(record, "here")


@pytest.mark.parametrize("value", [0, -5, MOST_TOKENS + 1, 2.0, True, "7", None])
def test_one_wrong_length_among_many(value: object) -> None:
    """A length is a whole number of tokens, and not too many."""
    [record, *_] = records_of()
    record["lengths"][1] = value
    with pytest.raises(ConfigError, match="lengths"):
        _checked(record, "here")
