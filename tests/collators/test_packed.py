"""Packing loses no token, shifts labels inside each sample, and serves as an ordinary collator, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LENGTHS, ScriptedPlanner, samples
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_hetero.collators import PackedCollator
from hf_hetero.errors import BadSample
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import Step, StepBatch, StepExamples, StepShare


def step_of(data: list[Any], lengths: list[int]) -> Step:
    return step_of_rows(tuple(range(100, 100 + len(data))), lengths)


def step_of_rows(rows: tuple[int, ...], lengths: Sequence[int], num_ranks: int = 4) -> Step:
    drawn = Drawn(rows, (0,) * len(rows), tuple(lengths), tuple(lengths))
    return Step(0, 0, drawn, ScriptedPlanner(num_ranks).plan(lengths))


def collate(step: Step, data: list[Any], rank: int, collator: PackedCollator | None = None) -> StepBatch:
    share = StepShare(step, rank)
    result = (collator or PackedCollator())(StepExamples(share, {p: data[p] for p in share.samples()}))
    assert isinstance(result, StepBatch)
    return result


def test_every_token_with_its_target_once() -> None:
    """Over the ranks, each (sample, position) appears once, with its token, its label and the label after it."""
    data = samples(LENGTHS)
    step = step_of(data, LENGTHS)
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for rank in range(4):
        for m in collate(step, data, rank).micro_batches:
            spans = m.layout.spans[m.group.ranks.index(rank)]
            places = [(m.group.samples[s.sample], t) for s in spans for t in range(s.start, s.end)]
            real = m.inputs["attention_mask"].view(-1)
            names = ("position_ids", "input_ids", "labels", "shift_labels")
            rows = [m.inputs[name].view(-1)[real].tolist() for name in names]
            for place, position, *values in zip(places, *rows, strict=True):
                assert place not in seen
                assert position == place[1]
                seen[place] = tuple(values)
    for sample, row in enumerate(data):
        targets = [*row["labels"][1:], -100]
        for position, values in enumerate(zip(row["input_ids"], row["labels"], targets, strict=True)):
            assert seen.pop((sample, position)) == values
    assert not seen


def test_targets_are_counted_once() -> None:
    """The ranks' targets add up to those of the samples."""
    data = samples(LENGTHS)
    total = sum(collate(step_of(data, LENGTHS), data, rank).num_targets for rank in range(4))
    assert total == sum(label != -100 for row in data for label in row["labels"][1:])


def test_shared_rows_have_fingerprints() -> None:
    """The same on each rank that reads a row; another for another token or label; none for rows of one rank."""
    data = samples(LENGTHS)
    step = step_of(data, LENGTHS)
    found = [collate(step, data, rank).fingerprints for rank in range(4)]
    for row in set().union(*found):
        assert row in step.shared_rows()
        assert len({prints[row] for prints in found if row in prints}) == 1
    assert set().union(*found) == set(step.shared_rows())
    row = max(found[0])
    for key in ("input_ids", "labels"):
        other = [*data]
        other[row - 100] = {**other[row - 100], key: [*other[row - 100][key][:-1], 3]}
        assert collate(step, other, 0).fingerprints[row] != found[0][row]


def test_rank_without_tokens_runs_one_that_does_not_count() -> None:
    """It has one masked token without a target."""
    data = samples([1])
    batches = [collate(step_of(data, [1]), data, rank) for rank in range(4)]
    empty = [m.inputs for b in batches for m in b.micro_batches if not m.inputs["attention_mask"].any()]
    assert empty
    for inputs in empty:
        assert inputs["input_ids"].shape == (1, 1)
        assert inputs["shift_labels"].tolist() == [[-100]]


def test_labels_default_to_input_ids() -> None:
    """A sample without labels is learnt whole."""
    data = [{"input_ids": [4, 5, 6]}]
    share = StepShare(step_of_rows((0,), [3], 1), 0)
    batch = PackedCollator()(StepExamples(share, {0: data[0]}))
    assert isinstance(batch, StepBatch)
    assert batch.micro_batches[0].inputs["shift_labels"].tolist() == [[5, 6, -100]]


