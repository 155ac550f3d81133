"""Ranks as threads of one process: what they tell each other goes through torch.distributed, and its bytes are counted.

`torch.distributed` is as it is, but for its default group, which is another in each thread. Of a thousand ranks not all
need be there: each of those that are not says, in each exchange, what one of those that are says.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg

T = TypeVar("T")


class Gone(RuntimeError):
    """Another rank has ended, so that nobody comes to this exchange any more."""


class _Meeting:
    """One exchange: what the ranks bring, and what they make of it, once, whoever comes last."""

    def __init__(self, num_present: int) -> None:
        self.brought: list[Any] = [None] * num_present
        self.num_missing = num_present
        self.over = threading.Event()
        self.made: Any = None
        self.error: Exception | None = None


class World:
    """`World` is ranks that meet.

    Args:
        num_ranks: of the run.
        present: ranks that have a thread, rank 0 among them; None: all.
        patience_s: seconds that a rank waits for the others.
    """

    def __init__(self, num_ranks: int, present: Sequence[int] | None = None, patience_s: float = 600.0) -> None:
        self.num_ranks, self.patience_s = num_ranks, patience_s
        self.present = sorted({0, *(range(num_ranks) if present is None else present)})
        place, others = {rank: at for at, rank in enumerate(self.present)}, len(self.present) - 1
        speakers = [place.get(rank, 1 + rank % others if others else 0) for rank in range(num_ranks)]
        self._place, self.speakers = place, torch.tensor(speakers)
        """For each rank, who says what it says, by place among those that are there."""
        self.num_messages: dict[int, Counter[str]] = {rank: Counter() for rank in self.present}
        self.received_bytes: dict[int, Counter[str]] = {rank: Counter() for rank in self.present}
        """By rank and kind of exchange; of a rank that is there."""
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._lock = threading.Lock()
        self._is_broken = False

    def meet(self, turn: tuple[str, int], rank: int, what: str, value: Any, make: Callable[[list[Any]], Any]) -> Any:
        """Come to an exchange, wait for the others, and return what is made of all that is brought.

        Args:
            turn: group, and number of its exchange, counted by each rank.
            rank: which comes.
            what: kind of exchange, for all the same.
            value: that it brings.
            make: of what all bring, by place among those that are there.
        """
        with self._lock:
            meeting = self._meetings.setdefault(turn, _Meeting(len(self.present)))
            meeting.brought[self._place[rank]] = what, value
            meeting.num_missing -= 1
            is_last = not meeting.num_missing
            if is_last:
                del self._meetings[turn]
        if is_last:
            try:
                kinds = {kind for kind, _ in meeting.brought}
                if len(kinds) > 1:
                    raise AssertionError(f"ranks are at different exchanges: {kinds}")
                meeting.made = make([brought for _, brought in meeting.brought])
            except Exception as error:
                meeting.error = error
            meeting.over.set()
        elif not meeting.over.wait(self.patience_s):
            raise Gone("gloo: Timed out")
        if self._is_broken:
            raise Gone("gloo: Connection closed by peer")
        if meeting.error is not None:
            raise meeting.error
        return meeting.made

    def note(self, rank: int, what: str, num_bytes: int) -> None:
        """Count a message that a rank has received."""
        self.num_messages[rank][what] += 1
        self.received_bytes[rank][what] += num_bytes

    def leave(self) -> None:
        """Have all that wait, now or later, be told that a rank has ended."""
        with self._lock:
            self._is_broken = True
            for meeting in self._meetings.values():
                meeting.over.set()

    def run(self, rank_of: Callable[[int], T]) -> dict[int, T]:
        """Call a function on each rank that is there, in a thread of its own; return what it gives, by rank.

        Raises:
            Exception: what the first rank to fail raised.
        """
        found: dict[int, T] = {}
        errors: list[BaseException] = []

        def rank_in_thread(rank: int) -> None:
            torch.distributed.distributed_c10d._world.default_pg = group = Everyone(self, rank)
            torch.distributed.distributed_c10d._world.pg_map[group] = "threads", dist.HashStore()
            try:
                found[rank] = rank_of(rank)
            except BaseException as error:
                if not isinstance(error, Gone) or not errors:
                    errors.append(error)
                self.leave()

        multi_threaded_pg._install_threaded_pg()
        try:
            threads = [threading.Thread(target=rank_in_thread, args=(rank,), daemon=True) for rank in self.present]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            multi_threaded_pg._uninstall_threaded_pg()
        if errors:
            raise next((error for error in errors if not isinstance(error.__cause__, Gone)), errors[0])
        return found


class _Done:
    """The handle of an exchange that is over."""

    def wait(self, timeout: Any = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


class Everyone(dist.ProcessGroup):
    """`Everyone` is the group of all ranks, as one of them holds it."""

    def __init__(self, world: World, rank: int, name: str = "all") -> None:
        super().__init__(rank, world.num_ranks)
        self._ranks, self._me, self._name, self._turn = world, rank, name, 0

    def new_group(self, ranks: Sequence[int], group_name: str, **_: Any) -> Everyone | None:
        """Return a group of some ranks, for those that are in it: one of all, for what is to be seen is who makes it.

        torch asks a default group that has this method to make all others.
        """
        return Everyone(self._ranks, self._me, group_name) if self._me in ranks else None

    def _met(self, what: str, value: Any, make: Callable[[list[Any]], Any]) -> Any:
        self._turn += 1
        return self._ranks.meet((self._name, self._turn), self._me, what, value, make)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> _Done:
        """Give every rank what each of them has, of one shape."""
        speakers = self._ranks.speakers
        every = self._met("all-gather", inputs[0].flatten(), lambda brought: torch.stack(brought)[speakers])
        base = outputs[0][0]._base
        if base is not None and base.numel() == every.numel():  # one tensor that is cut into all of them
            base.view(every.shape).copy_(every)
        else:
            for output, row in zip(outputs[0], every, strict=True):
                output.copy_(row.view_as(output))
        self._ranks.note(self._me, "all-gather", (self._ranks.num_ranks - 1) * inputs[0].nbytes)
        return _Done()

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> _Done:
        """Give one rank what each of them has, of one shape."""
        speakers = self._ranks.speakers
        every = self._met("gather", inputs[0], lambda brought: torch.stack(brought)[speakers])
        if outputs:
            for output, row in zip(outputs[0], every, strict=True):
                output.copy_(row)
            self._ranks.note(self._me, "gather", (self._ranks.num_ranks - 1) * inputs[0].nbytes)
        return _Done()

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> _Done:
        """Give every rank what one of them has."""
        root = 0 if opts is None else opts.rootRank
        said = self._met("broadcast", tensors[0], lambda brought: brought[self._ranks._place[root]].clone())
        if root != self._me:
            tensors[0].copy_(said)
            self._ranks.note(self._me, "broadcast", said.nbytes)
        return _Done()

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> _Done:
        """Give every rank the largest, or the sum, of what they have."""
        speakers, is_largest = self._ranks.speakers, opts is not None and opts.reduceOp == dist.ReduceOp.MAX

        def joined(brought: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(brought).amax(0) if is_largest else torch.stack(brought)[speakers].sum(0)

        tensors[0].copy_(self._met("all-reduce", tensors[0].clone(), joined))
        self._ranks.note(self._me, "all-reduce", 2 * tensors[0].nbytes)
        return _Done()

    def barrier(self, opts: Any = None) -> _Done:
        """Wait for all."""
        self._met("barrier", None, lambda brought: None)
        return _Done()
