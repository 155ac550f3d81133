"""Unpaired preferences as packed rows: TRL's own sequences and completions, one after the other, without padding."""

from __future__ import annotations

import pytest

from hf_hetero.errors import BadSample
from hf_hetero.samples.unpaired import UnpairedRows

trl_kto = pytest.importorskip("trl.trainer.kto_trainer")

ROWS = [
    {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "KL_completion_ids": [20], "label": True},
    {"prompt_ids": [7], "completion_ids": [8, 9, 10, 11, 12], "KL_completion_ids": [4, 5], "label": False},
    {"prompt_ids": [16, 17], "completion_ids": [20], "KL_completion_ids": [8, 9, 10, 11, 12], "label": True},
]


@pytest.mark.parametrize("most", [None, 4])
def test_rows_are_trls_batches(most: int | None) -> None:
    """Tokens and completions of both sequences are those of TRL's collator; the sign tells which is which."""
    batch = trl_kto.DataCollatorForUnpairedPreference(pad_token_id=0, max_length=most)(ROWS)
    for number, known in enumerate(ROWS):
        row = UnpairedRows(most).row({**known, "ref_logps": -1.5, "ref_KL_logps": -2.5})
        at = 0
        for prefix, length in zip(("", "KL_"), row["seq_lengths"], strict=True):
            is_real = batch[f"{prefix}attention_mask"][number].bool()
            assert row["input_ids"][at : at + length] == batch[f"{prefix}input_ids"][number][is_real].tolist()
            is_learned = [label != -100 for label in row["labels"][at : at + length]]
            assert is_learned == batch[f"{prefix}completion_mask"][number][is_real].bool().tolist()
            at += length
        assert at == len(row["input_ids"]) == len(row["labels"])
        first, second = row["seq_lengths"]
        assert list(row["of_unpaired"]) == [1 if known["label"] else -1] * first + [0] * second
        assert list(row["of_pair"]) == [-1.5] * first + [-2.5] * second


def test_rows_without_mismatched_completions() -> None:
    """They are one sample, and need one number of the reference."""
    row = UnpairedRows().row({"prompt_ids": [1], "completion_ids": [2, 3], "label": False, "ref_logps": -1.0})
    assert (row["input_ids"], row["labels"], row["seq_lengths"]) == ([1, 2, 3], [-100, 2, 3], [3])
    assert list(row["of_unpaired"]) == [-1] * 3
    assert list(row["of_pair"]) == [-1.0] * 3


def test_rows_without_labels_are_refused() -> None:
    """What is missing is named."""
    with pytest.raises(BadSample, match=r"no completion_ids, label, only \['prompt_ids'\]"):
        UnpairedRows().row({"prompt_ids": [1]})
