"""The process groups of a run: made once, in one order on all ranks, with a timeout and a name for each failure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_hetero.errors import CollectiveFailed
from hf_hetero.topology import aligned_blocks

LOST_PEER = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
"""Words of torch's errors when another rank has gone or is late."""


class GroupPool:
    """Every group that a plan may use, and one more for control messages.

    Creating a group is itself a collective, so all of them are made here, eagerly, in one order: planning never has to
    wait for communication. Only aligned blocks are needed, so a rank belongs to one group of each degree. A timeout is
    passed to each group because torch does not hand down the one of `init_process_group`.

    Each group's first message is one of all its ranks, sent here. NCCL joins the ranks of a group by the first message,
    and where that is one of two ranks only, as in a ring, torch calls the behaviour undefined (`batch_isend_irecv`).

    Without torch.distributed (a single process) the pool is empty.

    Args:
        degrees: sizes of the groups; 1 needs none.
        timeout_s: seconds that an operation inside a group may wait.
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
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.control: dist.ProcessGroup | None = None
        if not dist.is_initialized():
            return
        # gloo carries control messages: they live on the host and must not wait for a GPU stream
        self.control = _new_group(None, control_timeout_s, backend="gloo")
        for degree in sorted(set(degrees) - {1}):
            for ranks in aligned_blocks(dist.get_world_size(), degree):
                self._groups[ranks] = _new_group(list(ranks), timeout_s)
                if dist.get_rank() in ranks:
                    with named("The first exchange of a group", f"ranks {list(ranks)}"):
                        dist.all_reduce(torch.zeros(1, device=device), group=self._groups[ranks])

    def get(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The process group of these ranks; None for a single rank, which needs none."""
        return self._groups[ranks] if len(ranks) > 1 else None

    def close(self) -> None:
        """Destroy the groups; the pool is empty afterwards."""
        members = [*self._groups.values(), *([self.control] if self.control is not None else [])]
        self._groups, self.control = {}, None
        for group in members:
            if dist.is_initialized():
                dist.destroy_process_group(group)


def _new_group(ranks: list[int] | None, timeout_s: float, backend: str | None = None) -> dist.ProcessGroup:
    group: Any = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), backend=backend)
    return group  # for a rank outside, torch's placeholder


@contextmanager
def named(operation: str, where: Callable[[], str] | str, only_lost_peers: bool = False) -> Iterator[None]:
    """Give a failing collective a name: which operation, of which ranks, at which step.

    Args:
        operation: what was done together.
        where: step and ranks.
        only_lost_peers: leave alone what does not look like a rank that has gone, where other code runs inside, too.

    Raises:
        CollectiveFailed: instead of torch's own error, which says none of that.
    """
    try:
        yield
    except RuntimeError as error:
        if only_lost_peers and not any(word in str(error) for word in LOST_PEER):
            raise
        where = where if isinstance(where, str) else where()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CollectiveFailed(
            f"{operation} failed or waited too long at {where}: {reason} Look for the first error among these ranks; "
            "if they are only slow, raise HeteroConfig.group_timeout_s."
        ) from error
