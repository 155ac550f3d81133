"""An alarm has all ranks leave what they wait in, wherever that is; what was broken off works again once mended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import often, run_ranks

from hf_hetero.ranks import breaking, groups
from hf_hetero.ranks.agreement import gather
from hf_hetero.ranks.breaking import Alarm, break_off, connections, opened_since
from hf_hetero.ranks.groups import GroupPool

SIZE = 1000


def waits(pool: GroupPool, how: str) -> None:
    """What rank 1 waits in for rank 2, which never comes; rank 0 waits for rank 1."""
    rank = dist.get_rank()
    everyone = pool.carried[0, 1, 2, 3]
    if how == "chain" and rank in (1, 2):
        dist.all_reduce(torch.zeros(SIZE), group=pool.get((0, 1) if rank < 2 else (2, 3)))
    dist.all_reduce(torch.zeros(SIZE), group=everyone)


def left(how: str) -> dict[str, Any]:
    """Rank 3 gives the alarm while others wait for it, or for each other; what then came of their groups."""
    pool = GroupPool((2, 4), timeout_s=600, control_timeout_s=600)
    pool.carry([(0, 1, 2, 3)])
    alarm, found, rank = pool.alarm, list[bool](), dist.get_rank()
    assert alarm is not None
    for _ in range(2):  # mended groups can be left again
        try:
            with alarm.heard():
                if rank == 3:
                    if how == "under way":
                        dist.all_reduce(torch.zeros(SIZE), group=pool.get((0, 1, 2, 3)), async_op=True)
                    time.sleep(0.3)
                    alarm.sound()
                else:
                    waits(pool, how)
        except RuntimeError:
            found.append(alarm.follow())
        assert gather([rank], pool.control) == [[0], [1], [2], [3]]  # the control group has not been broken off
        pool.mend()
        for ranks in ((0, 1), (2, 3), (0, 1, 2, 3)):
            if rank in ranks:
                total = torch.full((SIZE,), float(rank))
                dist.all_reduce(total, group=pool.get(ranks))
                assert float(total[-1]) == sum(ranks)
        total = torch.ones(SIZE)
        dist.all_reduce(total, group=pool.carried[0, 1, 2, 3])
        assert float(total[0]) == 4
        assert not alarm.follow()
    pool.close()
    return {"left": found}


@pytest.mark.parametrize("how", ["for it", "chain", "under way"])
def test_all_leave(how: str) -> None:
    """Whoever waits for the rank, or for one that waits for it, is out at once, and knows why; twice in a row."""
    for rank, found in enumerate(run_ranks(left, 4, how)):  # which waits for less than a limit of the groups
        assert found["left"] == ([] if rank == 3 else [True, True])


class Store(dict[str, str]):
    """A job's store, in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_a_rank_that_gets_no_error_hears_it_too() -> None:
    """A thread looks for the alarm within a step, and only there; an alarm that is over is not heard again."""
    store, heard = Store(), threading.Event()
    with ExitStack() as closed:
        mine = Alarm("one", store, heard.set, look_s=0.01)
        closed.callback(mine.close)
        theirs = Alarm("one", store, lambda: None, look_s=60)
        closed.callback(theirs._ended.set)
        theirs.sound()
        assert not heard.wait(0.1)  # in no step
        with mine.heard():
            assert heard.wait(60)
        for alarm in (mine, theirs):
            with alarm.over():
                heard.clear()
        with mine.heard():
            assert not heard.wait(0.1)
        assert not mine.follow()
        theirs.sound()
        assert mine.follow()
        assert heard.is_set()


def test_an_alarm_of_ranks_before_is_not_heard() -> None:
    """A launcher may start ranks again beside the store of those that were lost: what these had called is over."""
    store = dist.HashStore()
    for _ in range(3):  # lives of a job, each of two ranks, in each of which there are two alarms
        left = list[str]()
        mine = Alarm("one", store, lambda left=left: left.append("mine"), look_s=60)
        theirs = Alarm("one", store, lambda left=left: left.append("theirs"), look_s=60)
        assert not mine.follow()
        assert not theirs.follow()
        for _ in range(2):
            mine.sound()
            assert theirs.follow()
            for alarm in (mine, theirs):
                with alarm.over():
                    pass
        mine.sound()
        assert left == ["mine", "theirs", "mine", "theirs", "mine"]
        mine.close()
        theirs.close()


