"""What goes wrong has a name, a value and a remedy, on every rank, before anything hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch.distributed as dist
from helpers import (
    LENGTHS,
    ScriptedPlanner,
    ScriptedTrainer,
    arguments,
    run_ranks,
    samples,
    scripted,
    tiny_model,
    trained,
)
from torch.utils.data import get_worker_info

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, InfeasibleBatch, Plan
from hf_hetero.collators import PackedCollator
from hf_hetero.errors import BadSample, CollectiveFailed, ConfigError, PlanMismatch


def train_on(data: list[dict[str, Any]], config: dict[str, Any], changes: dict[str, Any]) -> None:
    trained(tiny_model(), data, trainer_class=HeteroTrainer, hetero=HeteroConfig(**config), **changes)


def errors_of(function: Any, *args: Any, num_ranks: int = 2) -> list[Any]:
    errors = run_ranks(function, num_ranks, *args, expect_errors=True, timeout_s=100)
    assert all(isinstance(error, HeteroError) for error in errors), errors
    return errors


def with_change(row: int, **change: Any) -> list[dict[str, Any]]:
    data = samples(LENGTHS)
    for key, value in change.items():
        if value is None:
            del data[row][key]
        else:
            data[row][key] = value
    return data


def test_no_input_ids() -> None:
    """A row without input_ids is named when tokens are counted; both ranks say so."""
    errors = errors_of(train_on, with_change(5, input_ids=None), {}, {})
    assert {type(error) for error in errors} == {BadSample}
    assert "Row 5 has no input_ids, only ['labels']. Tokenise" in str(errors[1])


def test_empty_sample() -> None:
    """So is an empty sample."""
    errors = errors_of(train_on, with_change(9, input_ids=[], labels=[]), {}, {})
    assert {type(error) for error in errors} == {BadSample}
    assert "Row 9 has 0 tokens. Filter" in str(errors[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_another_length(workers: int) -> None:
    """One rank reads the bad sample, in its own process or in a worker's; all ranks stop, and name it."""
    data = with_change(7, labels=[1, 2, 3])
    errors = errors_of(train_on, data, {}, {"dataloader_num_workers": workers})
    assert all("row 7 has 64 input_ids but 3 labels" in str(error) for error in errors), errors


@pytest.mark.parametrize(("key", "what"), [("input_ids", "token"), ("labels", "label")])
def test_a_token_that_the_model_does_not_have(key: str, what: str) -> None:
    """Before any kernel has run, every rank names the row, the token and the vocabulary."""
    values = list(samples(LENGTHS)[7]["input_ids"])
    values[5] = 97
    for error in errors_of(train_on, with_change(7, **{key: values}), {}, {}):
        assert f"row 7 has {what} 97 at position 5, but the model has 97: 0 to 96" in str(error)


