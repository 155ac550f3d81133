"""Killed, told to stop, out of disk, spoilt, restarted elsewhere: a named end, and a resumed run that is the same."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    LENGTHS,
    MARK,
    ScriptedTrainer,
    largest_difference,
    often,
    processes_of,
    run_ranks,
    samples,
    scripted,
    tiny_model,
    trained,
)
from transformers import TrainerCallback

from hf_hetero import Group, HeteroConfig, HeteroError, HeteroTrainer, MicroBatch, Plan
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.errors import CollectiveFailed, ConfigError
from hf_hetero.ranks import last_words
from hf_hetero.trainer.checkpoints.checkpoint import problem_of
from hf_hetero.trainer.checkpoints.removing import INCOMPLETE_FILE, RUN_FILE
from hf_hetero.trainer.checkpoints.safekeeping import LOCK_FILE, claim

NUM_STEPS = 5


class Fault(TrainerCallback):
    """What goes wrong on one rank.

    Args:
        kind: "kill in step" | "kill while saving" | "terminate" | "disk" | "folder".
        rank: on which rank; -1: on none.
        step: in which step.
    """

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.process_index != self.rank or state.global_step + 1 != self.step:
            return
        if self.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "kill in step":  # half through the model, where the others wait for this rank
            layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
            layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index != self.rank or state.global_step != self.step:
            return
        if self.kind == "folder":  # not a folder
            (Path(args.output_dir) / f"checkpoint-{self.step}").touch()
        if self.kind == "disk":  # files may not grow beyond this: writing fails in the middle, as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if self.kind == "kill while saving":
            save = torch.save

            def killed(*args: Any, **kwargs: Any) -> None:
                save(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = killed


def run(folder: str, fault: tuple[str, int, int], changes: dict[str, Any]) -> dict[str, Any]:
    options = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", **changes}
    trainer_class = HeteroTrainer if options.pop("real", False) else ScriptedTrainer
    rows = samples(LENGTHS[: options.pop("num_rows", len(LENGTHS))], options.pop("data_of", 0))
    model = tiny_model(dtype=options.pop("dtype", torch.float32))
    options.setdefault("per_device_train_batch_size", 8 // dist.get_world_size())
    found = trained(model, rows, trainer_class, callbacks=[Fault(*fault)], output_dir=folder, **options)
    return {**found, "losses": [entry["loss"] for entry in found["logs"] if "loss" in entry]}


NO_FAULT = ("none", -1, 0)


def check_same(found: list[Any], whole: list[Any]) -> None:
    """The resumed run ends with the weights and the losses of the uninterrupted one, bit for bit."""
    for mine, theirs in zip(found, whole, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert all(torch.equal(mine["weights"][name], theirs["weights"][name]) for name in theirs["weights"])


def checkpoints(folder: Path) -> dict[str, str | None]:
    return {path.name: problem_of(path) for path in sorted(folder.glob("checkpoint-*"))}


@pytest.mark.parametrize(
    ("kind", "rank"),
    often(product(("kill in step", "kill while saving"), (0, 1)), ("kill in step", 1), ("kill while saving", 0)),
)
def test_killed(tmp_path: Path, kind: str, rank: int) -> None:
    """SIGKILL of a rank, in a step or while it writes: the other ends with a named error; what was whole is resumed."""
    whole = run_ranks(run, 2, str(tmp_path / "whole"), NO_FAULT, {})
    folder = tmp_path / "parts"
    ended = run_ranks(run, 2, str(folder), (kind, rank, 3), {}, expect_errors=True, timeout_s=100)
    assert ended[rank] is None  # killed
    assert isinstance(ended[1 - rank], CollectiveFailed)
    assert re.search("at step [34]|exchange", str(ended[1 - rank]))
    found = checkpoints(folder)
    assert found.pop("checkpoint-3", "its writing was cut short") == "its writing was cut short"
    assert found == {"checkpoint-1": None, "checkpoint-2": None}
    rest = run_ranks(run, 2, str(folder), NO_FAULT, {"resume": True})
    check_same(rest, whole)


class Freezes(TrainerCallback):
    """A rank stands still (SIGSTOP): half through the model of step 3, or before it."""

    def __init__(self, rank: int, is_in_model: bool) -> None:
        self.rank, self.is_in_model = rank, is_in_model

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.process_index != self.rank or state.global_step != 2:
            return
        if not self.is_in_model:
            os.kill(os.getpid(), signal.SIGSTOP)
        layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
        layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSTOP))


class AloneTrainer(HeteroTrainer):
    """Its ranks share no sample, so they meet in gradients and control messages only."""

    def _plan_source(self) -> PlanSource:
        groups = (Group((0,), tuple(range(0, 8, 2))), Group((1,), tuple(range(1, 8, 2))))
        return scripted(SimpleNamespace(plan=lambda _: Plan(2, (MicroBatch(groups),), 1.0, 1.0)))


def frozen_run(folder: str, rank: int, is_in_model: bool) -> str:
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    options = {"output_dir": folder, "max_steps": NUM_STEPS, "per_device_train_batch_size": 4}
    hetero = HeteroConfig(group_timeout_s=4, plan_ahead_steps=0)
    callbacks = [Freezes(rank, is_in_model)]
    last_words.ANSWER_S = 2.0
    try:
        trained(tiny_model(), samples(LENGTHS), AloneTrainer, hetero, callbacks=callbacks, **options)
    finally:
        os.kill(int(pids[rank]), signal.SIGKILL)
    return "never"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("is_in_model", "words"), [(True, "The exchange of gradients"), (False, "step 3: .*exchange|exchange.* at step 3")]
)
def test_frozen(tmp_path: Path, rank: int, is_in_model: bool, words: str) -> None:
    """A rank that stands still ends the other within group_timeout_s, wherever it waits, with step and limit.

    Also where it holds the store of the job, which then answers nobody.
    """
    ended = run_ranks(frozen_run, 2, str(tmp_path), rank, is_in_model, expect_errors=True, timeout_s=100)
    error = ended[1 - rank]
    assert isinstance(error, CollectiveFailed)
    assert re.search(words, str(error), re.IGNORECASE), error
    assert re.search(r"[Ss]tep 3\b", str(error))
    assert "raise HeteroConfig.group_timeout_s" in str(error)


@pytest.mark.parametrize("rank", often([0, 1], 1))
def test_told_to_stop(tmp_path: Path, rank: int) -> None:
    """SIGTERM to any rank: all save after the same step and end in good order."""
    options = {"enable_jit_checkpoint": True, "save_steps": 1000}
    whole = run_ranks(run, 2, str(tmp_path / "whole"), NO_FAULT, options)
    folder = tmp_path / "parts"
    ended = run_ranks(run, 2, str(folder), ("terminate", rank, 2), options)
    [name] = checkpoints(folder)
    assert checkpoints(folder)[name] is None
    assert name in ("checkpoint-2", "checkpoint-3")  # the step it came in, or the next one to be agreed on
    assert all(one["losses"] == whole[0]["losses"][: int(name[-1])] for one in ended)
    rest = run_ranks(run, 2, str(folder), NO_FAULT, {**options, "resume": True})
    check_same(rest, whole)


def test_not_told_to_stop(tmp_path: Path) -> None:
    """Without enable_jit_checkpoint SIGTERM does what it always does."""
    ended = run_ranks(run, 2, str(tmp_path), ("terminate", 0, 2), {"save_steps": 1000}, expect_errors=True)
    assert ended[0] is None
    assert isinstance(ended[1], CollectiveFailed)


def test_full_disk(tmp_path: Path) -> None:
    """A write that fails ends all ranks with its reason; nothing half-written stays, and what was whole is resumed."""
    whole = run_ranks(run, 2, str(tmp_path / "whole"), NO_FAULT, {})
    folder = tmp_path / "parts"
    limit = {"save_total_limit": 1}
    ended = run_ranks(run, 2, str(folder), ("disk", 0, 3), limit, expect_errors=True)
    for error in ended:
        assert type(error) is HeteroError
        assert "checkpoint-3 failed" in str(error)
        assert "too large" in str(error)
    assert checkpoints(folder) == {"checkpoint-2": None}
    rest = run_ranks(run, 2, str(folder), NO_FAULT, {**limit, "resume": True})
    check_same(rest, whole)


class Evaluated(ScriptedTrainer):
    """A run that keeps its best model, where Trainer has all ranks wait for each other while they save."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, eval_dataset=samples(LENGTHS[:6]))


