"""A job that is started again goes on by itself, on other ranks if need be, with the samples of each step unchanged."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    LENGTHS,
    Recorder,
    arguments,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trainer_order,
    whole,
)
from transformers import Trainer, TrainerCallback

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.errors import CollectiveFailed, ConfigError
from hf_hetero.trainer.checkpoints.checkpoint import problem_of

NUM_ROWS, BATCH, NUM_STEPS = 22, 8, 8  # three steps an epoch, of which the last holds 6 rows
ROWS = samples(LENGTHS[:NUM_ROWS])


class Killed(TrainerCallback):
    """A rank is killed in a step, half through the model, where the others wait for it; or while it saves."""

    def __init__(self, rank: int, step: int, saving: bool = False) -> None:
        self.rank, self.step, self.saving = rank, step, saving

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if (args.process_index, state.global_step + 1, self.saving) == (self.rank, self.step, False):
            layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
            layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (args.process_index, state.global_step, self.saving) == (self.rank, self.step, True):
            save = torch.save

            def killed(*args: Any, **kwargs: Any) -> None:
                save(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = killed


class Trained(TrainerCallback):
    """Counts the tokens of each row that this rank computes in each step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps: dict[int, Counter[int]] = {}
        self.now: Counter[int] = Counter()
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, _: Any, args: Any, kwargs: Any) -> None:
        real = kwargs["attention_mask"].view(-1)
        self.now.update(kwargs["input_ids"].view(-1)[real].tolist())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[state.global_step], self.now = self.now, Counter()


class Said(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(folder: str, changes: dict[str, Any], hetero: dict[str, Any], killed: tuple[Any, ...] = ()) -> dict[str, Any]:
    said = Said()
    logging.getLogger("hf_hetero").addHandler(said)
    options = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **changes}
    resume = options.pop("resume", None)
    rows = samples(LENGTHS[: options.pop("num_rows", NUM_ROWS)], options.pop("data_of", 0))
    model = tiny_model(dtype=torch.float64)
    trained, recorder = Trained(model), Recorder()
    # so many rows a rank would make another batch on each number of ranks
    args = arguments(folder, 1, **{"per_device_train_batch_size": 5, **options})
    callbacks = [trained, recorder, *([Killed(*killed)] if killed else [])]
    settings = HeteroConfig(**hetero)
    trainer = HeteroTrainer(model, args, train_dataset=rows, callbacks=callbacks, hetero=settings)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "steps": trained.steps,
        "gradients": recorder.gradients,
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "state": (trainer.state.global_step, trainer.state.epoch),
        "said": "\n".join(said.lines),
    }


OWN = {"global_batch_size": BATCH, "auto_resume": True}


def tokens_of(rows: list[int]) -> Counter[int]:
    return Counter(token for row in rows for token in ROWS[row]["input_ids"])


def check_samples(ranks: list[dict[str, Any]], first: int) -> None:
    """Each step from `first` on held the rows that a plain Trainer of that batch takes, each token once."""
    order = trainer_order(NUM_ROWS, BATCH, 7, NUM_STEPS)
    assert set(ranks[0]["steps"]) == set(range(first, NUM_STEPS + 1))
    for step in ranks[0]["steps"]:
        assert sum((rank["steps"][step] for rank in ranks), Counter()) == tokens_of(order[step - 1]), step


