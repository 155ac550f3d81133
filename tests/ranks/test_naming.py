"""Where the store of the job goes with its rank, whoever asks it, or what lies over it, ends in a name and a remedy."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import LENGTHS, arguments, come_late, give_up, run_ranks, samples, tiny_model

from hf_hetero import HeteroTrainer
from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks import last_words
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.ranks.last_words import job_store
from hf_hetero.ranks.made_together import made_together
from hf_hetero.ranks.naming import GROUP_LIMIT, JOB_LIMIT, named

LOST = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
TRACE = "\nException raised from recvBytes at Utils.hpp:701:\nframe #1: c10d::TCPStore::wait(timeout) + 0x85\n"
"""What torch may write after its own words, with names of functions in it."""
GONE = "A rank has gone: look for its first error"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (dist.DistNetworkError(LOST), GONE),
        (dist.DistNetworkError(LOST + TRACE), GONE),
        (dist.DistNetworkError("Broken pipe"), GONE),
        (dist.DistStoreError("Socket Timeout"), "raise HeteroConfig.group_timeout_s"),
        (dist.DistStoreError("wait timeout after 3000ms, keys: /0/rank-1"), "raise HeteroConfig.group_timeout_s"),
        (RuntimeError(f"Gloo connectFullMesh failed with {LOST}"), GONE),
    ],
)
def test_what_stores_say(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kind of the error, not by its words, of which torch has many; a limit is named where one ran out."""
    monkeypatch.setattr(last_words, "PATIENCE_S", 0.0)
    with pytest.raises(CollectiveFailed) as caught, named("The sum", "step 3"):
        raise error
    said = str(caught.value)
    assert said.startswith(f"The sum failed or waited too long at step 3: {str(error).splitlines()[0]}")
    assert remedy in said
    assert ("raise " in said) == remedy.startswith("raise ")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError(LOST), OSError("Broken pipe")])
def test_the_same_words_of_others(error: Exception) -> None:
    """Somebody else's server that does not answer is no rank that has gone."""
    with pytest.raises(type(error)) as caught, named("The sum", "step 3"):
        raise error
    assert caught.value is error


def outlive_the_store() -> None:
    """Wait on rank 1 until rank 0, which ends here, has gone, and its store with it."""
    if dist.get_rank() == 0:
        job_store().store.wait(["watched"])
        os._exit(1)
    # by a connection of its own: the first who asks by the usual one is told what later ones are not
    watch, until = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"])), time.monotonic() + 60
    job_store().set("watched", "")
    while time.monotonic() < until:
        try:
            watch.check(["anything"])
        except dist.DistNetworkError:
            return
        time.sleep(0.01)
    raise AssertionError("the store is still there")


def asked_in_vain(ask: Callable[[GroupPool], object]) -> str:
    """What rank 1 says of a pool whose store has gone."""
    pool = GroupPool((2,), timeout_s=20, control_timeout_s=20)
    outlive_the_store()
    with pytest.raises(CollectiveFailed) as caught:
        ask(pool)
    return str(caught.value)


def carry(pool: GroupPool) -> None:
    pool.carry([(0, 1)])


def mend(pool: GroupPool) -> None:
    pool.mend()


def beside_training(pool: GroupPool) -> None:
    pool.beside_training()


def another_pool(pool: GroupPool) -> None:
    GroupPool((), timeout_s=20, control_timeout_s=20)


@pytest.mark.parametrize("ask", [carry, mend, beside_training, another_pool])
def test_a_group_that_cannot_be_made(ask: Callable[[GroupPool], object]) -> None:
    """Groups find their ranks in the store, so none can be made once it has gone."""
    said = run_ranks(asked_in_vain, 2, ask, expect_errors=True, timeout_s=150)[1]
    assert str(said).startswith("The making of a group failed or waited too long at "), said
    assert GONE in said


def late_for_a_group(is_of_a_plan: bool) -> str:
    """What rank 0 says of a rank that does not come to make a group."""
    pool = GroupPool((), timeout_s=2, control_timeout_s=2)
    if dist.get_rank() == 1:
        come_late(1)
        return ""
    with pytest.raises(CollectiveFailed) as caught:
        pool._made((0, 1), 2, GROUP_LIMIT) if is_of_a_plan else pool.beside_training()
    give_up()
    return str(caught.value)