def run_best(folder: str, fault: tuple[str, int, int]) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    options = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 1, **best}
    trained(tiny_model(), samples(LENGTHS), Evaluated, callbacks=[Fault(*fault)], output_dir=folder, **options)


@pytest.mark.parametrize("kind", often(["disk", "folder"], "disk"))
def test_cannot_write_where_ranks_wait(tmp_path: Path, kind: str) -> None:
    """A full disk in a run that keeps its best model, or a folder that cannot be made: its reason on all ranks."""
    ended = run_ranks(run_best, 2, str(tmp_path), (kind, 0, 3), expect_errors=True, timeout_s=100)
    for error in ended:
        assert type(error) is HeteroError
        assert "checkpoint-3 failed: " in str(error)
        assert "Older checkpoints stay" in str(error)
        assert ("too large" if kind == "disk" else "FileExistsError") in str(error)


@pytest.mark.slow
def test_two_runs_in_a_folder(tmp_path: Path) -> None:
    """A run that saves where another one does is refused on all ranks before it has touched anything."""
    (tmp_path / "plans.jsonl").touch()
    theirs = claim(tmp_path, saves=True)
    assert theirs is not None
    for error in run_ranks(run, 2, str(tmp_path), NO_FAULT, {}, expect_errors=True):
        assert isinstance(error, ConfigError)
        assert f"process {os.getpid()} on" in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, "plans.jsonl"]
    run_ranks(run, 2, str(tmp_path), NO_FAULT, {"save_strategy": "no"})  # it is told, and does no harm
    theirs.close()
    run_ranks(run, 2, str(tmp_path), NO_FAULT, {"max_steps": 1})
    assert not (tmp_path / LOCK_FILE).exists()