# --------------------------------------------------------------------------------------------------- the global batch


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_step_is_the_same_on_any_ranks(tmp_path: Path, num_ranks: int) -> None:
    """With a global batch, samples, gradients and epochs are those of one process, also where 3 ranks do not divide it.

    Without one, 3 ranks take others.
    """
    changes = {"optim": "sgd", "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    ranks = run_ranks(run, num_ranks, str(tmp_path), changes, {"global_batch_size": BATCH})
    steps = trainer_order(NUM_ROWS, BATCH, 7, 6)
    expected = reference_steps(tiny_model(dtype=torch.float64), ROWS, steps)
    for rank in ranks:
        assert rank["state"] == (6, 2.0)
        assert len(rank["gradients"]) == 6
        for found, gradients in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(found, gradients) < 1e-12
    for step, rows in enumerate(steps, 1):
        assert sum((rank["steps"][step] for rank in ranks), Counter()) == tokens_of(rows)
    if num_ranks == 3:
        by_ranks = run_ranks(run, num_ranks, str(tmp_path), changes, {})
        assert by_ranks[0]["state"] == (4, 2.0)
        assert largest_difference(by_ranks[0]["weights"], ranks[0]["weights"]) > 1e-6


@pytest.mark.parametrize(
    ("changes", "steps_an_epoch"),
    [
        pytest.param({"gradient_accumulation_steps": 2}, 3, marks=pytest.mark.slow),
        ({"gradient_accumulation_steps": 8, "logging_steps": 2}, 3),
        pytest.param({"dataloader_drop_last": True}, 2, marks=pytest.mark.slow),
        ({"gradient_accumulation_steps": 4, "dataloader_drop_last": True}, 3),
    ],
)
def test_counts_are_those_of_one_process(tmp_path: Path, changes: dict[str, Any], steps_an_epoch: int) -> None:
    """Accumulation and dropped rows are counted as one process of Trainer counts them, with a batch of that size."""
    changes = {"optim": "sgd", "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no", **changes}
    accumulation = changes.get("gradient_accumulation_steps", 1)
    own = {**changes, "per_device_train_batch_size": BATCH // accumulation}
    [plain] = run_ranks(run_plain, 1, str(tmp_path), own)
    found = run_ranks(run, 3, str(tmp_path), changes, {"global_batch_size": BATCH})[0]
    assert found["state"] == plain["state"] == (2 * steps_an_epoch, 2.0)
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert largest_difference(found["weights"], plain["weights"]) < 1e-9


def run_plain(folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own Trainer makes of it, in a single process; its collator pads."""

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        size = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {n: torch.tensor([[*r[n], *[x] * (size - len(r[n]))] for r in full]) for n, x in fill.items()}

    model = tiny_model(dtype=torch.float64)
    trainer = Trainer(model, arguments(folder, 1, **changes), data_collator=padded, train_dataset=ROWS)
    trainer.train()
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "state": (trainer.state.global_step, trainer.state.epoch),
    }


class Stream(torch.utils.data.IterableDataset[Any]):
    """The rows in their order, and how many they are."""

    def __iter__(self) -> Any:
        return iter(ROWS)

    def __len__(self) -> int:
        return NUM_ROWS


def test_counts_of_a_stream(tmp_path: Path) -> None:
    """A stream that knows its length has as many steps an epoch as the global batch makes of it."""
    model = tiny_model()
    trained = Trained(model)
    args = arguments(str(tmp_path), 1, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5)
    hetero = HeteroConfig(global_batch_size=BATCH)
    trainer = HeteroTrainer(model, args, train_dataset=Stream(), callbacks=[trained], hetero=hetero)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.epoch) == (6, 2.0)
    parts = [range(0, 8), range(8, 16), range(16, NUM_ROWS)]
    assert trained.steps == {step: tokens_of([*parts[(step - 1) % 3]]) for step in range(1, 7)}


def test_a_batch_that_cannot_be_cut(tmp_path: Path) -> None:
    """A global batch that accumulation does not divide is refused, with both numbers."""
    args = arguments(str(tmp_path), 1, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"global_batch_size=8 does not divide by gradient_accumulation_steps=3"):
        HeteroTrainer(tiny_model(), args, train_dataset=ROWS, hetero=HeteroConfig(global_batch_size=8))


# ------------------------------------------------------------------------------------------------------- by itself


@pytest.mark.slow
def test_fewer_ranks_then_more(tmp_path: Path) -> None:
    """Of 4 ranks one is killed in a step, of 3 that go on another: 4 again end as a run that nothing happened to.

    Each step that stayed held its samples once.
    """
    undisturbed = run_ranks(run, 4, str(tmp_path / "whole"), {}, {"global_batch_size": BATCH})
    check_samples(undisturbed, 1)
    folder = str(tmp_path / "parts")
    first = run_ranks(run, 4, folder, {}, OWN, (2, 4), expect_errors=True)
    assert first[2] is None
    assert all(isinstance(one, CollectiveFailed) for one in (first[0], first[1], first[3]))
    second = run_ranks(run, 3, folder, {}, OWN, (0, 6), expect_errors=True)
    assert second[0] is None
    assert all(isinstance(one, CollectiveFailed) for one in second[1:])
    last = run_ranks(run, 4, folder, {}, OWN)
    check_samples(last, 5)
    assert "Going on from" in last[0]["said"]
    assert "checkpoint-4, on 4 ranks, 3 before" in last[0]["said"]
    assert last[0]["losses"] == pytest.approx(undisturbed[0]["losses"], abs=1e-6)  # logged as fp32
    assert largest_difference(last[0]["weights"], undisturbed[0]["weights"]) < 1e-9


def test_nothing_whole_yet(tmp_path: Path) -> None:
    """Killed before the first checkpoint: the job begins at the start, and says so."""
    ended = run_ranks(run, 2, str(tmp_path), {}, OWN, (1, 1), expect_errors=True)
    assert ended[1] is None
    again = run_ranks(run, 2, str(tmp_path), {}, OWN)
    check_samples(again, 1)
    assert f"No whole checkpoint in {tmp_path}: training begins at the start" in again[0]["said"]


@pytest.mark.slow
def test_half_written(tmp_path: Path) -> None:
    """Killed while it saves: the checkpoint before it is taken, in words, and what was cut short is written anew.

    Nothing is left in it of the ranks that wrote it before.
    """
    ended = run_ranks(run, 3, str(tmp_path), {}, OWN, (0, 4, True), expect_errors=True)
    assert ended[0] is None
    assert problem_of(tmp_path / "checkpoint-4") == "its writing was cut short"
    (tmp_path / "checkpoint-4" / "rng_state_2.pth").touch()  # if that rank did not come to it
    again = run_ranks(run, 2, str(tmp_path), {}, OWN)
    check_samples(again, 3)
    assert "checkpoint-2. Passed over: checkpoint-4: its writing was cut short." in again[0]["said"]
    assert problem_of(tmp_path / "checkpoint-4") is None
    states = sorted(path.name for path in (tmp_path / "checkpoint-4").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


def test_at_its_end(tmp_path: Path) -> None:
    """Started again after its last step, in the middle of an epoch, a run trains nothing more."""
    ended = run(str(tmp_path), {}, OWN)
    again = run(str(tmp_path), {}, OWN)
    assert again["steps"] == {}
    assert again["state"] == ended["state"] == (NUM_STEPS, NUM_STEPS / 3)
    assert largest_difference(again["weights"], ended["weights"]) == 0


SHORT = {"max_steps": 2}
OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 0.01}, {}, r"its run had learning_rate=0.05, and this one has 0.01\. To go on from it, ask"),
    ({"seed": 8}, {}, "its run had seed=7, and this one has 8"),
    ({"data_of": 1}, {}, "Row 0 of the data holds other tokens.*if that was another run, choose another output_dir"),
    ({"num_rows": 20}, {}, "rows was 22 when the checkpoint was written and is 20"),
    ({}, {"global_batch_size": 6}, "batch_size was 8.*HeteroConfig.global_batch_size=8 keeps it so on any number"),
    ({"ignore_data_skip": True}, {}, "ignore_data_skip=True would begin its data anew"),
]


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    """What learns otherwise, or from other data, is another run: it is refused, and never gone on from."""
    run(str(tmp_path), SHORT, OWN)
    for changes, hetero, words in OTHERS:
        with pytest.raises(ConfigError, match=words):
            run(str(tmp_path), {**SHORT, **changes}, {**OWN, **hetero})
    assert run(str(tmp_path), SHORT, OWN)["steps"] == {}  # its own


@pytest.mark.parametrize("changes", [{"learning_rate": 0.01}, {"data_of": 1}])
def test_a_checkpoint_of_another_run_on_all_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The refusal is the same on all ranks, before and after their data are open."""
    run(str(tmp_path), SHORT, OWN)
    for error in run_ranks(run, 2, str(tmp_path), {**SHORT, **changes}, OWN, expect_errors=True):
        assert isinstance(error, ConfigError)
        assert "choose another output_dir" in str(error)


def test_a_checkpoint_of_a_plain_trainer(tmp_path: Path) -> None:
    """It does not say whose it is, so it is not gone on from unasked."""
    run_plain(str(tmp_path), {"save_strategy": "steps", "save_steps": 2, **SHORT, "per_device_train_batch_size": BATCH})
    with pytest.raises(ConfigError, match="it does not say by which settings its run learned"):
        run(str(tmp_path), SHORT, OWN)


def test_only_where_it_is_wanted(tmp_path: Path) -> None:
    """Without the setting, or with `False`, training begins at the start; a checkpoint that is asked for is taken."""
    folder, four = str(tmp_path), {"max_steps": 4}
    run(folder, four, OWN)
    for changes, hetero in [({}, {"global_batch_size": BATCH}), ({"resume": False}, OWN)]:
        assert set(run(folder, {**four, **changes}, hetero)["steps"]) == {1, 2, 3, 4}, changes
    asked = run(folder, {**four, "learning_rate": 0.01, "resume": f"{folder}/checkpoint-2"}, OWN)
    assert set(asked["steps"]) == {3, 4}  # who asks for a checkpoint may learn otherwise from there on


def test_a_second_run_of_a_trainer_is_its_own(tmp_path: Path) -> None:
    """A trainer that has trained begins at the start when it is asked to train once more."""
    args = arguments(str(tmp_path), 1, max_steps=2, save_strategy="steps", save_steps=1)
    model = tiny_model()
    trained = Trained(model)
    trainer = HeteroTrainer(model, args, train_dataset=ROWS, callbacks=[trained], hetero=HeteroConfig(auto_resume=True))
    for _ in range(2):
        trained.steps.clear()
        trainer.train()
        assert set(trained.steps) == {1, 2}


def test_says_what_could_be_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchrun has started a job again, and it begins anew beside its checkpoints, the log says what to set."""
    said = "torchrun has started this job again (TORCHELASTIC_RESTART_COUNT = 1), and it begins anew"
    assert said not in run(str(tmp_path), SHORT, {})["said"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert said in run(str(tmp_path), SHORT, {})["said"]


def kept_store(folder: str, kept: str) -> str:
    os.environ |= {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": kept}
    return run(folder, SHORT, OWN)["said"]


def test_says_what_the_launcher_would_fail_by(tmp_path: Path) -> None:
    """Where torchrun keeps the ranks' store, they could not be started again: it is said when they start first."""
    said = run_ranks(kept_store, 2, str(tmp_path), "True")
    assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said[0]
    assert "SHARE_RDZV" not in said[1]
    assert "SHARE_RDZV" not in run_ranks(kept_store, 2, str(tmp_path), "False")[0]


def test_a_node_that_does_not_see_the_checkpoint(tmp_path: Path) -> None:
    """Where output_dir is not shared between nodes, all ranks say so; none waits for one that has failed."""
    run(str(tmp_path), SHORT, OWN)
    for error in run_ranks(moved_run, 2, str(tmp_path), expect_errors=True):
        assert isinstance(error, ConfigError)
        assert "Rank 1: This node does not see the checkpoint" in str(error)


def moved_run(folder: str) -> Any:
    """On rank 1 there is no such folder, as on another machine."""
    if dist.get_rank() == 1:
        is_dir = Path.is_dir
        Path.is_dir = lambda self, *args, **kwargs: "checkpoint" not in self.name and is_dir(self, *args, **kwargs)  # pyright: ignore
    return run(folder, SHORT, OWN)
