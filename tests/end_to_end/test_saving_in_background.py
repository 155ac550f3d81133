"""Checkpoints written beside training hold what others hold, and whatever is killed leaves a whole one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.parallelism_config import ParallelismConfig
from helpers import LENGTHS, ScriptedTrainer, run_ranks, samples, shard_on_cpu, tiny_model, trained, with_lora
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import Trainer, TrainerCallback

from hf_hetero import HeteroConfig, HeteroError
from hf_hetero.errors import CollectiveFailed
from hf_hetero.trainer.checkpoints import saving, writing
from hf_hetero.trainer.checkpoints.checkpoint import Run, problem_of
from hf_hetero.trainer.checkpoints.host_copies import HostCopies
from hf_hetero.trainer.checkpoints.removing import INCOMPLETE_FILE, RUN_FILE
from hf_hetero.trainer.checkpoints.taken import Taken

NUM_STEPS, SAVE_STEPS = 5, 2
CUT_SHORT = "its writing was cut short"
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "tied weights": {"config": {"tie_word_embeddings": True}},
    "adapters": {"lora": True},
    "weights alone": {"args": {"save_only_model": True}},
    "sharded": {"kind": SHARDED},
    "full": {"kind": FULL},
    "sharded adapters": {"kind": SHARDED, "lora": True},
    "full adapters": {"kind": FULL, "lora": True},
    "full tied weights": {"kind": FULL, "config": {"tie_word_embeddings": True}},
    "replicas of shards": {"kind": SHARDED, "replicas": 2},
    "full replicas of shards": {"kind": FULL, "replicas": 2},
}
FAST = ("sharded",)


class Late(TrainerCallback):
    """Holds back what is to be written until another step has changed the weights, and notes what `on_save` finds."""

    def __init__(self) -> None:
        self.step, self.is_last = 0, False
        self.stepped = threading.Condition()
        self.saved: list[tuple[int, int, str | None, list[str]]] = []
        wait = HostCopies.wait

        def late(copies: HostCopies) -> None:
            wait(copies)
            taken = self.step
            with self.stepped:
                assert self.stepped.wait_for(lambda: self.step > taken or self.is_last, timeout=60)

        HostCopies.wait = late

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.stepped:
            self.step, self.is_last = state.global_step, state.global_step == state.max_steps
            self.stepped.notify_all()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir)
        problem = problem_of(folder / f"checkpoint-{state.global_step}")
        self.saved.append((state.global_step, self.step, problem, sorted(p.name for p in folder.glob("checkpoint-*"))))


def run(folder: str, case: dict[str, Any], in_background: bool, resume: Any = None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps"}
    options |= {"output_dir": folder, "max_steps": NUM_STEPS, "save_steps": SAVE_STEPS, **case.get("args", {})}
    if kind := case.get("kind"):
        shard_on_cpu()
        plugin = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind}
        options |= {"fsdp": True, "fsdp_config": plugin}
    if replicas := case.get("replicas"):
        options["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=2)
    if case.get("live"):  # what is not to be: nothing is copied
        HostCopies._copied = lambda self, tensor: tensor  # type: ignore[method-assign]
    model = tiny_model(**case.get("config", {}))
    model = with_lora(model) if case.get("lora") else model
    late = Late() if in_background and changes.pop("late", True) else None
    hetero = HeteroConfig(save_in_background=in_background, calibrate=False)
    callbacks = [*changes.pop("callbacks", []), *([late] if late else [])]
    options |= {"hetero": hetero, "resume": resume, "callbacks": callbacks, **changes}
    found = trained(model, samples(LENGTHS), options.pop("trainer_class", ScriptedTrainer), **options)
    return {"weights": found["weights"], "saved": late.saved if late else [], "state": found["state"]}


# ----------------------------------------------------------------------------------------------------- what is in them


def content(path: Path) -> Any:
    """What a file of a checkpoint, or a folder of shards, holds, as far as two runs must agree."""
    if path.is_dir():
        shards: dict[str, Any] = {}
        reader = dcp.FileSystemReader(path)
        _load_state_dict(shards, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        return shards
    if path.name == RUN_FILE:
        return sorted(json.loads(path.read_text())["files"])
    if path.name in ("trainer_state.json", "hetero_cost_model.json", "training_args.bin"):
        # times, and folders
        return json.loads(path.read_text())["global_step"] if path.name == "trainer_state.json" else None
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, weights_only=False)
    return path.read_bytes()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((one == other) if not hasattr(one, "shape") else (one == other).all())


def check_same_content(folder: Path, other: Path) -> None:
    """Two checkpoints have the same files, which hold the same, tensor by tensor."""
    assert problem_of(folder) is None
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in folder.iterdir():
        assert equal(content(path), content(other / path.name)), path


@pytest.mark.parametrize("name", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in CASES])
def test_they_hold_the_same(tmp_path: Path, name: str) -> None:
    """Each file holds what it holds when written at once, though it is written after another step; so resumes agree."""
    at_once, beside, num_ranks = tmp_path / "at once", tmp_path / "beside", 2 * CASES[name].get("replicas", 1)
    whole = run_ranks(run, num_ranks, str(at_once), CASES[name], False)
    found = run_ranks(run, num_ranks, str(beside), CASES[name], True)
    names = sorted(path.name for path in at_once.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    for checkpoint in names:
        check_same_content(beside / checkpoint, at_once / checkpoint)
    for rank in found:
        # when callbacks hear of a checkpoint, it is whole, on all ranks after the same step
        assert [(saved, problem) for saved, _, problem, _ in rank["saved"]] == [(2, None), (4, None), (5, None)]
        assert [step for _, step, _, _ in rank["saved"]] == [step for _, step, _, _ in found[0]["saved"]]
        assert rank["saved"][0][1] > 2
    if "args" in CASES[name]:
        return  # nothing to resume from
    rest = run_ranks(run, num_ranks, str(beside), CASES[name], True, f"{beside}/checkpoint-2")
    for mine, theirs in zip(rest, whole, strict=True):
        assert equal(mine["weights"], theirs["weights"])


def test_a_checkpoint_of_live_weights_would_be_noticed(tmp_path: Path) -> None:
    """If nothing were copied, a checkpoint would hold weights of a later step, and be refused by the test above."""
    run_ranks(run, 2, str(tmp_path / "at once"), {}, False)
    run_ranks(run, 2, str(tmp_path / "beside"), {"live": True}, True)
    with pytest.raises(AssertionError):
        check_same_content(tmp_path / "beside" / "checkpoint-2", tmp_path / "at once" / "checkpoint-2")


def test_one_at_a_time(tmp_path: Path) -> None:
    """A checkpoint after each step: each waits for the one before, which is deleted when its successor is whole."""
    found = run_ranks(run, 2, str(tmp_path), {"args": {"save_steps": 1, "save_total_limit": 1}}, True)
    for rank in found:
        assert [(saved, problem) for saved, _, problem, _ in rank["saved"]] == [(s, None) for s in range(1, 6)]
        assert all(there == [f"checkpoint-{saved}"] for saved, _, _, there in rank["saved"])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


class Older(TrainerCallback):
    """Looks, while a checkpoint is being written, at what was there before it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str | None]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({p.name: problem_of(p) for p in sorted(Path(args.output_dir).glob("checkpoint-*"))})


