"""Readers of data, ranks and planners that are killed at random moments: a named end on every rank, or none at all."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import LENGTHS, MARK, processes_of, run_ranks, samples, tiny_model, trained
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer
from hf_hetero.trainer.checkpoints.checkpoint import newest_whole, problem_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

NUM_KILLS = int(os.environ.get("HF_HETERO_KILLS", "10"))
KILLS_A_TEST = 10
RUN_S = 3.0
"""About as long as a run takes, so that moments are spread over all of it."""
LIMIT_S = 10.0
NOT_WHOLE = ("its writing was cut short", "its removal was cut short", "it is empty")
PLANNER = "hf_hetero.planner.process"


class Kills(TrainerCallback):
    """From the start of training on, a thread that kills something at a moment that the seed decides.

    Args:
        victim: "worker" | "rank" | "planner" | "job": of all ranks.
        rank: whose.
        seed: decides the moment, and which of several.
        mark: of the processes of the test.
        num_kills: then training stops; 1: at that moment, whatever is done.
    """

    def __init__(self, victim: str, rank: int, seed: int, mark: str, num_kills: int = 1) -> None:
        self.victim, self.rank, self.mark, self.num_kills = victim, rank, mark, num_kills
        self.draw, self.num_killed = random.Random(seed), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank or self.victim == "job":
            threading.Thread(target=self._work, daemon=True).start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.num_kills > 1 and self.num_killed == self.num_kills:
            control.should_training_stop = True

    def _work(self) -> None:
        while self.num_killed < self.num_kills:
            time.sleep(self.draw.uniform(0, RUN_S if self.num_kills == 1 else 0.2))
            if found := self._found():
                self.num_killed += 1
                os.kill(self.draw.choice(found), signal.SIGKILL)
            elif self.num_kills == 1:
                return  # it has ended before

    def _found(self) -> list[int]:
        if self.victim in ("rank", "job"):
            return [os.getpid()]
        if self.victim == "worker":
            return [int(child.pid or 0) for child in mp.active_children()]
        return sorted(pid for pid, command in processes_of(self.mark).items() if PLANNER in command)


class Saved(TrainerCallback):
    """Leaves word of each checkpoint that is said to be whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            (Path(args.output_dir) / f"saved-{state.global_step}").touch()


def killed_run(
    folder: str, mark: str, victim: str, rank: int, seed: int, num_kills: int = 1, in_background: bool = False
) -> int:
    os.environ[MARK] = mark
    kills = Kills(victim, rank, seed, mark, num_kills)
    # while ranks save or evaluate, the limit of the job counts
    options: dict[str, Any] = {"output_dir": folder, "max_steps": 30 if num_kills == 1 else 100_000, "ddp_timeout": 30}
    if num_kills == 1:
        evaluating = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}
        options |= {"dataloader_num_workers": 1, "save_total_limit": 1, **evaluating}
        options["save_steps"] = 2 if in_background else 5  # then one is being written at most moments
    trained(
        tiny_model(),
        samples(LENGTHS),
        EvaluatedTrainer if num_kills == 1 else HeteroTrainer,
        HeteroConfig(group_timeout_s=LIMIT_S, save_in_background=in_background),
        callbacks=[kills, Saved()],
        per_device_train_batch_size=8 // dist.get_world_size(),
        logging_strategy="no",
        **options,
    )
    return kills.num_killed


class EvaluatedTrainer(HeteroTrainer):
    """A run that evaluates and saves, too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, eval_dataset=samples(LENGTHS[:8]))


def check_nothing_left(mark: str) -> None:
    until = time.monotonic() + 60  # what plans steps back for all else
    while processes_of(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(mark) == {}


def is_named(error: Any) -> bool:
    """An error of this package, or torch's own of a reader that was killed."""
    return isinstance(error, HeteroError) or (isinstance(error, RuntimeError) and "DataLoader worker" in str(error))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(0, NUM_KILLS, KILLS_A_TEST))
@pytest.mark.parametrize(
    ("victim", "in_background"), [("worker", False), ("rank", False), ("rank", True), ("job", True)]
)
def test_killed_at_any_moment(tmp_path: Path, victim: str, in_background: bool, first: int) -> None:
    """Every rank that is left ends in words within its limit, or has come to its end; nothing is left behind.

    Once a checkpoint was said to be whole, one is: that one, or a later one.
    """
    for seed in range(first, first + KILLS_A_TEST):
        mark, rank = f"{os.getpid()}-{time.time_ns()}", seed % 2
        folder = str(tmp_path / str(seed))
        args = folder, mark, victim, rank, seed, 1, in_background
        ended = run_ranks(killed_run, 2, *args, expect_errors=True, timeout_s=90)
        if any(not isinstance(one, int) for one in ended):
            others = ended[:rank] + ended[rank + 1 :] if victim == "rank" else [] if victim == "job" else ended
            assert all(is_named(one) or one == 0 for one in others), (seed, ended)
        check_nothing_left(mark)
        # what is left of a checkpoint is known not to be whole
        assert {problem_of(path) for path in Path(folder).glob("checkpoint-*")} <= {None, *NOT_WHOLE}
        if said := [int(path.name.partition("-")[2]) for path in Path(folder).glob("saved-*")]:
            newest, _ = newest_whole(Path(folder))
            assert newest is not None, seed
            assert int(newest.name.partition("-")[2]) >= max(said), seed


def test_planners_killed_at_any_moment(tmp_path: Path) -> None:
    """Training goes on, with plans of its own making, however often its planners are killed; none is left behind."""
    mark = f"{os.getpid()}-{time.time_ns()}"
    ended = run_ranks(killed_run, 2, str(tmp_path), mark, "planner", 0, 0, NUM_KILLS, timeout_s=200)
    assert ended == [NUM_KILLS, 0]
    check_nothing_left(mark)
