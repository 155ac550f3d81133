"""Many trainers in one process, one after the other or side by side: a run leaves nothing open when it has ended."""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.errors import BadSample, InfeasibleBatch

pytestmark = pytest.mark.slow

WARM_UP, NUM_TRAINERS = 1, 2
DATA = samples(LENGTHS)


def num_open() -> tuple[int, int, int]:
    """File descriptors, threads and children of this process."""
    own, children = Path("/proc/self"), 0
    for thread in (own / "task").iterdir():
        with suppress(OSError):  # it has ended just now
            children += len((thread / "children").read_text().split())
    return len(list((own / "fd").iterdir())), len(list((own / "task").iterdir())), children


def settled(most: tuple[int, int, int], within_s: float = 60.0) -> tuple[int, int, int]:
    """What is open, once it is no more than this; a thread that was told to end takes its time."""
    until = time.monotonic() + within_s
    while True:
        gc.collect()
        found = num_open()
        if all(now <= then for now, then in zip(found, most, strict=True)) or time.monotonic() > until:
            return found
        time.sleep(0.05)


def trainer_of(folder: str, **hetero: Any) -> HeteroTrainer:
    args = arguments(folder, dist.get_world_size(), max_steps=2, save_strategy="steps", save_steps=1)
    config = HeteroConfig(**hetero)
    return HeteroTrainer(tiny_model(), args, train_dataset=DATA, eval_dataset=DATA, hetero=config)


def use(trainer: HeteroTrainer, kind: str) -> None:
    if kind == "evaluate":
        trainer.evaluate({"first": DATA, "second": DATA[:5]})
        trainer.predict(DATA[:5])
    elif kind == "train":
        trainer.train()
    elif kind == "resume":
        trainer.train()
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir or "") / "checkpoint-1"))
        trainer.evaluate()
    else:
        with pytest.raises((InfeasibleBatch, BadSample)):
            trainer.train()


def many(kind: str, warm_up: int = WARM_UP, num_trainers: int = NUM_TRAINERS) -> list[tuple[int, int, int]]:
    """What is open after each of some trainers, all of which are kept."""
    hetero = {"max_tokens_per_rank": 8} if kind == "fail" else {}
    found: list[tuple[int, int, int]] = []
    kept: list[HeteroTrainer] = []
    for number in range(warm_up + num_trainers):
        with tempfile.TemporaryDirectory() as folder:
            dist.barrier()
            shared: list[Any] = [folder]
            dist.broadcast_object_list(shared)
            kept.append(trainer_of(shared[0], **hetero))
            use(kept[-1], kind)
            dist.barrier()
        if number < warm_up:
            found.append(settled((0, 0, 0), 0.5))
        else:
            found.append(settled(found[warm_up - 1]) if number == warm_up + num_trainers - 1 else num_open())
    return found


@pytest.mark.parametrize(("num_ranks", "kind"), [(1, "resume"), (2, "resume"), (2, "evaluate"), (2, "fail")])
def test_a_trainer_leaves_nothing_open(num_ranks: int, kind: str) -> None:
    """Descriptors, threads and planners stay as many as there were, though the trainers themselves are kept."""
    for found in run_ranks(many, num_ranks, kind):
        first, last = found[WARM_UP - 1], found[-1]
        assert all(now <= then for now, then in zip(last, first, strict=True)), found


def test_thirty_trainers() -> None:
    """After the thirtieth no more is open than after the third, planners and the threads of groups included."""
    for found in run_ranks(many, 2, "train", 3, 27):
        assert len(found) == 30
        assert all(now <= then for now, then in zip(found[-1], found[2], strict=True)), found


def in_turns() -> list[float]:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        trainers = [trainer_of(first), trainer_of(second)]
        return [trainer.evaluate()["eval_loss"] for _ in range(2) for trainer in trainers]


def test_trainers_in_turns() -> None:
    """Each opens its groups again, as often as it is used."""
    for losses in run_ranks(in_turns, 2):
        assert len(set(losses)) == 1
