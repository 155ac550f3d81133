"""Groups exist for every aligned block; what fails in a group, or on one rank, is named on all."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import come_late, give_up, run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hf_hetero import HeteroError
from hf_hetero.errors import BadSample, CollectiveFailed, PlanMismatch
from hf_hetero.ranks import breaking, groups
from hf_hetero.ranks.agreement import broadcast, confirm_step, gather
from hf_hetero.ranks.breaking import failure_of
from hf_hetero.ranks.groups import GroupPool, limit_of
from hf_hetero.ranks.last_words import tell
from hf_hetero.ranks.naming import named
from hf_hetero.ranks.sharding import groups_of


def looks_at_sockets(degrees: tuple[int, ...]) -> int:
    """How often a rank looks at its sockets while the groups are made."""
    looks: list[int] = []
    look = breaking.connections

    def looking() -> dict[int, int]:
        looks.append(1)
        return look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "connections", looking)
        patch.setattr(breaking, "connections", looking)
        GroupPool(degrees, timeout_s=20, control_timeout_s=20).close()
    return len(looks)


def test_groups_of_others_cost_no_look() -> None:
    """A rank looks for new sockets, of which it may have thousands, before and after each group that it is in."""
    assert run_ranks(looks_at_sockets, 4, (1, 2)) == [2] * 4


HANDLING, SLEEP = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"


def variables_of_groups(own: str | None) -> list[tuple[str | None, str | None]]:
    """What NCCL would read when each group is made: that of control messages, one of a plan, one of a wrapper."""
    if own is not None:
        os.environ[HANDLING] = own
    before, found, new_group = os.environ.copy(), list[tuple[str | None, str | None]](), dist.new_group

    def making(*args: Any, **kwargs: Any) -> Any:
        found.append((os.environ.get(HANDLING), os.environ.get(SLEEP)))
        return new_group(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", making)
        pool = GroupPool((2,), timeout_s=20, control_timeout_s=20)
        pool.carry([(0, 1)])
        pool.close()
    assert os.environ.copy() == before
    return found


@pytest.mark.parametrize("own", [None, "3"])
def test_torch_kills_no_process_for_what_steps_exchange(own: str | None) -> None:
    """Its watchdog would, where a step could be repeated, or end in words; whoever asks for it gets it."""
    ours = ("0" if own is None else own, "250")
    for found in run_ranks(variables_of_groups, 2, own):
        assert found == [(own, None), ours, ours]


class FailedBackend:
    """As NCCL's, once its watchdog has seen a failure."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def get_error(self) -> Any:
        return SimpleNamespace(name=self.kind)


def raised_of_a_device(kind: str) -> str:
    """What a rank raises whose device has failed in a group, when it asks for that group again."""
    pool = GroupPool((2,), timeout_s=20, control_timeout_s=20)
    pool.get((0, 1))
    with pytest.MonkeyPatch.context() as patch:
        failed: Any = FailedGroup(kind)
        patch.setattr(groups, "failure_of", lambda _: failure_of(failed))
        alarm, until = pool.alarm, time.monotonic() + 30
        assert alarm is not None
        while alarm.failure is None and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(CollectiveFailed) as error:
            pool.get((0, 1))
        pool.close()
    return str(error.value)


class FailedGroup:
    """A group on a GPU."""

    def __init__(self, kind: str) -> None:
        self._device_types = (torch.device("cuda"),)
        self._backend = FailedBackend(kind)

    def _get_backend(self, device: torch.device) -> FailedBackend:
        return self._backend


@pytest.mark.parametrize(("kind", "why"), [("TIMEOUT", "waited longer than"), ("REMOTE_ERROR", "NCCL says REMOTE")])
def test_what_fails_on_a_device_is_raised_in_words(kind: str, why: str) -> None:
    """No host waits for it: what it has computed since is worth nothing, and it learns so before weights move."""
    for text in run_ranks(raised_of_a_device, 2, kind):
        assert "An exchange of ranks [0, 1] on the device failed" in text
        assert why in text


