"""This module makes a run's process groups, in one order on all ranks, with a timeout and a name for each failure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks.breaking import (
    DUMP,
    Alarm,
    Connections,
    break_off,
    connections,
    ends_later,
    failure_of,
    forsake,
    opened_since,
    watched_here,
)
from hf_hetero.ranks.last_words import job_store, why_gone
from hf_hetero.ranks.naming import GROUP_LIMIT, JOB_LIMIT, all_ranks, named
from hf_hetero.ranks.waits import WORD_AFTER_S, Waits
from hf_hetero.topology import aligned_blocks

logger = logging.getLogger(__name__)

IN_HASTE = f" (now {GROUP_LIMIT} counts)"
"""At the end of a group's description: its operations may wait no longer than those within a group of a plan."""
SPEAKERS = (0, 1)
"""Ranks that do; one of them may be who is late."""


class GroupPool:
    """A `GroupPool` holds every process group that a plan may use, and one more for control messages.

    Creating a group is itself a collective, so all of them are made here, eagerly, in one order: planning never has to
    wait for communication. Only aligned blocks are needed, so a rank belongs to one group of each degree. A timeout is
    passed to each group because torch does not hand down the one of `init_process_group`.

    Each group's first message is one of all its ranks, sent here. NCCL joins the ranks of a group by the first message,
    and where that is one of two ranks only, as in a ring, torch calls the behaviour undefined (`batch_isend_irecv`).

    What is waited for within a step can be broken off (see `breaking`), and made anew (`mend`). So a wrapper's
    exchanges go over groups of the pool, too (`carry`).

    A pool can be closed and opened again: each group keeps threads and file descriptors, and a process may train with
    many trainers, one after the other.

    Control messages, and those of the default group (gradients, for one) and of a wrapper's own, have the timeout of
    the job: a rank may save or evaluate for long. While steps are trained they have that of the groups, if that is
    shorter: see `hurry`.

    Without torch.distributed (a single process) the pool is empty.

    Args:
        degrees: sizes of the groups; 1 needs none.
        timeout_s: seconds that an operation inside a group, or within a step, may wait.
        control_timeout_s: seconds that ranks may wait for each other between steps (saving, evaluating).
        device: of what the groups exchange.
    """

    def __init__(
        self,
        degrees: Iterable[int],
        timeout_s: float,
        control_timeout_s: float,
        device: torch.device | None = None,
    ) -> None:
        self._degrees, self._device = sorted(set(degrees) - {1}), device
        self._timeout_s, self._control_timeout_s = timeout_s, control_timeout_s
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.control: dist.ProcessGroup | None = None
        self.waits: Waits | None = None
        """Of this rank within groups, while they are open."""
        self.alarm: Alarm | None = None
        """By which a rank has all others leave a step, and sees what fails on its device, while groups are open."""
        self.carried: dict[tuple[int, ...], dist.ProcessGroup] = {}
        """The groups of a wrapper, by their ranks."""
        self._connections: dict[dist.ProcessGroup, Connections] = {}
        self._limit = timedelta(seconds=timeout_s)
        self._usual: dict[dist.ProcessGroup, list[tuple[Any, timedelta]]] = {}
        self._others: tuple[dist.ProcessGroup, ...] = ()
        self._beside: dist.ProcessGroup | None = None
        self.open()

    def open(self) -> None:
        """Make the groups, unless they are there. A collective of all ranks."""
        if self.control is not None or not dist.is_initialized():
            return
        # gloo carries control messages: they live on the host and must not wait for a GPU stream
        self.control = _new_group(None, self._control_timeout_s, JOB_LIMIT, backend="gloo")
        self.alarm = Alarm(self.control.group_name, job_store(), self._break_off, self._failing)
        if self._degrees:
            self.waits = Waits(dist.get_rank(), GROUP_LIMIT, WORD_AFTER_S)
        # every rank makes every group, also those that it is not in: torch numbers groups by the order of their making
        for degree in self._degrees:
            for ranks in aligned_blocks(dist.get_world_size(), degree):
                self._groups[ranks] = self._made(ranks, self._timeout_s, GROUP_LIMIT)

    def _made(self, ranks: tuple[int, ...], timeout_s: float, limit: str) -> dist.ProcessGroup:
        """Make a group of some ranks for what they exchange within steps. A collective of all ranks.

        Args:
            ranks: of the group.
            timeout_s: seconds that its operations may wait.
            limit: the setting that says so.
        """
        # whoever is not in it opens nothing, and looks for nothing: most groups of many ranks are others'
        is_own = dist.get_rank() in ranks
        before = connections() if is_own else {}
        with watched_here():
            group = _new_group(list(ranks), timeout_s, limit)
        if is_own:
            with named("The first exchange of a group", f"ranks {list(ranks)}", limit):
                dist.all_reduce(torch.zeros(1, device=self._device), group=group)
            self._connections[group] = opened_since(before)
        return group

    def carry(self, wanted: Iterable[tuple[int, ...]]) -> Mapping[tuple[int, ...], dist.ProcessGroup]:
        """Make groups for the exchanges of a wrapper, and return them by their ranks. A collective of all ranks.

        Args:
            wanted: the ranks of each group, the same on all ranks, in the same order.
        """
        if self.control is None:
            return {}
        for ranks in wanted:
            if ranks not in self.carried:
                self.carried[ranks] = self._made(ranks, self._control_timeout_s, JOB_LIMIT)
        return self.carried

    def beside_training(self) -> dist.ProcessGroup | None:
        """Return a group of all ranks for a thread beside training, on the host; a collective of all where it is new.

        Nothing that goes on in steps is in its way, or broken off with it. Ranks may wait in it as long as for saving.
        """
        if self._beside is None and self.control is not None:
            self._beside = _new_group(None, self._control_timeout_s, JOB_LIMIT, backend="gloo")
        return self._beside

    def _break_off(self) -> None:
        for group, opened in self._connections.items():
            break_off(group, opened)

    def _failing(self) -> str | None:
        """Return in words what torch has seen to fail on a device; None: nothing."""
        for group in (*self._connections,):  # the groups of this rank; others are made meanwhile
            if (kind := failure_of(group)) is not None:
                late = f"it waited longer than {limit_of(group)} allows" if kind == "TIMEOUT" else f"NCCL says {kind}"
                return f"An exchange of ranks {dist.get_process_group_ranks(group)} on the device failed: {late}"
        return None

    def check(self) -> None:
        """Look whether an exchange on the device has failed, which no host waits for.

        Raises:
            CollectiveFailed: one has; what was computed since is worth nothing.
        """
        if self.alarm is not None and self.alarm.failure is not None:
            where = 'Where it was called is in torch\'s own words above ("Stack trace of the failed collective").'
            raise CollectiveFailed(f"{self.alarm.failure}. {where} {why_gone()}")

    def mend(self) -> None:
        """Make anew what is used within steps. A collective of all ranks, which have left a step.

        What the wrapper's exchanges go over is another then, and relaxed.
        """
        self.relax()
        if self.alarm is None:
            return
        if ends_later(_default_group()):
            logger.warning(
                "Rank %d: torch may end this process some minutes from now, because an exchange was broken off. Import "
                "hf_hetero before the process group is made, and do not set %s.",
                dist.get_rank(),
                DUMP,
            )
        with self.alarm.over():
            self._break_off()  # on ranks that did not wait for anybody
            for group in (*self._groups.values(), *self.carried.values()):
                forsake(group)
            self._connections.clear()
            self._groups = {ranks: self._made(ranks, self._timeout_s, GROUP_LIMIT) for ranks in self._groups}
            self.carried = {ranks: self._made(ranks, self._control_timeout_s, JOB_LIMIT) for ranks in self.carried}

    def get(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """Return the process group of these ranks; None for a single rank, which needs none.

        Raises:
            CollectiveFailed: as `check`.
        """
        self.check()
        return self._groups[ranks] if len(ranks) > 1 else None

    def include(self, others: Iterable[dist.ProcessGroup]) -> None:
        """Let groups that somebody else has made, and uses within steps, hurry and relax with the rest."""
        was_in_haste = bool(self._usual)
        self.relax()  # those that are left out now must get back the timeout that they had
        self._others = tuple(others)
        if was_in_haste:
            self.hurry()

    def hurry(self) -> None:
        """Let ranks wait for each other, in whatever they do together, no longer than in a group, from now on."""
        if self.control is None or self._usual:
            return
        for group in dict.fromkeys((self.control, _default_group(), *self._others)):
            usual = [(backend, backend.options._timeout) for backend in _backends(group)]
            self._usual[group] = usual
            if slower := [(backend, limit) for backend, limit in usual if limit > self._limit]:
                _mark(group, IN_HASTE)  # an error says which setting to raise, and it is this one as long as they hurry
                for backend, _ in slower:
                    backend._set_default_timeout(self._limit)

    def relax(self) -> None:
        """Let ranks wait for each other as long as the job allows, from now on."""
        for group, usual in self._usual.items():
            _mark(group, "")
            for backend, limit in usual:
                backend._set_default_timeout(limit)
        self._usual.clear()

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Return a context in which ranks wait as long as the job allows: some save, and others wait for them."""
        was_in_haste = bool(self._usual)
        self.relax()
        try:
            yield
        finally:
            if was_in_haste:
                self.hurry()

    def close(self) -> None:
        """Destroy the groups; the pool is empty until it is opened again. Called on all ranks."""
        self.relax()
        if dist.is_initialized() and self._failing() is not None:  # to end a group would wait for what will never come
            self._break_off()
        for thread in (self.waits, self.alarm):
            if thread is not None:
                thread.close()
        self.waits, self.alarm, self._others = None, None, ()
        members = [
            *self._groups.values(),
            *self.carried.values(),
            *(group for group in (self._beside, self.control) if group is not None),
        ]
        self._groups, self.carried, self._beside, self.control = {}, {}, None, None
        self._connections.clear()
        for group in members:
            if dist.is_initialized():  # a script may have ended torch.distributed before
                dist.destroy_process_group(group)


def _new_group(ranks: list[int] | None, timeout_s: float, limit: str, backend: str | None = None) -> dist.ProcessGroup:
    """Make a process group of some ranks; None: of all. A collective of all ranks, whether they are in it or not.

    Raises:
        CollectiveFailed: a rank has gone, or is late; its address is not in the job's store, or the store has gone.
    """
    where = all_ranks() if ranks is None else f"ranks {ranks}"
    with named("The making of a group", where, limit):
        group: Any = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), backend=backend)
    return group  # for a rank outside, torch's placeholder


def limit_of(group: dist.ProcessGroup | None = None) -> str:
    """Return the setting that says how long ranks may wait in a group of all of them; None: the default one."""
    if not dist.is_initialized():
        return JOB_LIMIT
    group = _default_group() if group is None else group
    return GROUP_LIMIT if group.group_desc.endswith(IN_HASTE) else JOB_LIMIT


def _default_group() -> dist.ProcessGroup:
    """Return the process group that `init_process_group` has made."""
    return dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]


def _backends(group: dist.ProcessGroup) -> list[Any]:
    """Return those of a group's backends that have a timeout, which they look up for each operation."""
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]  # pyright: ignore[reportPrivateUsage]
    return [backend for backend in backends if hasattr(backend, "options") and hasattr(backend, "_set_default_timeout")]


def _mark(group: dist.ProcessGroup, note: str) -> None:
    """Let a group's description say by which setting its operations may wait."""
    group._set_group_desc(group.group_desc.removesuffix(IN_HASTE) + note)  # pyright: ignore[reportPrivateUsage]


def wait_for(work: Any, operation: str, group: dist.ProcessGroup) -> None:
    """Wait for a collective of all ranks, and say so once that takes long."""
    # a wait that runs out leaves the collective as it is, until its own limit: the next wait takes it up again
    waited_s, word_s = 0.0, WORD_AFTER_S
    while dist.get_rank() in SPEAKERS:
        try:
            work.wait(timedelta(seconds=word_s))
            return
        except RuntimeError:
            if work.is_completed():
                break  # it has failed, or has come to its end just now
        waited_s += word_s
        word_s = waited_s  # ever more rarely
        logger.warning(
            "Rank %d has waited %g s for other ranks, in %s, and waits on, as long as %s allows.",
            dist.get_rank(),
            waited_s,
            operation,
            limit_of(group),
        )
    work.wait()