def spoil(folder: Path, how: str) -> None:
    if how == "truncated":
        path = folder / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (folder / RUN_FILE).unlink()
        (folder / INCOMPLETE_FILE).touch()
        (folder / "trainer_state.json").unlink()


@pytest.mark.parametrize("how", often(["truncated", "half-written"], "half-written"))
def test_spoilt_checkpoint(tmp_path: Path, how: str) -> None:
    """The one before it is used; asked for by name, it is refused on every rank with the one to take."""
    folder = str(tmp_path)
    whole = run_ranks(run, 2, folder, NO_FAULT, {})
    spoil(tmp_path / "checkpoint-5", how)
    refused = run_ranks(run, 2, folder, NO_FAULT, {"resume": f"{folder}/checkpoint-5"}, expect_errors=True)
    for error in refused:
        assert isinstance(error, ConfigError)
        assert "checkpoint-5 cannot be resumed" in str(error)
        assert f"The newest whole one is {folder}/checkpoint-4" in str(error)
    check_same(run_ranks(run, 2, folder, NO_FAULT, {"resume": True}), whole)


@pytest.mark.parametrize(("before", "after"), often([(4, 2), (2, 4), (2, 1)], (2, 1)))
def test_another_world(tmp_path: Path, before: int, after: int) -> None:
    """On other ranks plans differ, learning does not, as long as a step holds the same samples."""
    options = {"dtype": torch.float64, "real": True}
    whole = run_ranks(run, before, str(tmp_path / "whole"), NO_FAULT, options)[0]
    folder = str(tmp_path / "parts")
    run_ranks(run, before, folder, NO_FAULT, {**options, "max_steps": 3})
    rest = run_ranks(run, after, folder, NO_FAULT, {**options, "resume": True})[0]
    assert rest["losses"] == pytest.approx(whole["losses"], abs=1e-6)  # logged as fp32
    assert largest_difference(rest["weights"], whole["weights"]) < 1e-9


@pytest.mark.parametrize(
    ("change", "words"),
    often(
        [
            ({"num_rows": 20}, "rows was 24 when the checkpoint was written and is 20"),
            ({"per_device_train_batch_size": 3}, "batch_size was 8 when the checkpoint was written and is 6"),
            ({"seed": 8}, "seed was 7"),
            ({"data_of": 1}, "Row 0 of the data holds other tokens, labels or weights"),
        ],
        ({"seed": 8}, "seed was 7"),
    ),
)
def test_changed_data(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Another dataset, batch or seed would draw other samples: refused on all ranks, unless the data start anew."""
    folder = str(tmp_path)
    run_ranks(run, 2, folder, NO_FAULT, {"max_steps": 2})
    for error in run_ranks(run, 2, folder, NO_FAULT, {**change, "resume": True}, expect_errors=True):
        assert isinstance(error, ConfigError)
        assert words in str(error)
    rest = run_ranks(run, 2, folder, NO_FAULT, {**change, "resume": True, "ignore_data_skip": True})
    assert len(rest[0]["losses"]) == NUM_STEPS


def marked_run(folder: str, mark: str, seen: str) -> None:
    os.environ[MARK] = mark

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                Path(seen).write_text("\n".join(processes_of(mark).values()))

    trained(
        tiny_model(),
        samples(LENGTHS),
        HeteroTrainer,
        callbacks=[Look(), Fault("kill in step", 0, 3)],
        output_dir=folder,
        max_steps=NUM_STEPS,
        dataloader_num_workers=1,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_leaves_no_process_behind(tmp_path: Path) -> None:
    """After a rank was killed, neither planners nor readers of data are left."""
    mark, seen = f"{os.getpid()}-{time.time_ns()}", tmp_path / "seen"
    ended = run_ranks(marked_run, 2, str(tmp_path), mark, str(seen), expect_errors=True)
    assert ended[0] is None
    assert "hf_hetero.planner.process" in seen.read_text()  # they were there
    until = time.monotonic() + 60  # they yield to all else, so that on a busy machine they take long to end, too
    while processes_of(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(mark) == {}