def sums_of_groups(degrees: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Sum of the ranks of each group, computed by the group."""
    pool = GroupPool(degrees, timeout_s=20, control_timeout_s=20)
    rank, found = dist.get_rank(), {}
    for degree in sorted(set(degrees) - {1}):
        ranks = tuple(range(rank // degree * degree, (rank // degree + 1) * degree))
        if ranks[-1] >= dist.get_world_size():
            continue
        total = torch.tensor(float(rank))
        dist.all_reduce(total, group=pool.get(ranks))
        found[ranks] = float(total)
    assert pool.get((rank,)) is None
    pool.close()
    return found


@pytest.mark.parametrize(("num_ranks", "degrees"), [(4, (1, 2, 4)), (3, (1, 2, 3))])
def test_every_group_works(num_ranks: int, degrees: tuple[int, ...]) -> None:
    """Each rank reaches the group of each degree, also where the number of ranks is no power of two."""
    for rank, sums in enumerate(run_ranks(sums_of_groups, num_ranks, degrees)):
        assert all(rank in ranks and total == sum(ranks) for ranks, total in sums.items())
        assert max(map(len, sums)) == num_ranks


def first_exchanges(degrees: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Ranks and device of every exchange of this rank while the groups are made."""
    found: list[tuple[tuple[int, ...], str]] = []
    exchange = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        found.append((tuple(dist.get_process_group_ranks(group)), tensor.device.type))
        return exchange(tensor, *args, group=group, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noting)
        GroupPool(degrees, 20, 20, torch.device("cpu")).close()
    return found


def test_a_groups_first_exchange_is_of_all_its_ranks() -> None:
    """Before anybody uses a group, each of its ranks has exchanged something in it, once, and all in the same order."""
    for rank, found in enumerate(run_ranks(first_exchanges, 4, (1, 2, 4))):
        pair = (0, 1) if rank < 2 else (2, 3)
        assert found == [(pair, "cpu"), ((0, 1, 2, 3), "cpu")]


def beside_training() -> list[Any]:
    """What a thread and the training beside it exchange at once, each in its own order; and whether groups are made."""
    pool, num_groups = GroupPool((2,), 20, 20), len(dist.distributed_c10d._world.pg_map)
    group = pool.beside_training()
    assert group is pool.beside_training()  # made once
    assert len(dist.distributed_c10d._world.pg_map) == num_groups + 1
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(gather([dist.get_rank()], group)))
    if dist.get_rank() == 0:  # the others' threads meet this one after its training has gone on
        found.append(gather([5], pool.control))
        thread.start()
    else:
        thread.start()
        found.append(gather([5], pool.control))
    thread.join(20)
    pool.close()
    assert len(dist.distributed_c10d._world.pg_map) == num_groups - 2  # the pool's own two groups are gone, too
    return sorted(found)


def test_a_group_beside_training() -> None:
    """What a thread exchanges does not meet what training exchanges, whichever comes first."""
    assert run_ranks(beside_training, 2) == [[[[0], [1]], [[5], [5]]]] * 2


def test_single_process_has_no_groups() -> None:
    """Without torch.distributed there is nothing to make, and control messages stay at home."""
    pool = GroupPool((1, 2), 1, 1)
    assert pool.control is None
    assert pool.beside_training() is None
    assert broadcast(lambda: 5, pool.control) == 5
    assert gather([1, 2], pool.control) == [[1, 2]]
    assert confirm_step(1, 99, 7, None, pool.control) == 7


def late_for_a_group() -> None:
    pool = GroupPool((2,), timeout_s=3, control_timeout_s=600)
    if dist.get_rank() == 1:
        come_late(1)
        return
    words = r"The test's sum failed or waited too long at step 3: .*group_timeout_s"
    with pytest.raises(CollectiveFailed, match=words), named("The test's sum", "step 3"):
        dist.all_reduce(torch.zeros(1), group=pool.get((0, 1)))
    give_up()


def test_timeout_reaches_the_group() -> None:
    """A group's own timeout counts, not the default of the process group, and the failure is named."""
    run_ranks(late_for_a_group, 2, timeout_s=100)  # less than that default


def of_weights() -> dist.ProcessGroup:
    """The group that a wrapper spreads weights over, which is none of the pool's and not the default one."""
    own: Any = dist.new_group([0, 1], group_desc="weights")
    model: Any = fully_shard(torch.nn.Linear(4, 4), mesh=DeviceMesh.from_group(own, "cpu"))
    assert groups_of(model) == [own]
    assert groups_of(torch.nn.Linear(4, 4)) == []
    return own


def late_in_a_step(control_s: float, how: str) -> str:
    """What rank 0 says of a rank that is late for as long as rank 0 waits."""
    pool = GroupPool((), timeout_s=3, control_timeout_s=control_s)
    usual = dist.group.WORLD.group_desc  # type: ignore[union-attr]
    own = of_weights() if how == "weights" else None
    if own is not None:
        pool.hurry()
        pool.include([own])
    pool.hurry()
    pool.hurry()
    if how == "relaxed":
        with pool.relaxed():
            assert [gather([1], pool.control), dist.barrier()][0]
            if dist.get_rank() == 1:
                time.sleep(5)
            gather([1], pool.control)
            dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == 1:
        come_late(1)
        return ""
    with pytest.raises(CollectiveFailed) as caught, named("The sum", "step 3", limit=limit_of):
        dist.all_reduce(torch.zeros(1), group=own) if how in ("gradients", "weights") else gather([1], pool.control)
    pool.relax()
    if own is not None:
        assert own.group_desc == "weights"
    assert [limit_of(), limit_of(pool.control)] == ["TrainingArguments.ddp_timeout"] * 2
    assert dist.group.WORLD.group_desc == usual  # type: ignore[union-attr]
    give_up()
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control_s", "how", "setting"),
    [
        (600, "report", "HeteroConfig.group_timeout_s"),
        (600, "gradients", "HeteroConfig.group_timeout_s"),
        (600, "weights", "HeteroConfig.group_timeout_s"),
        (600, "relaxed", "HeteroConfig.group_timeout_s"),
        (2, "report", "TrainingArguments.ddp_timeout"),
    ],
)
def test_waits_within_a_step(control_s: float, how: str, setting: str) -> None:
    """While steps are trained, no wait is longer than in a group, or than the job allows; the setting is named."""
    words = run_ranks(late_in_a_step, 2, control_s, how, expect_errors=True, timeout_s=100)[0]
    assert str(words).endswith(f"raise {setting}.")