def train_dynamic(lengths: list[int], streamed: bool) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    data = samples(lengths)
    trained(
        tiny_model(rope_parameters=rope, max_position_embeddings=16),
        datasets.Dataset.from_list(data).to_iterable_dataset() if streamed else data,
        trainer_class=HeteroTrainer,
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_a_rotary_table_that_would_stay_grown(streamed: bool) -> None:
    """Samples that leave it as it is are learned from; one that would not is refused by its row and its tokens."""
    short = [length % 16 + 1 for length in LENGTHS]
    run_ranks(train_dynamic, 2, short, streamed)
    for error in errors_of(train_dynamic, [*short[:7], 17, *short[8:]], streamed):
        assert "ow 7 is 17 tokens long, more than 16" in str(error)
        assert "rotary table (rope_type 'dynamic')" in str(error)


def test_a_sample_no_degree_can_hold() -> None:
    """The longest sample has 64 tokens, the ranks hold 2 x 20: row, length and limits are named, on all ranks."""
    errors = errors_of(train_on, samples(LENGTHS), {"max_tokens_per_rank": 20}, {})
    assert {type(error) for error in errors} == {InfeasibleBatch}
    assert "64 tokens" in str(errors[1])
    assert "20 tokens a rank" in str(errors[1])


def test_missing_cost_model() -> None:
    """A cost model that is not there is named, on all ranks."""
    errors = errors_of(train_on, samples(LENGTHS), {"cost_model": "nowhere.json"}, {})
    assert {type(error) for error in errors} == {ConfigError}
    assert "nowhere.json" in str(errors[0])


def test_wrong_number_of_ranks() -> None:
    """A recipe for 4 ranks does not start on 2."""
    errors = errors_of(train_on, samples(LENGTHS), {"num_ranks": 4}, {})
    assert "written for 4 ranks" in str(errors[0])
    assert "has 2" in str(errors[0])


class OtherPlan(ScriptedTrainer):
    """Rank 1 swaps two groups of what it was given."""

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        sampler: Any = self._training.data.loader.batch_sampler  # pyright: ignore
        if dist.get_rank() == 1:
            given = sampler._plan_step
            sampler._plan_step = lambda *key: altered(given(*key))
        return super()._init_training_state(*args, **kwargs)


def altered(step: Any) -> Any:
    from dataclasses import replace

    data = step.plan.to_dict()
    groups = [group for m in data["micro_batches"] for group in m["groups"]]
    groups[0]["samples"].reverse()
    return replace(step, plan=Plan.from_dict(data))


def train_with_other_plan() -> None:
    trained(tiny_model(), samples(LENGTHS), trainer_class=OtherPlan)


def test_plans_that_differ() -> None:
    """A rank with another plan is found before the first exchange: a named error on all ranks, at once."""
    errors = errors_of(train_with_other_plan)
    assert {type(error) for error in errors} == {PlanMismatch}
    assert "Step 1" in str(errors[0])


class SleepyRank(ScriptedTrainer):
    """Rank 1 falls asleep in its second micro-batch."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and inputs["hetero"].micro_batch == 1:
            time.sleep(15)
        return super().compute_loss(model, inputs, **kwargs)

    def _plan_source(self) -> Any:
        class Whole(ScriptedPlanner):
            def plan(self, lengths: Any) -> Plan:
                half = len(lengths) // 2
                groups = [
                    {"groups": [{"ranks": [0, 1], "samples": list(range(half)), "method": "ulysses"}]},
                    {"groups": [{"ranks": [0, 1], "samples": list(range(half, len(lengths))), "method": "ulysses"}]},
                ]
                return Plan.from_dict({"format": "hf-hetero-plan/1", "num_ranks": 2, "micro_batches": groups})

        return scripted(Whole(2))


def train_sleepily() -> None:
    trained(tiny_model(), samples(LENGTHS), trainer_class=SleepyRank, hetero=HeteroConfig(group_timeout_s=4))


def test_a_group_operation_that_waits_too_long() -> None:
    """The waiting rank ends within its timeout and names step, micro-batch, layer, ranks and operation."""
    error = run_ranks(train_sleepily, 2, expect_errors=True, timeout_s=60)[0]
    assert isinstance(error, CollectiveFailed)
    for words in ("Ulysses all-to-all", "step 1", "micro-batch 1", "layer 0", "ranks [0, 1]", "group_timeout_s"):
        assert words in str(error), str(error)


def test_planned_lengths_that_are_wrong() -> None:
    """A length column that does not count the tokens is found by the rank that reads the sample."""
    import datasets

    data = samples(LENGTHS)
    dataset = datasets.Dataset.from_list(
        [{**row, "length": len(row["input_ids"]) + (i == 3)} for i, row in enumerate(data)]
    )
    errors = errors_of(train_on, dataset, {}, {})
    assert all("row 3 has 1 tokens but was planned with 2" in str(error) for error in errors), errors


def test_a_dataset_of_the_other_kind(tmp_path: Path) -> None:
    """Without ranks the errors are the same."""
    trainer = HeteroTrainer(
        tiny_model(), arguments(str(tmp_path), 1), train_dataset=[{"text": "no tokens"}], data_collator=PackedCollator()
    )
    with pytest.raises(BadSample, match=r"Row 0 has no input_ids, only \['text'\]"):
        trainer.train()


class DrawnAnew(list[Any]):
    """Samples whose tokens, or labels, are drawn at each read by a generator of each rank's own."""

    def __init__(self, data: list[dict[str, Any]], key: str) -> None:
        super().__init__(data)
        self.key, self.generator = key, random.Random()

    def __getitem__(self, row: Any) -> Any:
        sample = list.__getitem__(self, row)
        return {**sample, self.key: [self.generator.randrange(3, 97) for _ in sample[self.key]]}


@pytest.mark.parametrize(("key", "workers"), [("input_ids", 0), ("labels", 2)])
def test_samples_that_are_drawn_anew(key: str, workers: int) -> None:
    """Ranks that share a row would compute on halves of two samples: refused on all, with the row and the remedy."""
    config = {"max_tokens_per_rank": 40}  # the longest have to be shared
    for error in errors_of(train_on, DrawnAnew(samples(LENGTHS), key), config, {"dataloader_num_workers": workers}):
        assert type(error) is BadSample
        assert "differs between the ranks that share it: ranks [0] and ranks [1]" in str(error)
        assert "seed it by the row's index" in str(error)


def test_samples_that_are_drawn_anew_but_not_shared() -> None:
    """What one rank alone holds may be drawn anew, as under Trainer."""
    run_ranks(train_on, 2, DrawnAnew(samples(LENGTHS), "input_ids"), {"max_degree": 1}, {}, timeout_s=100)


class Dies(list[Any]):
    """In a worker of rank 1 the reader is killed, after the other rank had time to ask for its next plan."""

    read = 0

    def __getitem__(self, row: Any) -> Any:
        if get_worker_info() is not None and dist.get_rank() == 1:
            self.read += 1
            if self.read == 9:
                time.sleep(2)
                os.kill(os.getpid(), signal.SIGKILL)
        return list.__getitem__(self, row)


def test_a_worker_that_is_killed() -> None:
    """By the system that is short of memory, for one: every rank says so, at once."""
    errors = errors_of(train_on, Dies(samples(LENGTHS)), {}, {"dataloader_num_workers": 1})
    assert all("Rank 1: RuntimeError: DataLoader worker" in str(error) for error in errors), errors