@pytest.mark.parametrize(("is_of_a_plan", "limit"), [(True, GROUP_LIMIT), (False, JOB_LIMIT)])
def test_a_rank_that_is_late_for_a_group(is_of_a_plan: bool, limit: str) -> None:
    """The limit of the group counts where it is made, too, and its setting is named."""
    said = run_ranks(late_for_a_group, 2, is_of_a_plan, expect_errors=True, timeout_s=150)[0]
    assert re.match(
        r"(The making of a group|The first exchange of a group) failed or waited too long at ", str(said)
    ), said
    assert str(said).endswith(f"raise {limit}.")


def torch_asked_in_vain() -> str:
    outlive_the_store()
    with pytest.raises(dist.DistNetworkError) as caught:
        dist.new_group([0, 1])
    return type(caught.value).__name__


def test_torch_itself_does_not_name_it() -> None:
    """What the tests here provoke is torch's raw error, for whoever asks torch."""
    assert run_ranks(torch_asked_in_vain, 2, expect_errors=True, timeout_s=150)[1] == "DistNetworkError"


def alarmed() -> str:
    pool = GroupPool((2,), timeout_s=20, control_timeout_s=20)
    outlive_the_store()
    until = time.monotonic() + 60
    while time.monotonic() < until:  # the first messages to a store that has gone are sent all the same
        try:
            job_store().set("anything", "")
        except dist.DistNetworkError:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the store takes whatever it is sent")
    assert pool.alarm is not None
    pool.alarm.sound()
    with pytest.raises(RuntimeError, match="gloo"):
        dist.all_reduce(torch.zeros(1), group=pool.get((0, 1)))
    return "has left"


def test_an_alarm_that_nobody_can_hear() -> None:
    """The rank itself leaves the step all the same; what its memory ran out of is not lost behind a store's error."""
    assert run_ranks(alarmed, 2, expect_errors=True, timeout_s=150)[1] == "has left"


class Made:
    """What a trainer is to its ranks, whose constructor may ask the store, as that of TRL's does."""

    @made_together
    def __init__(self, asks: bool) -> None:
        self.args = SimpleNamespace(ddp_timeout=60.0)
        outlive_the_store()
        if asks:
            dist.new_group([0, 1])


def make(asks: bool) -> str:
    with pytest.raises(CollectiveFailed) as caught:
        Made(asks)
    return str(caught.value)


@pytest.mark.parametrize("asks", [False, True])
def test_a_trainer_that_is_made_without_the_others(asks: bool) -> None:
    """Whether its own constructor misses them, or is through without."""
    said = run_ranks(make, 2, asks, expect_errors=True, timeout_s=150)[1]
    assert "the first error" in str(said) or GONE in str(said), said


class EndsTrainer(HeteroTrainer):
    """Rank 0 ends where rank 1 is about to ask torch, which asks the store.

    Args:
        door: by which method of Trainer it is done.
    """

    door = ""

    def ask(self, door: str) -> None:
        if door == self.door:
            outlive_the_store()
            dist.new_group([0, 1])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.ask("train")
        return super().create_optimizer(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.ask("evaluate")
        return super().evaluation_loop(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        self.ask("save_model")
        super()._save(*args, **kwargs)


def used(folder: str, door: str, within: bool) -> str:
    """What rank 1 says of a method of the trainer, called by a script or within training."""
    options: dict[str, Any] = (
        {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1} if within else {}
    )
    args = arguments(folder, 2, max_steps=2, save_on_each_node=True, **options)
    rows = samples(LENGTHS)
    trainer = EndsTrainer(model=tiny_model(), args=args, train_dataset=rows, eval_dataset=rows)
    trainer.door = door
    with pytest.raises(CollectiveFailed) as caught:
        trainer.train() if within else getattr(trainer, door)(*[f"{folder}/model"] * (door == "save_model"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("door", "within"),
    [("train", True), ("evaluate", False), ("evaluate", True), ("save_model", False), ("save_model", True)],
)
def test_doors_of_the_trainer(tmp_path: Any, door: str, within: bool) -> None:
    """What torch, accelerate or a subclass asks on the way is named by the method that a script has called."""
    said = run_ranks(used, 2, str(tmp_path), door, within, expect_errors=True, timeout_s=100)[1]
    assert isinstance(said, str), said
    assert "failed or waited too long" in said
    assert GONE in said
    assert not within or "at step 1" in said.lower() or "at step 2" in said.lower()