def waited_for(num_words: int) -> list[str]:
    """What this rank says while rank 0 is late, which it is until rank 1 has said so many words."""
    pool, heard, store = GroupPool((), 600, 600), list[str](), dist.distributed_c10d._get_default_store()

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())
            if len(heard) == num_words:
                store.set("said", "")

    logging.getLogger("hf_hetero").addHandler(Hears())
    groups.WORD_AFTER_S = 0.5  # type: ignore[misc]
    if dist.get_rank() == 0:
        store.wait(["said"], timedelta(seconds=100))
    gather([1], pool.control)
    return heard


def test_a_long_wait_says_so() -> None:
    """Who waits says for what, and how long it may take, ever more rarely; of many ranks two do."""
    first, second, third = run_ranks(waited_for, 3, 3, timeout_s=120)
    assert first == third == []
    for text, seconds in zip(second, ("0.5", "1", "2"), strict=False):
        words = f"Rank 1 has waited {seconds} s for other ranks, in the exchange of a step's report, and waits on"
        assert words in text
        assert "TrainingArguments.ddp_timeout" in text


def missing_a_rank(how: str) -> str:
    """What the others say of rank 1, which does not come."""
    pool = GroupPool((), 60, control_timeout_s=4 if how == "late" else 60)
    if dist.get_rank() == 1:
        if how == "late":
            come_late(1)
        if how == "says why":
            tell(KeyError("row 7"))
        os._exit(1)
    with pytest.raises(CollectiveFailed) as caught:
        gather([1], pool.control)
    if how == "late":
        give_up()
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "words", "not_words"),
    [
        ("late", "only slow, raise TrainingArguments.ddp_timeout", "group_timeout_s"),
        ("dies", "A rank has gone: look for its first error, or for what killed it", "timeout"),
        ("says why", "Rank 1 had ended with KeyError: 'row 7'", "timeout"),
    ],
)
def test_why_a_rank_is_missed(how: str, words: str, not_words: str) -> None:
    """The remedy is that of the cause: the time limit that ran out, or what ended the rank that has gone."""
    found = run_ranks(missing_a_rank, 2, how, expect_errors=True, timeout_s=60)[0]
    assert words in str(found), found
    assert not_words not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. NCCL holds 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed."),
        ValueError("gloo"),
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    """Only a rank that has gone, or is late, makes a collective fail."""
    with pytest.raises(type(error)) as caught, named("The sum", "step 3"):
        raise error
    assert caught.value is error


def control_messages(case: str) -> Any:
    pool = GroupPool((), 20, 20)
    rank = dist.get_rank()
    if case == "broadcast":
        return broadcast(lambda: {"from": rank}, pool.control)
    if case == "broadcast error":

        def fail() -> None:
            raise BadSample("row 3 is bad")

        return broadcast(fail, pool.control)
    if case == "broadcast bug":
        return broadcast(lambda: 1 // 0, pool.control)
    if case == "confirm":
        return confirm_step(4, 123, 10 + rank, None, pool.control)
    if case == "mismatch":
        return confirm_step(4, 123 + (rank == 2), 10, None, pool.control)
    return confirm_step(4, 123, 10, BadSample("row 8 is bad") if rank == 1 else None, pool.control)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("broadcast", {"from": 0}),
        ("broadcast error", (BadSample, "row 3 is bad")),
        ("broadcast bug", (HeteroError, "Rank 0: ZeroDivisionError")),
        ("confirm", 10 + 11 + 12),
        ("mismatch", (PlanMismatch, r"Step 4: ranks \[2\] hold another plan")),
        ("one bad rank", (BadSample, "Rank 1: row 8 is bad")),
    ],
)
def test_control_messages(case: str, expected: Any) -> None:
    """What rank 0 makes reaches all; what goes wrong on one rank is raised on all, in the same words."""
    found = run_ranks(control_messages, 3, case, expect_errors=True)
    if not (isinstance(expected, tuple) and isinstance(expected[0], type)):
        assert found == [expected] * 3
        return
    for error in found:
        assert type(error) is expected[0]
        assert re.search(expected[1], str(error)), str(error)


def opened_again(times: int) -> list[tuple[float, bool]]:
    """What a group sums up, and whether the pool is empty once closed, each time it is open."""
    pool, found = GroupPool((1, 2), timeout_s=20, control_timeout_s=20), []
    for _ in range(times):
        pool.open()
        pool.open()
        total = torch.ones(1)
        dist.all_reduce(total, group=pool.get((0, 1)))
        dist.all_reduce(total, group=pool.control)
        pool.close()
        pool.close()
        found.append((float(total), pool.control is None))
    return found


def test_a_pool_opens_again() -> None:
    """As often as it is asked to; opening what is open, or closing what is closed, changes nothing."""
    assert run_ranks(opened_again, 2, 3) == [[(4.0, True)] * 3] * 2