def run_watched(folder: str) -> list[dict[str, str | None]]:
    older = Older()
    run(folder, {"args": {"save_total_limit": 1}}, True, callbacks=[older])
    return older.seen


def test_older_ones_stay_until_it_is_whole(tmp_path: Path) -> None:
    """While a checkpoint is being written, which its mark says, the one before is there, and whole."""
    seen = run_ranks(run_watched, 2, str(tmp_path))[0]
    assert seen[2] == {"checkpoint-2": CUT_SHORT}  # to whoever looks now, it is not whole
    assert seen[4] == {"checkpoint-2": None, "checkpoint-4": CUT_SHORT}
    assert {p.name: problem_of(p) for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-5": None}


# ------------------------------------------------------------------------------------------------------ as Trainer's


class Evaluated(ScriptedTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, eval_dataset=samples(LENGTHS[:6], seed=1))


class Pushed(TrainerCallback):
    """Has checkpoints pushed, without a hub; notes whether they are whole then."""

    def __init__(self) -> None:
        self.pushed: list[tuple[int, str | None]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.push_to_hub = True

        def push(trainer: Any, folder: str) -> None:
            self.pushed.append((trainer.state.global_step, problem_of(Path(folder))))

        Trainer._push_from_checkpoint = push  # type: ignore[method-assign]


def run_best(folder: str, in_background: bool) -> dict[str, Any]:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    pushed = Pushed()
    case = {"args": {**best, "eval_steps": 1, "save_steps": 1, "save_total_limit": 2, "learning_rate": 0.3}}
    found = run(folder, case, in_background, trainer_class=Evaluated, callbacks=[pushed])
    return {**found, "pushed": pushed.pushed}


@pytest.mark.slow
def test_the_best_model_and_the_hub(tmp_path: Path) -> None:
    """The best model is loaded at the end, and kept, as with checkpoints written at once; what is pushed is whole."""
    expected = run_ranks(run_best, 2, str(tmp_path / "at once"), False)
    found = run_ranks(run_best, 2, str(tmp_path / "beside"), True)
    for mine, theirs in zip(found, expected, strict=True):
        assert equal(mine["weights"], theirs["weights"])
        assert mine["pushed"] == [(step, None) for step in range(1, 6)]
    kept = [sorted(p.name for p in (tmp_path / name).glob("checkpoint-*")) for name in ("at once", "beside")]
    assert kept[0] == kept[1]
    last = torch.load(tmp_path / "beside" / "checkpoint-5" / "optimizer.pt", weights_only=False)
    assert last["state"][0]["step"] == 5


class OwnWriter(ScriptedTrainer):
    """Copies a file of the checkpoint as soon as `_save_checkpoint` is done."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        assert problem_of(Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}") is None


def run_own(folder: str) -> list[Any]:
    said: list[str] = []
    kept = writing.logger.manager.getLogger("hf_hetero.trainer.checkpoints.saves")
    kept.warning = lambda text, *args: said.append(text % args)  # type: ignore[method-assign]
    run(folder, {}, True, trainer_class=OwnWriter, late=False)
    return said


def test_own_writers_are_waited_for(tmp_path: Path) -> None:
    """A trainer with a method of its own that saves has its checkpoints written at once, and that is said once."""
    said = run_ranks(run_own, 1, str(tmp_path))[0]
    assert len(said) == 1
    assert "OwnWriter._save_checkpoint is its own" in said[0]


# ------------------------------------------------------------------------------------------------------------- faults


class Fault(TrainerCallback):
    """From a step on, what writes the checkpoint goes wrong on rank 0.

    Args:
        where: "weights" | "optimizer" | "mark": this is cut short; "disk": as on a full one.
        num_killed: ranks that are killed; 0: an error is raised instead.
        is_first: `hetero_run.json` is written first, and no mark: what must not be.
    """

    def __init__(self, where: str, num_killed: int, is_first: bool = False) -> None:
        self.where, self.num_killed, self.is_first = where, num_killed, is_first

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pids: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        self.pids = pids[: self.num_killed]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 4 or args.process_index:
            return
        if self.is_first:
            is_all = Taken.is_all

            def is_whole_now(taken: Taken) -> None:
                is_all(taken)
                saving._finish(Path(args.output_dir) / "checkpoint-4", Run(2))

            Taken.is_all = is_whole_now  # type: ignore[method-assign]
        save, settle, write = torch.save, saving.settle, Trainer._save

        def saved(data: Any, path: Any) -> None:
            save(data, path)
            if isinstance(path, Path) and path.parts[-2:] == ("checkpoint-4", "optimizer.pt"):
                self._strike(path)

        def written(trainer: Any, folder: str, state_dict: Any) -> None:
            write(trainer, folder, state_dict)
            if Path(folder).name == "checkpoint-4":
                self._strike(Path(folder) / "model.safetensors")

        def settled(paths: Any) -> None:
            paths = list(paths)
            if Path(args.output_dir) / "checkpoint-4" / RUN_FILE in paths:
                self._strike(None)
            settle(paths)

        if self.where == "weights":
            Trainer._save = written  # type: ignore[method-assign]
        elif self.where == "mark":
            saving.settle = settled  # type: ignore[assignment]
        else:
            torch.save = saved

    def _strike(self, path: Path | None) -> None:
        if path is not None:  # half of it was written
            os.truncate(path, path.stat().st_size // 2)
        if not self.pids:
            raise OSError(28, "No space left on device")
        for pid in reversed(self.pids):  # this process last
            os.kill(pid, signal.SIGKILL)
        time.sleep(60)


def run_with(folder: str, fault: tuple[Any, ...] | None, resume: Any, kind: str | None = None) -> dict[str, Any]:
    callbacks = [Fault(*fault)] if fault else []
    case = {"args": {"save_total_limit": 1}, **({"kind": kind} if kind else {})}
    return run(folder, case, True, resume, callbacks=callbacks, late=False)


FILES = {
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "rng_state_0.pth",
    "rng_state_1.pth",
}


def check_whole_ones(folder: Path) -> list[str]:
    """What says that it is whole has every file, and each can be read; return the names of those."""
    whole = [path for path in sorted(folder.glob("checkpoint-*")) if problem_of(path) is None]
    for path in whole:
        assert not FILES - {file.name for file in path.iterdir()}, path
        for name in FILES:
            content(path / name)
    return [path.name for path in whole]


POINTS = [(where, num_killed) for where in ("weights", "optimizer", "mark") for num_killed in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "num_killed"), POINTS)
def test_killed_while_it_is_written(tmp_path: Path, where: str, num_killed: int) -> None:
    """SIGKILL of the rank that writes, or of all, while steps go on: the older checkpoint is resumed, bit-equal."""
    whole = run_ranks(run, 2, str(tmp_path / "whole"), {}, False)
    folder = tmp_path / "parts"
    ended = run_ranks(run_with, 2, str(folder), (where, num_killed), None, expect_errors=True)
    assert ended[0] is None
    assert ended[1] is None if num_killed == 2 else isinstance(ended[1], CollectiveFailed)
    assert check_whole_ones(folder) == ["checkpoint-2"]
    assert problem_of(folder / "checkpoint-4") == CUT_SHORT
    rest = run_ranks(run_with, 2, str(folder), None, True)
    assert all(equal(mine["weights"], theirs["weights"]) for mine, theirs in zip(rest, whole, strict=True))
    assert check_whole_ones(folder) == ["checkpoint-5"]


def test_the_run_file_written_first_would_be_noticed(tmp_path: Path) -> None:
    """If `hetero_run.json` came before the files, a kill would leave a checkpoint that only says that it is whole."""
    run_ranks(run_with, 2, str(tmp_path), ("optimizer", 2, True), None, expect_errors=True)
    assert not (tmp_path / "checkpoint-4" / INCOMPLETE_FILE).exists()
    with pytest.raises(AssertionError):
        assert check_whole_ones(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize("kind", [None, pytest.param(SHARDED, marks=pytest.mark.slow)])
def test_full_disk(tmp_path: Path, kind: str | None) -> None:
    """What cannot be written ends all ranks after the same step, in words; it is removed, and the older one stays."""
    where = "disk" if kind is None else "mark"
    ended = run_ranks(run_with, 2, str(tmp_path), (where, 0), None, kind, expect_errors=True)
    for error in ended:
        assert type(error) is HeteroError
        assert "checkpoint-4 failed: OSError: " in str(error)
        assert "No space left on device. Older checkpoints stay." in str(error)
    assert {p.name: problem_of(p) for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2": None}


class Terminated(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Raises(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise ZeroDivisionError("a callback's trouble")


def run_ended(folder: str, callback: Any) -> dict[str, Any]:
    case = {"args": {"enable_jit_checkpoint": True}}
    return run(folder, case, True, callbacks=[callback()], late=False)


@pytest.mark.parametrize("callback", [Terminated, Raises])
def test_what_is_being_written_is_ended(tmp_path: Path, callback: Any) -> None:
    """SIGTERM, or an error of training: a checkpoint that is being written is whole when the run has ended."""
    ended = run_ranks(run_ended, 2, str(tmp_path), callback, expect_errors=True)
    if callback is Raises:
        assert all("a callback's trouble" in str(error) for error in ended)
    names = ["checkpoint-2", "checkpoint-3"] if callback is Terminated else ["checkpoint-2"]
    assert check_whole_ones(tmp_path) == names
