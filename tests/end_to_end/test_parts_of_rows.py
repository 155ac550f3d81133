"""Packed rows and samples that are too long: a step trains the rows that Trainer would draw, sample by sample."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)

from hf_hetero import HeteroConfig
from hf_hetero.errors import BadSample

DATA = samples(LENGTHS)
ROWS = [[3 * row + part for part in range(3)] for row in range(len(DATA) // 3)]  # documents of each packed row


def packed_data() -> list[dict[str, Any]]:
    return [
        {
            "input_ids": [token for n in row for token in DATA[n]["input_ids"]],
            "labels": [label for n in row for label in DATA[n]["labels"]],
            "seq_lengths": [len(DATA[n]["input_ids"]) for n in row],
        }
        for row in ROWS
    ]


def part(sample: dict[str, list[int]], start: int, end: int) -> dict[str, list[int]]:
    return {name: values[start:end] for name, values in sample.items()}


def train(data: Any, hetero: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    model = tiny_model(dtype=torch.float64)
    return trained(model, data, hetero=HeteroConfig(**hetero), **args)


def check(found: dict[str, Any], data: Any, steps: list[list[int]]) -> None:
    expected = reference_steps(tiny_model(dtype=torch.float64), data, steps)
    assert len(found["gradients"]) == len(steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-12


def test_packed_rows_are_taken_apart() -> None:
    """A step of 4 packed rows learns as a step of their 12 documents, none of which sees another."""
    found = run_ranks(train, 4, packed_data(), {}, {"per_device_train_batch_size": 1})[0]
    drawn = trainer_order(len(ROWS), 4, 7, 4)
    check(found, DATA, [[n for row in step for n in ROWS[row]] for step in drawn])


def test_split() -> None:
    """Samples of more than 16 tokens learn as several."""
    found = run_ranks(train, 4, DATA, {"max_sample_tokens": 16, "longer_samples": "split"}, {})[0]
    parts: list[dict[str, list[int]]] = []
    of_row: list[list[int]] = []
    for sample, length in zip(DATA, LENGTHS, strict=True):
        starts = range(0, length, 16)
        of_row.append(list(range(len(parts), len(parts) + len(starts))))
        parts += [part(sample, start, start + 16) for start in starts]
    steps = [[n for row in step for n in of_row[row]] for step in trainer_order(len(DATA), 12, 7, 4)]
    check(found, parts, steps)


def test_truncate() -> None:
    """Samples of more than 16 tokens learn from their first 16."""
    found = run_ranks(train, 2, DATA, {"max_sample_tokens": 16, "longer_samples": "truncate"}, {})[0]
    check(found, [part(sample, 0, 16) for sample in DATA], trainer_order(len(DATA), 12, 7, 4))


def refused(data: Any, hetero: dict[str, Any]) -> str:
    with pytest.raises(BadSample) as caught:
        train(data, hetero, {})
    return str(caught.value)


def test_longer_samples_are_an_error_by_default() -> None:
    """On every rank, before the first step."""
    for message in run_ranks(refused, 2, DATA, {"max_sample_tokens": 40}):
        assert "2 of 24 samples have more than 40 tokens; the longest, in row 7, has 64" in message


def test_rows_packed_in_secret_are_refused() -> None:
    """position_ids that start anew tell of packing without saying where documents end as lengths do."""
    rows = packed_data()
    for row in rows:
        row["position_ids"] = [position for length in row.pop("seq_lengths") for position in range(length)]
    assert all(list(accumulate(row["position_ids"], max)) != row["position_ids"] for row in rows)
    for message in run_ranks(refused, 2, rows, {}):
        assert "was packed: its position_ids start anew" in message
