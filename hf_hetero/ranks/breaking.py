"""A step that one rank cannot finish is left by all: an alarm tells them, and what they wait in is broken off.

A rank whose memory runs out in the middle of a step owes messages to others, which wait for them inside the model, in
torch's code. So the exchanges themselves have to fail, on all ranks:

    NCCL    `abort` ends a group's operations, those on the device, too. It has to be called on each rank.
    gloo    has no such call. The connections that a group has opened are shut down; both ends of each see that at
            once, and whoever waits there gets an error.

Who gets an error looks whether there is an alarm, and breaks off what it has itself; so the news spreads from group to
group. On a GPU a rank may also stand in a wait for its device, which raises nothing: a thread looks for the alarm.

That thread also looks whether an exchange on a device has failed, or waits for too long, which no host waits for. By
itself torch would then let a minute pass, and kill the process (`watched_here`); here what is waited for is broken off,
so that the host goes on, to where it raises an error in words (`GroupPool.check`).

What is broken off on one rank is a failure on another, whose watchdog may see it before the rank has left. By itself
torch then tells every rank so, and the monitor of each one's first group ends its process eight minutes later, however
well training goes by then. That group is made before there is a trainer, so importing this package switches it off
(`DUMP`).
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

Connections = Mapping[int, int]
"""File descriptor of a socket -> its inode, for a number may be another file's later."""

DUMP = "TORCH_NCCL_DUMP_ON_TIMEOUT"
"""Whether a process writes down what it does, and ends, once torch has seen an exchange fail on any rank."""
LEFT_TO_US = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # kill no process
    # what a watchdog sleeps after a failure, which the end of its group waits for, is four times this: a second, where
    # it would be a minute
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
}
LOOK_S = 1.0
"""How often a rank looks for an alarm while it computes."""


def connections() -> dict[int, int]:
    """Return the sockets of this process that may be connected: all but those that listen."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            status = os.stat(int(name))
            if stat.S_ISSOCK(status.st_mode) and not _listens(int(name)):
                found[int(name)] = status.st_ino
    return found


def opened_since(before: Connections) -> Connections:
    """Return the sockets that were not there before."""
    return {number: inode for number, inode in connections().items() if before.get(number) != inode}


def break_off(group: dist.ProcessGroup, opened: Connections) -> None:
    """Have whatever this rank and others wait for in a group fail, now and later.

    Args:
        group: that this rank is in.
        opened: the connections that were opened when it was made.
    """
    for device in group._device_types:  # pyright: ignore[reportPrivateUsage]
        backend: Any = group._get_backend(device)  # pyright: ignore[reportPrivateUsage]
        if backend.name() != "gloo":
            backend.abort()
    for number, inode in opened.items():
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            # looked at through a number of our own, which nobody closes meanwhile: gloo may have closed its own
            if os.fstat(connection.fileno()).st_ino == inode:
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def watched_here() -> Iterator[None]:
    """Return a context in which groups are made whose failures torch leaves to this package.

    Its watchdog for NCCL kills a process in which an exchange has failed, or waited too long, a minute after that. So
    no step could be repeated after another rank has left it, and no error would say why the process ends. NCCL reads
    these variables when a group is made. Whoever has set them himself, has it his way; and so has a torch that could
    not be asked what its watchdog has seen (`failure_of`).
    """
    nccl = getattr(dist, "ProcessGroupNCCL", None)  # not there in a torch without NCCL, which reads none of them
    ours = {name: value for name, value in LEFT_TO_US.items() if name not in os.environ}
    if nccl is not None and not hasattr(nccl, "get_error"):
        ours = {}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def failure_of(group: dist.ProcessGroup) -> str | None:
    """Return what torch's watchdog has seen of a group, as it calls it: TIMEOUT, REMOTE_ERROR; None: no failure."""
    for device in group._device_types:  # pyright: ignore[reportPrivateUsage]
        backend: Any = group._get_backend(device)  # pyright: ignore[reportPrivateUsage]
        if hasattr(backend, "get_error") and (error := backend.get_error().name) != "SUCCESS":
            return str(error)
    return None


def ends_later(group: dist.ProcessGroup) -> bool:
    """Return whether torch ends this process some minutes after an exchange has failed, as far as can be known.

    Args:
        group: the first that the process has made.
    """
    on_nccl = any(group._get_backend(device).name() == "nccl" for device in group._device_types)  # pyright: ignore[reportPrivateUsage]
    return on_nccl and os.environ.get(DUMP, "1").lower() not in ("0", "n", "no", "f", "false")


def forsake(group: Any) -> None:
    """Drop a group that was broken off; unlike to destroy it, that asks nothing of its operations."""
    if dist.is_initialized() and group is not dist.GroupMember.NON_GROUP_MEMBER:
        dist.distributed_c10d._abort_process_group(group)  # pyright: ignore[reportPrivateUsage]


class Alarm:
    """An `Alarm` is heard by all ranks, wherever they are in a step.

    Args:
        name: the same on all ranks, and no other alarm's.
        store: which all ranks share.
        leave: breaks off what this rank may wait in; called from a thread, too, and maybe several times.
        failing: returns in words what has failed, though nobody has given the alarm; None: nothing has.
        look_s: how often the thread looks.
    """

    def __init__(
        self,
        name: str,
        store: Any,
        leave: Callable[[], None],
        failing: Callable[[], str | None] = lambda: None,
        look_s: float = LOOK_S,
    ) -> None:
        self._name, self._store, self._leave, self._failing, self._look_s = name, store, leave, failing, look_s
        self.failure: str | None = None
        """What has failed for good, in words; it was broken off."""
        self._number, self._is_in_step = 0, False
        # ranks that are started again may find the store in which those before them gave an alarm; nobody gives one
        # before all ranks have come by here
        while self._sounds():
            self._number += 1
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="alarm", daemon=True)
        self._thread.start()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Return a context of a step: an alarm breaks off what is waited for inside."""
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False

    def sound(self) -> None:
        """Give the alarm, and leave."""
        with suppress(Exception):  # where the store has gone, so has a rank, and what others wait in fails by itself
            self._store.set(self._key, "1")
        with self._lock:
            self._leave()

    def follow(self) -> bool:
        """Return whether a rank has given the alarm; and leave, if so."""
        if not self._sounds():
            return False
        with self._lock:
            self._leave()
        return True

    @contextmanager
    def over(self) -> Iterator[None]:
        """Return a context in which what was broken off is made anew, on all ranks; then the alarm is ready again."""
        with self._lock:  # a thread that looked before must not break off what is new
            self._number += 1
            yield

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    @property
    def _key(self) -> str:
        return f"hf_hetero/alarm-{self._name}-{self._number}"

    def _sounds(self) -> bool:
        with suppress(Exception):  # the store lives on a rank that may have gone
            return bool(self._store.check([self._key]))
        return False

    def _look(self) -> None:
        while not self._ended.wait(self._look_s):
            with self._lock:
                if self._is_in_step and self._sounds():
                    self._leave()
                # a rank gives the alarm first, and then breaks off, which the others see as a failure
                elif self.failure is None and (failure := self._failing()) is not None and not self._sounds():
                    self.failure = failure  # before the host is let go, which looks for it
                    self._leave()


def _listens(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as own:
        return bool(own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
