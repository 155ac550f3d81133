"""Training on a stream: the learning of one process, whatever the ranks; and resumed where it was left."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
)
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer
from hf_hetero.collators import PackedCollator
from hf_hetero.errors import BadSample
from hf_hetero.trainer.checkpoints.checkpoint import RUN_FILE

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


@pytest.mark.parametrize(("num_ranks", "workers"), often([(1, 0), (2, 0), (2, 2)], (1, 0), (2, 2)))
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


@pytest.mark.parametrize(("kind", "stop_at"), often(product(("mapped", "shuffled"), (2, 4)), ("shuffled", 4)))
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


class Events(TrainerCallback):
    """What `Trainer` says when, with the epoch it says it is in."""

    def __init__(self, leaves_epoch_at: int | None = None) -> None:
        self.found: list[tuple[Any, ...]] = []
        self.leaves_epoch_at = leaves_epoch_at

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(("begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(("step", state.global_step, state.epoch))
        control.should_epoch_stop = state.global_step == self.leaves_epoch_at

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(("end", state.global_step, state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(("save", state.global_step))


class Rows(IterableDataset[Any]):
    """As many rows as it is told; another order each epoch, so that epochs can be told apart."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows, self.epoch = num_rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS[: self.num_rows] if self.epoch % 2 else ROWS[: self.num_rows][::-1])


class SizedRows(Rows):
    """Knows its length."""

    def __len__(self) -> int:
        return self.num_rows


def events(
    trainer_class: Any, data: Any, resume: Any = None, leaves_epoch_at: int | None = None, **options: Any
) -> Any:
    said = Events(leaves_epoch_at)
    model = tiny_model(dtype=torch.float64)
    options = {"per_device_train_batch_size": 10, "max_steps": 8, **options}
    found = trained(model, data, trainer_class, callbacks=[said], resume=resume, **options)
    return said.found, found


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (Rows(24), {}),
        (Rows(30), {}),
        (Rows(24), {"dataloader_drop_last": True}),
        (Rows(24), {"leaves_epoch_at": 2}),
        (Rows(24), {"leaves_epoch_at": 3}),
        (Rows(24), {"dataloader_num_workers": 1}),
        (SizedRows(24), {}),
        (SizedRows(30), {"max_steps": -1, "num_train_epochs": 2}),
        (SizedRows(24), {"max_steps": -1, "num_train_epochs": 2, "leaves_epoch_at": 2}),
    ],
)
def test_epochs_are_those_of_trainer(tmp_path: Path, data: Any, options: dict[str, Any]) -> None:
    """Epochs begin and end, are numbered and saved after, as in plain Trainer, and steps learn from the same rows."""
    options = {"save_strategy": "epoch", **options}
    theirs, stock = events(StockTrainer, data, output_dir=str(tmp_path / "stock"), **options)
    ours, found = events(ScriptedTrainer, data, output_dir=str(tmp_path / "ours"), **options)
    assert ours == theirs
    check_equal(found, stock, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("data", [Rows(24), Rows(30), SizedRows(24)])
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_resumes_in_any_epoch(tmp_path: Path, data: Any, strategy: str) -> None:
    """From each checkpoint on, the same happens in the same epochs, and the weights end bit-equal."""
    folder = str(tmp_path)
    options = {"save_strategy": strategy, "save_steps": 1, "output_dir": folder}
    whole, expected = events(ScriptedTrainer, data, **options)
    for step in [step for kind, step, *_ in whole if kind == "save"][:-1]:
        resumed, found = events(ScriptedTrainer, data, f"{folder}/checkpoint-{step}", **options)
        follows = whole[max(n for n, event in enumerate(whole) if event == ("save", step)) + 1 :]
        if isinstance(data, SizedRows) and follows[0][0] == "end":
            follows = follows[1:]  # Trainer, too, resumes data of a known length in the next epoch
        assert resumed[follows[0][0] != "begin" :] == follows  # an epoch is begun again in its middle
        assert all(torch.equal(found["weights"][name], x) for name, x in expected["weights"].items())


def unpicklable(options: dict[str, Any]) -> str:
    class Handles(Rows):
        def __iter__(self) -> Iterator[Any]:
            for number, row in enumerate(super().__iter__()):
                yield {**row, "handle": (n for n in range(3))} if number == 13 else row

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    try:
        trained(tiny_model(), Handles(24), per_device_train_batch_size=10 // world, **options)
    except HeteroError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("num_ranks", "options"), [(2, {}), (1, {"dataloader_num_workers": 1})])
def test_what_cannot_travel_is_named(num_ranks: int, options: dict[str, Any]) -> None:
    """An example that cannot be handed to another process ends every rank with its row, instead of a wait."""
    for found in run_ranks(unpicklable, num_ranks, options):
        assert "Row 13 of the stream, with ['handle', 'input_ids', 'labels'], cannot be handed" in found
    assert unpicklable({}) == "no error"


def split(kind: str) -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    table = datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=4)
    data = split_dataset_by_node(table, rank, world)
    try:
        trained(tiny_model(), data, per_device_train_batch_size=5)
    except HeteroError as error:
        return str(error)
    return "no error"


def test_a_split_stream_is_refused() -> None:
    """On every rank, with the remedy."""
    for found in run_ranks(split, 2, "stream"):
        assert "split by split_dataset_by_node(rank=0, world_size=2)" in found
        assert "without the split" in found


def test_needs_max_steps() -> None:
    """A stream has no length; transformers says so."""
    with pytest.raises(ValueError, match="max_steps"):
        run("mapped", max_steps=-1, num_train_epochs=1)


def padded_on_the_left(batch_size: int, labels_first: bool) -> Any:
    def pad_left(examples: list[Any]) -> Any:
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        found: dict[str, list[Any]] = {name: [] for name in fill}
        for example in examples:
            ids = list(example["input_ids"])
            row = {
                "input_ids": ids,
                "labels": ids if labels_first else [-100, *ids[1:]],
                "attention_mask": [1] * len(ids),
            }
            for name, values in row.items():
                found[name].append([fill[name]] * (longest - len(values)) + values)
        return {name: torch.tensor(values) for name, values in found.items()}

    class Padding(HeteroTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, data_collator=pad_left)

    rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return trained(tiny_model(), rows, Padding, per_device_train_batch_size=batch_size // world, max_steps=2)["logs"]


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(2, 10), (1, 1)])
def test_a_collator_that_pads_on_the_left(num_ranks: int, batch_size: int) -> None:
    """It is refused as with a list: two examples of different lengths show it, in one step or in several."""
    for error in run_ranks(padded_on_the_left, num_ranks, batch_size, True, expect_errors=True):
        assert isinstance(error, BadSample)
        assert "The data_collator pads on the left" in str(error)


def test_padding_on_the_left_that_teaches_nothing() -> None:
    """Where the first token of a sample has no label, nothing is learned from the padding before it."""
    [logs] = run_ranks(padded_on_the_left, 1, 10, False)
    assert len([entry for entry in logs if "loss" in entry]) == 2