@pytest.mark.parametrize("tells", [True, False])
def test_a_watchdog_that_cannot_be_asked_is_left_alone(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its kill, and without its word, nothing would ever end."""
    kind = type("ProcessGroupNCCL", (), {"get_error": lambda self: None} if tells else {})
    monkeypatch.setattr(dist, "ProcessGroupNCCL", kind, raising=False)
    for name in breaking.LEFT_TO_US:
        monkeypatch.delenv(name, raising=False)
    with breaking.watched_here():
        assert {name: os.environ[name] for name in breaking.LEFT_TO_US if name in os.environ} == (
            breaking.LEFT_TO_US if tells else {}
        )
    assert not any(name in os.environ for name in breaking.LEFT_TO_US)


def group_on(backend: str) -> Any:
    """As torch's group of a process that was started on this backend."""
    own = SimpleNamespace(name=lambda: backend)
    return SimpleNamespace(_device_types=["cuda"], _get_backend=lambda _: own)


@pytest.mark.parametrize(
    ("backend", "value", "ends"),
    [("nccl", "0", False), ("nccl", "n", False), ("nccl", "1", True), ("nccl", None, True), ("gloo", None, False)],
)
def test_a_process_that_torch_would_end_is_known(
    backend: str, value: str | None, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reads it; the monitor is NCCL's."""
    monkeypatch.delenv(breaking.DUMP, raising=False)
    if value is not None:
        monkeypatch.setenv(breaking.DUMP, value)
    assert breaking.ends_later(group_on(backend)) is ends


STARTS = {
    "imported first": ("import hf_hetero", "0"),
    "imported after torch": ("import torch.distributed, hf_hetero", "0"),
    "asked for otherwise": ("import os; os.environ[{name!r}] = '1'; import hf_hetero", "1"),
    "too late": (
        "import torch.distributed as dist; store = dist.HashStore()\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1); import hf_hetero",
        "None",
    ),
}


@pytest.mark.parametrize("start", often(STARTS, "imported after torch"))
def test_torch_ends_no_process_for_a_step_that_was_repeated(start: str) -> None:
    """The process group of a job is made before any trainer, so importing the package has to be enough."""
    script, expected = STARTS[start]
    script = f"{script.format(name=breaking.DUMP)}\nimport os; print(os.environ.get({breaking.DUMP!r}))"
    environment = {name: value for name, value in os.environ.items() if name != breaking.DUMP}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert ended.stdout.split() == [expected]


def warnings_of_mending(ends: bool) -> list[str]:
    """What a rank says as it makes its groups anew."""
    pool, said = GroupPool((2,), timeout_s=20, control_timeout_s=20), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "ends_later", lambda _: ends)
        patch.setattr(groups.logger, "warning", lambda text, *args: said.append(text % args))
        pool.mend()
    pool.close()
    return said


@pytest.mark.parametrize("ends", [False, True])
def test_who_may_be_ended_later_is_told(ends: bool) -> None:
    """A process that dies minutes after all went well again must have said why."""
    for said in run_ranks(warnings_of_mending, 2, ends):
        assert ["Import hf_hetero before" in text for text in said] == ([True] if ends else [])


def test_what_fails_on_a_device_is_broken_off_once() -> None:
    """The thread sees it wherever the host is, and says why before it lets the host go."""
    left, said = threading.Event(), list[str | None]()

    def leave() -> None:
        said.append(alarm.failure)
        left.set()

    found: list[str | None] = [None]
    alarm = Alarm("one", Store(), leave, lambda: found[0], look_s=0.01)
    try:
        assert not left.wait(0.1)
        found[0] = "An exchange waited too long"
        assert left.wait(10)
        left.clear()
        assert not left.wait(0.1)
        assert said == ["An exchange waited too long"]
    finally:
        alarm.close()


def test_what_an_alarm_broke_off_is_no_failure() -> None:
    """Who leaves a step breaks off what others wait in, which they see on their devices; but the alarm comes first."""
    store, looked = Store(), threading.Event()

    def failing() -> str | None:
        looked.set()
        return "NCCL says REMOTE_ERROR"

    theirs = Alarm("one", store, lambda: None, look_s=60)
    theirs.sound()
    mine = Alarm("one", store, lambda: None, failing, look_s=0.01)
    try:
        mine._number = theirs._number  # as of ranks that have begun together
        looked.clear()
        assert looked.wait(10)
        mine.close()
        assert mine.failure is None
    finally:
        mine._ended.set()
        theirs._ended.set()


def test_a_store_that_is_gone_is_no_alarm() -> None:
    """Who asks a store whose rank has gone gets no answer, which is no reason to leave; the thread stays quiet."""

    class Gone(Store):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Broken pipe")

    alarm = Alarm("one", Gone(), lambda: None, look_s=0.01)
    with alarm.heard():
        time.sleep(0.05)
        assert not alarm.follow()
    alarm.close()


def test_only_what_a_group_has_opened_is_shut() -> None:
    """Other connections of the process stay, and so does whatever has got the number of one that was closed."""
    other, before = socket.socketpair(), connections()
    mine, listening = socket.socketpair(), socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    opened = opened_since(before)
    assert set(opened) == {mine[0].fileno(), mine[1].fileno()}

    class Group:
        _device_types = ()

    number = mine[1].fileno()
    mine[1].close()
    again = socket.socketpair()  # one of these has the number now
    assert number in (again[0].fileno(), again[1].fileno())
    break_off(Group(), opened)  # type: ignore[arg-type]
    for left_alone in (other, again):
        left_alone[0].sendall(b"x")
        assert left_alone[1].recv(1) == b"x"
    assert mine[0].recv(1) == b""
    for sock in (*other, mine[0], *again, listening):
        sock.close()
