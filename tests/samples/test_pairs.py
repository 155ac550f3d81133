"""Preference pairs as packed rows: TRL's own sequences and completions, one after the other, without padding."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.samples.pairs import PairRows, check_together

trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer")

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8, 9, 10, 11, 12, 13], "rejected_ids": [14, 15]},
    {"prompt_ids": [16, 17, 18, 19], "chosen_ids": [20], "rejected_ids": [21, 22, 23]},
]


@pytest.mark.parametrize("most", [None, 5, 3])
@pytest.mark.parametrize("keeps_end", [False, True])
def test_rows_are_trls_batches(most: int | None, keeps_end: bool) -> None:
    """Tokens and completions of each sequence are those of TRL's collator, which cuts longer ones at either end."""
    mode = "keep_end" if keeps_end else "keep_start"
    batch = trl_dpo.DataCollatorForPreference(pad_token_id=0, max_length=most, truncation_mode=mode)(PAIRS)
    rows = PairRows(most, keeps_end).rows({name: [pair[name] for pair in PAIRS] for name in PAIRS[0]})
    for number in range(len(PAIRS)):
        ids, labels, at = rows["input_ids"][number], rows["labels"][number], 0
        for sequence, length in zip((number, number + len(PAIRS)), rows["seq_lengths"][number], strict=True):
            is_real = batch["attention_mask"][sequence].bool()
            assert ids[at : at + length] == batch["input_ids"][sequence][is_real].tolist()
            is_learned = [label != -100 for label in labels[at : at + length]]
            assert is_learned == batch["completion_mask"][sequence][is_real].bool().tolist()
            at += length
        assert at == len(ids) == len(labels)
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


def test_views() -> None:
    """A table's rows, and a stream's, are packed when they are read, and keep the columns that TRL reads."""
    known = [{**pair, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5} for pair in PAIRS]
    rows = PairRows()
    for made in (datasets.Dataset.from_list(known), datasets.Dataset.from_list(known).to_iterable_dataset()):
        view: Any = rows.of(made)
        for row, pair in zip(view, known, strict=True):
            assert {name: row[name] for name in pair} == pair
            assert row["input_ids"] == rows.row(pair)["input_ids"]
            first, second = row["seq_lengths"]
            assert list(row["of_pair"]) == [-1.5] * first + [-2.5] * second


def test_a_column_of_lengths_is_left_out() -> None:
    """Planned by it, a pair would be one sample."""
    table = datasets.Dataset.from_list([{**pair, "length": 9} for pair in PAIRS])
    assert "length" not in PairRows().of(table, "length").column_names


def test_rows_without_tokens_are_refused() -> None:
    """What is missing is named."""
    with pytest.raises(BadSample, match=r"no chosen_ids, rejected_ids, only \['prompt_ids'\]"):
        PairRows().row({"prompt_ids": [1]})


@pytest.mark.parametrize("samples", [[0], [0, 2], [1, 0], [1, 2], [0, 1, 2], [0, 1, 3]])
def test_halves_are_refused(samples: list[int]) -> None:
    """A group has whole pairs, chosen first; of any other the row is named."""
    rows = (5, 5, 9, 9)
    check_together(rows, [2, 3, 0, 1], [0])
    check_together(rows, [], [0])
    with pytest.raises(HeteroError, match=r"ranks \[0, 1\] one half of the pair in row [59]"):
        check_together(rows, samples, [0, 1])
