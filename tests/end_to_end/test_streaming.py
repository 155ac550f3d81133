"""Training on a stream: the learning of one process, whatever the ranks; and resumed where it was left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
)
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_hetero import HeteroConfig, HeteroError
from hf_hetero.checkpoint import RUN_FILE
from hf_hetero.collators import PackedCollator

ROWS = samples(LENGTHS)  # 24: two steps of 10, and one of 4
STEPS = [range(10), range(10, 20), range(20, 24)]


class Once(IterableDataset[Any]):
    """A generator: its second epoch gives nothing."""

    def __init__(self) -> None:
        self.rows = iter(ROWS)

    def __iter__(self) -> Iterator[Any]:
        return self.rows


class Nothing(IterableDataset[Any]):
    """Where only rank 0 may read, the others hold something else."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("read on a rank that should not")


def stream(kind: str) -> Any:
    table = datasets.Dataset.from_list([{**row, "source": "web"} for row in ROWS])
    if kind == "once":
        return Once() if torch.distributed.get_rank() == 0 else Nothing()
    found = table.to_iterable_dataset(num_shards=3)
    if kind == "mapped":  # as tokenisation on the fly: columns are not known before the first row is read
        found = found.map(lambda row: {"input_ids": [*row["input_ids"]], "labels": row["labels"]})
    return found.shuffle(seed=2, buffer_size=7) if kind == "shuffled" else found


class StockTrainer(Trainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, data_collator=PackedCollator())


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(
    kind: str,
    trainer_class: Any = ScriptedTrainer,
    stop_at: int | None = None,
    hetero: HeteroConfig | None = None,
    **changes: Any,
) -> dict[str, Any]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    options = {"remove_unused_columns": True, "max_steps": 5, "save_strategy": "steps", "save_steps": 1000, **changes}
    model = tiny_model(dtype=torch.float64)
    options["per_device_train_batch_size"] = 10 // world
    found = trained(model, stream(kind), trainer_class, hetero=hetero, callbacks=[StopAt(stop_at)], **options)
    return {**found, "losses": [entry["loss"] for entry in found["logs"] if "loss" in entry]}


def run_given(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    return run(kind, **changes)


def expected(steps: Any) -> dict[str, Any]:
    return reference_steps(tiny_model(dtype=torch.float64), ROWS, steps)


def check_equal(found: dict[str, Any], reference: dict[str, Any], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(found["gradients"], reference["gradients"], strict=True):
        assert largest_difference(mine, theirs) < tolerance
    assert largest_difference(found["weights"], reference["weights"]) < tolerance


@pytest.mark.parametrize(("num_ranks", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_learns_as_one_process_does(num_ranks: int, workers: int) -> None:
    """Each step's gradients are those of its samples, one by one; a stream that ends is started anew."""
    reference = expected([*STEPS, *STEPS[:2]])
    for found in run_ranks(run_given, num_ranks, "mapped", {"dataloader_num_workers": workers}):
        check_equal(found, reference)
    # the comparison can fail: other rows in one step are seen
    with pytest.raises(AssertionError):
        check_equal(found, expected([*STEPS, range(9), STEPS[1]]))


def test_same_steps_as_trainer() -> None:
    """One process of transformers' Trainer, on the same stream, takes the same steps."""
    theirs = run("shuffled", StockTrainer)
    ours = run_ranks(run_given, 2, "shuffled", {})[0]
    check_equal(ours, theirs, 1e-6)  # Trainer's loss is computed in fp32


def test_a_stream_that_ends_for_good() -> None:
    """A generator is read once, on rank 0 alone; training ends with it, on all ranks, with nothing lost."""
    for found in run_ranks(run_given, 2, "once", {}):
        check_equal(found, expected(STEPS))


def broken(num_good: int) -> str:
    class Broken(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from ROWS[:num_good]
            raise OSError("the connection is gone")

    try:
        trained(tiny_model(), Broken(), ScriptedTrainer, per_device_train_batch_size=5)
    except HeteroError as error:
        return str(error)
    return "no error"


def test_a_broken_stream_is_named_on_all_ranks() -> None:
    """What the source raises on rank 0 ends all ranks with the same words."""
    first, second = run_ranks(broken, 2, 14)
    assert first == second
    assert "Reading the stream for step 1 failed: OSError: the connection is gone" in first


@pytest.mark.parametrize("kind", ["mapped", "shuffled"])
@pytest.mark.parametrize("stop_at", [2, 4])
def test_resumes_where_it_was(tmp_path: Path, kind: str, stop_at: int) -> None:
    """Stopped in the first epoch or the second: the same samples follow, and the weights are bit-equal."""
    whole = run_ranks(run_given, 2, kind, {"output_dir": str(tmp_path / "whole")})
    folder = str(tmp_path / "parts")
    run_ranks(run_given, 2, kind, {"output_dir": folder, "stop_at": stop_at})
    again = {"output_dir": folder, "resume": f"{folder}/checkpoint-{stop_at}"}
    rest = run_ranks(run_given, 2, kind, again)
    assert rest[0]["losses"] == whole[0]["losses"]
    for mine, theirs in zip(rest, whole, strict=True):
        assert all(torch.equal(mine["weights"][name], theirs["weights"][name]) for name in theirs["weights"])


def test_resumes_without_a_position(tmp_path: Path) -> None:
    """A checkpoint that does not say where the stream was, as Trainer's own: it is read again up to there."""
    folder = str(tmp_path)
    run_ranks(run_given, 2, "mapped", {"output_dir": folder, "stop_at": 4})
    (tmp_path / "checkpoint-4" / RUN_FILE).unlink()
    rest = run_ranks(run_given, 2, "mapped", {"output_dir": folder, "resume": f"{folder}/checkpoint-4"})[0]
    assert largest_difference(rest["weights"], expected([*STEPS, *STEPS[:2]])["weights"]) < 1e-12


def limited(policy: str) -> int:
    hetero = HeteroConfig(max_sample_tokens=16, longer_samples=policy)
    return run("mapped", hetero=hetero, include_num_input_tokens_seen="all", max_steps=3)["state"]["tokens"]


@pytest.mark.parametrize(
    ("policy", "tokens"), [("truncate", sum(min(n, 16) for n in LENGTHS)), ("split", sum(LENGTHS))]
)
def test_longer_samples(policy: str, tokens: int) -> None:
    """The user's policy for longer samples holds for streams, too."""
    assert run_ranks(limited, 2, policy) == [tokens] * 2


def test_needs_max_steps() -> None:
    """A stream has no length; transformers says so."""
    with pytest.raises(ValueError, match="max_steps"):
        run("mapped", max_steps=-1, num_train_epochs=1)
