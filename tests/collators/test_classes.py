"""A sequence's label is at its last token that is no padding, however the row is written, and nothing is shifted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_hetero.collators import ClassCollator
from hf_hetero.collators.classes import Classes
from hf_hetero.errors import BadSample
from hf_hetero.model.classes.class_loss import MANY_CLASSES, REGRESSION, numbers_of

IGNORE = -100


def collator(of: Any = "sequences", num_labels: int = 3, problem: str | None = None, **options: Any) -> ClassCollator:
    return ClassCollator(classes=Classes(of, num_labels, problem, pad_token_id=0), **options)


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
@pytest.mark.parametrize(
    ("ids", "mask", "place"),
    [
        ([5, 6, 7], None, 2),
        ([5, 6, 0], None, 1),
        ([5, 6, 0, 0], [1, 1, 0, 0], 1),
        ([0, 0, 5, 6], [0, 0, 1, 1], 1),
        ([0], None, 0),
    ],
)
def test_the_label_is_at_the_last_token(name: str, ids: list[int], mask: list[int] | None, place: int) -> None:
    """The last token other than padding has the sequence's label, and no other has; padding is left out before."""
    made = collator()
    row = {"input_ids": ids, name: 2, **({} if mask is None else {"attention_mask": mask})}
    found = made.classes.at_last_token(made.sample(row, "row 0"))
    assert found.scored == place
    assert found.labels is not None
    assert [n for n, label in enumerate(found.labels.tolist()) if label != IGNORE] == [place]
    assert found.targets is found.labels


def test_numbers_are_kept_whole() -> None:
    """Numbers of a sequence are those of the row, in fp64; a number may stand without a list."""
    made = collator(num_labels=1, problem=MANY_CLASSES)
    for label in (0.1, [0.1], torch.tensor([0.1], dtype=torch.float64)):
        sample = made.sample({"input_ids": [5, 6], "labels": label}, "row 0")
        assert sample.labels is not None
        assert numbers_of(sample.labels).tolist() == [[0.1], [0.1]]


def test_labels_of_tokens_are_their_own() -> None:
    """Each token keeps its label; padding and -100 have none."""
    row = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [2, IGNORE, 1, IGNORE]}
    found = collator("tokens").sample(row, "row 0")
    assert found.targets.tolist() == [2, IGNORE, 1]
    assert found.scored is None


def test_a_cut_row_ends_where_it_is_cut() -> None:
    """Of a truncated sequence the last token that is left counts."""
    made = collator()
    sample = made.sample({"input_ids": [5, 6, 7, 8], "labels": 1}, "row 0")
    assert made.classes.at_last_token(sample.part(0, 2)).scored == 1


@pytest.mark.parametrize(
    ("num_labels", "problem", "labels", "expected"),
    [
        (3, None, [2, 0], torch.tensor([2, 0])),
        (1, None, [0.5, 2], torch.tensor([0.5, 2.0])),
        (2, REGRESSION, [[0.5, 1.0], [2.0, 3.0]], torch.tensor([[0.5, 1.0], [2.0, 3.0]])),
        (1, MANY_CLASSES, [1.0, 0.0], torch.tensor([[1.0], [0.0]])),
    ],
)
def test_an_ordinary_batch(num_labels: int, problem: str | None, labels: list[Any], expected: torch.Tensor) -> None:
    """Given a plain list, it pads tokens and gives the labels that transformers' loss takes."""
    made = collator(num_labels=num_labels, problem=problem)
    rows = [{"input_ids": [5] * (n + 1), "labels": label} for n, label in enumerate(labels)]
    batch = made(rows)
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[5, 0], [5, 5]]
    torch.testing.assert_close(batch["labels"], expected)


def test_a_row_of_several_sequences_is_refused() -> None:
    """One label cannot be that of each document of a packed row."""
    with pytest.raises(BadSample, match="row 3 has 2 sequences, and one label"):
        collator().sample({"input_ids": [5, 6, 7], "seq_lengths": [1, 2], "labels": 1}, "row 3")