def test_a_users_collator_makes_the_labels() -> None:
    """With DataCollatorForLanguageModeling, labels are what it makes of each sample: its pad token is not learnt."""
    words = Tokenizer(models.WordLevel({"<pad>": 3, "a": 4}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = [{"input_ids": [4, 3, 6, 7]}]
    share = StepShare(step_of_rows((0,), [4], 1), 0)
    batch = PackedCollator(example_collator=theirs)(StepExamples(share, {0: data[0]}))
    assert isinstance(batch, StepBatch)
    assert batch.micro_batches[0].inputs["shift_labels"].tolist() == [[-100, 6, 7, -100]]


def test_padding_of_the_dataset_is_taken_off() -> None:
    """Tokens outside the attention mask are not trained on."""
    data = [{"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}]
    share = StepShare(step_of_rows((0,), [3], 1), 0)
    batch = PackedCollator()(StepExamples(share, {0: data[0]}))
    assert isinstance(batch, StepBatch)
    assert batch.micro_batches[0].inputs["input_ids"].tolist() == [[5, 6, 7]]


def test_padding_keeps_its_positions() -> None:
    """As in Trainer, the tokens of a row padded on the left do not stand at 0."""
    sample = PackedCollator().sample({"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]}, "row 1")
    assert sample.position_ids(0, 2).tolist() == [2, 3]
    assert PackedCollator().sample({"input_ids": [5, 0], "attention_mask": [1, 0]}, "row 1").positions is None


def test_padding_with_labels_is_refused() -> None:
    """Trainer would learn it; the row, the token and the label are named."""
    row = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [5, 6, -100, 4]}
    with pytest.raises(BadSample, match=r"row 9 has the label 4 at token 3.*Give padding the label -100"):
        PackedCollator().sample(row, "row 9")
    assert PackedCollator().sample({**row, "labels": [5, 6, -100, -100]}, "row 9").input_ids.tolist() == [5, 6]


def test_ordinary_collator() -> None:
    """Plain examples give one padded batch, with labels that the model shifts itself."""
    batch: Any = PackedCollator(pad_token_id=9)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, 5, -100]]


def shortened(examples: list[Any]) -> dict[str, Any]:
    return {"input_ids": [examples[0]["input_ids"][:1]]}


def test_only_a_column_that_was_used_is_blamed() -> None:
    """What else gives a row another length is named instead: the dataset, and the user's collator."""
    examples = StepExamples(StepShare(step_of_rows((77,), [3], 1), 0), {0: {"input_ids": [1, 2]}})
    with pytest.raises(BadSample, match="Remove the dataset's tokens column, or make it count"):
        PackedCollator(length_column="tokens")(examples)
    with pytest.raises(BadSample, match="the dataset must give a row as many tokens at each read") as error:
        PackedCollator()(examples)
    assert "column" not in str(error.value)
    with pytest.raises(BadSample, match="and the collator shortened, must give a row as many tokens"):
        PackedCollator(example_collator=shortened)(examples)


def test_a_batch_is_no_sample() -> None:
    """What a row is made of must be flat; of a nested one its row is named."""
    with pytest.raises(BadSample, match="sample 0 of the batch: input_ids is nested"):
        PackedCollator()([{"input_ids": [[1, 2, 3]]}])
    assert PackedCollator(example_collator=shortened).num_tokens({"input_ids": [1, 2]}, "row 5") == 1


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "x"}, r"has no input_ids, only \['text'\]"),
        ({"input_ids": [], "labels": []}, "was planned with 3"),
        ({"input_ids": [1, 2, 3], "labels": [1]}, "has 3 input_ids but 1 labels"),
        ({"input_ids": [1, 2]}, "has 2 tokens but was planned with 3"),
    ],
)
def test_bad_samples_are_named_by_row(example: dict[str, Any], message: str) -> None:
    """The dataset's row is in the message."""
    share = StepShare(step_of_rows((77,), [3], 1), 0)
    with pytest.raises(BadSample, match=f"row 77 {message}|row 77 has 0 tokens but {message}"):
        PackedCollator()(StepExamples(share, {0: example}))
    with pytest.raises(BadSample, match="sample 0 of the batch has no tokens"):
        PackedCollator()([{"input_ids": []}])


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"input_ids": [5, 6.5, 7]}, "row 77: input_ids holds 6.5 at position 1, which is no whole number"),
        ({"input_ids": np.array([5.0, 6.0, np.nan])}, "row 77: input_ids holds nan at position 2"),
        ({"input_ids": [5, 6, 7], "labels": [5.0, 6.0, 7.25]}, "row 77: labels holds 7.25 at position 2"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 0.5, 1]}, "row 77: position_ids holds 0.5 at position 1"),
    ],
)
def test_fractions_are_not_cut(example: dict[str, Any], words: str) -> None:
    """What a row counts with is whole: a fraction is refused with its row, and not trained as another token."""
    with pytest.raises(BadSample, match=words):
        collate(step_of_rows((77,), [3], num_ranks=1), [example], 0)


def test_whole_numbers_of_another_kind() -> None:
    """Tokens that are whole numbers are tokens, whatever their type."""
    sample = PackedCollator().sample({"input_ids": np.array([5.0, 6.0, 7.0])}, "row 77")
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.input_ids.dtype == torch.long


def test_labels_that_are_made_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """Once, where nobody asked for them; where somebody did, there is nothing to say."""
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    for says_so in (True, False):
        collator = PackedCollator(says_so=says_so)
        assert [collator.sample(row, f"row {n}").labels.tolist() for n, row in enumerate(rows)] == [[1, 2, 3], [4, 5]]
        said = [record.message for record in caplog.records]
        assert [message.startswith("row 0 has no labels") for message in said] == [True] * says_so
        caplog.clear()
