"""All ranks count together, whatever it takes; and train on the same rows, or say at the start that they do not."""

from __future__ import annotations

import pickle
import random
import time
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import often, run_ranks

from hf_hetero import HeteroError
from hf_hetero.collators import PackedCollator
from hf_hetero.data.counting import COMPARED, Counted, Source, _content, count_together, spread
from hf_hetero.data.sampler import StepDataset
from hf_hetero.errors import BadSample, ConfigError
from hf_hetero.ranks.groups import GroupPool


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of some tokens each; knows which of them were read."""

    def __init__(self, lengths: list[int], first: int = 0, seconds: float = 0.0) -> None:
        self.lengths, self.first, self.seconds, self.asked = lengths, first, seconds, list[int]()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.asked.append(row)
        time.sleep(self.seconds)
        return {"input_ids": [self.first + row] * self.lengths[row]}


def counted(dataset: Any, collator: Any = None, column: str = "length") -> Counted:
    collate = PackedCollator(example_collator=collator)
    control = GroupPool((), 60, 60).control if dist.is_initialized() else None
    return count_together(Source(dataset, StepDataset(dataset), collate, column), control)


def lengths_of(dataset: Any, collator: Any = None) -> list[int]:
    found = counted(dataset, collator).samples
    assert found is not None
    return found.lengths.tolist()


def appending(examples: list[Any]) -> dict[str, Any]:
    """A collator that appends a token."""
    return {"input_ids": torch.tensor([[*examples[0]["input_ids"], 2]])}


def halving(examples: list[Any]) -> dict[str, Any]:
    """One that keeps half of a row, rounded up."""
    ids = examples[0]["input_ids"]
    return {"input_ids": torch.tensor([ids[: (len(ids) + 1) // 2]])}


@pytest.mark.parametrize("kind", ["list", "table", "table with lengths", "table with a transform"])
@pytest.mark.parametrize(("collator", "tokens"), [(None, [3, 1, 4]), (appending, [4, 2, 5]), (halving, [2, 1, 2])])
def test_what_the_collator_makes_counts(kind: str, collator: Any, tokens: list[int]) -> None:
    """The number of tokens is that of what is trained on, whatever the dataset or a length column say."""
    dataset: Any = [{"input_ids": [7] * n} for n in (3, 1, 4)]
    if kind != "list":
        dataset = datasets.Dataset.from_list(dataset)
    if kind == "table with lengths":
        dataset = dataset.add_column("length", [3, 1, 4])
    if kind == "table with a transform":
        dataset = dataset.add_column("length", [9, 9, 9]).with_transform(
            lambda batch: {"input_ids": batch["input_ids"]}
        )
    assert lengths_of(dataset, collator) == tokens


def test_a_column_spares_reading() -> None:
    """A length column that agrees with the rows that are tried is believed, beside a transform and a collator, too."""
    asked: list[int] = []

    def look(batch: dict[str, Any]) -> dict[str, Any]:
        asked.extend(map(len, batch["input_ids"]))
        return {"input_ids": [row[:5] for row in batch["input_ids"]]}

    table = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in range(1, 101)]})
    table = table.add_column("tokens", [1 + min(n, 5) for n in range(1, 101)]).with_transform(look)
    found = counted(table, appending, "tokens")
    assert (found.column, len(asked)) == ("tokens", 10)
    assert counted(table, appending, "length").column is None
    assert len(asked) > 100


def test_rows_of_another_length_at_each_read() -> None:
    """They cannot be planned, and are refused by the name of the dataset, or of the collator, at the start."""

    class Growing(Rows):
        def __getitem__(self, row: int) -> dict[str, Any]:
            self.lengths[row] += 1
            return super().__getitem__(row)

    with pytest.raises(BadSample, match=r"Row 0 had 2 tokens .* and 3 the next time.*Growing give a row the same"):
        counted(Growing([1, 2]))
    sizes = iter(range(1, 100))
    with pytest.raises(BadSample, match=r"and the collator .*<lambda> give a row the same"):
        counted(Rows([1, 2]), lambda _: {"input_ids": torch.ones(1, next(sizes))})


def test_counting_leaves_generators_alone() -> None:
    """Rows that draw from the generators that training draws from do not move them while they are counted."""

    class Drawing(Rows):
        def __getitem__(self, row: int) -> dict[str, Any]:
            token = int(torch.randint(9, ())) + random.randrange(9) + int(np.random.randint(9))
            return {"input_ids": [token] * self.lengths[row]}

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())]

    before = state()
    counted(Drawing([1, 2, 3]))
    assert state() == before


def test_rows_that_are_compared() -> None:
    """All of a small dataset; of a large one its first, its last, and some between."""
    assert spread(0, 8) == []
    assert spread(3, 8) == [0, 1, 2]
    assert spread(1_000_000, 4) == [0, 333_333, 666_666, 999_999]


# -------------------------------------------------------------------------------------------------------- ranks


def test_fractions_are_compared() -> None:
    """Rows with the same tokens and other numbers for labels are other rows; what is no number at all can be told."""
    values = [[0.25, 1.0], [0.75, 1.0], [0, 1], 0.25, 0.75, float("nan")]
    contents = {_content({"input_ids": [5, 6], "labels": value}) for value in values}
    assert len(contents) == len(values)


def count_on_ranks(kind: str) -> Any:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    lengths = [1 + (row * 7) % 11 for row in range(COMPARED + 400)]
    if kind == "large":
        data = Rows(lengths)
        found = counted(data)
        assert (found.samples is None) == (rank > 0)
        assert found.samples is None or found.samples.lengths.tolist() == lengths
        return len(data.asked)
    table = datasets.Dataset.from_dict({"input_ids": [[row] * n for row, n in enumerate(lengths[:40])]})
    kinds: dict[str, Any] = {
        "split without a seed": lambda: Rows(random.Random(rank).sample(lengths, 40)),
        "a filter": lambda: Rows(lengths[: 40 - rank]),
        "a shard": lambda: table.shard(num_ranks, rank),
        "shuffled tables": lambda: table.shuffle(seed=rank),
        "other rows as long": lambda: Rows([5] * 40, first=rank),
        "other tables as long": lambda: datasets.Dataset.from_dict({"input_ids": [[rank] * 5] * 40}),
        "other columns": lambda: table.add_column("length", [n + rank for n in lengths[:40]]),
        "an error": lambda: Rows(lengths[:20] + [0] * rank + lengths[20:40] + [1] * (1 - rank)),
        "the same table made twice": lambda: table.add_column("made_on", [rank] * 40).remove_columns("made_on"),
    }
    return counted(kinds[kind]()).num_rows


@pytest.mark.parametrize(
    ("kind", "said"),
    often(
        [
            ("split without a seed", "Row 0 of the dataset differs between ranks: rank 1 reads"),
            ("a filter", "differs between ranks: rank 1 has 39 rows, rank 0 40"),
            ("a shard", "of the dataset differs between ranks: rank 1 reads"),
            ("shuffled tables", "of the dataset differs between ranks: rank 1 reads"),
            ("other rows as long", "Row 0 of the dataset differs between ranks: rank 1 reads other tokens"),
            ("other tables as long", "Row 0 of the dataset differs between ranks: rank 1 reads other tokens"),
            ("other columns", "lengths of rows differ between ranks: rank 1"),
        ],
        ("a filter", "differs between ranks: rank 1 has 39 rows, rank 0 40"),
        ("shuffled tables", "of the dataset differs between ranks: rank 1 reads"),
        ("other columns", "lengths of rows differ between ranks: rank 1"),
    ),
)
def test_other_data_on_another_rank(kind: str, said: str) -> None:
    """What is not the same on all ranks is named at the start, on all of them, with a remedy."""
    errors = run_ranks(count_on_ranks, 2, kind, expect_errors=True)
    assert {type(error) for error in errors} == {ConfigError}, errors
    assert all(said in str(error) for error in errors), errors
    assert all("same order" in str(error) for error in errors), errors


def test_what_fails_on_one_rank() -> None:
    """A row that only one rank cannot use stops all of them, with its words."""
    errors = run_ranks(count_on_ranks, 2, "an error", expect_errors=True)
    assert all(isinstance(error, HeteroError) for error in errors)
    assert all("Row 20 has 0 tokens" in str(error) for error in errors)


def test_the_same_data() -> None:
    """Tables made twice differ in their fingerprints alone: their rows decide."""
    assert run_ranks(count_on_ranks, 2, "the same table made twice") == [40, 40]


def test_ranks_read_a_share_each() -> None:
    """Of a large dataset a rank reads what is compared, and its share: not all of it."""
    for read in run_ranks(count_on_ranks, 2, "large"):
        assert COMPARED < read < COMPARED + (COMPARED + 400) // 2 + 20


def count_slowly() -> list[int]:
    control = GroupPool((), 3, 3).control
    data = Rows([1, 2, 3, 4, 5, 6], seconds=1.0 if dist.get_rank() == 0 else 0.0)
    source = Source(data, StepDataset(data), PackedCollator(), "length")
    found = count_together(source, control).samples
    return [] if found is None else found.lengths.tolist()


def test_waiting_is_not_a_fault() -> None:
    """A rank that reads for longer than the others may wait for a message does not lose them."""
    assert run_ranks(count_slowly, 2) == [[1, 2, 3, 4, 5, 6], []]
