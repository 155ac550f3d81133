"""Plans the coming steps in the background on rank 0, and hands each step to all ranks when its turn comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from hf_hetero.agreement import broadcast
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan
from hf_hetero.step import Step

logger = logging.getLogger(__name__)

PlanFunction = Callable[[Sequence[int]], Plan]


class PlanAhead:
    """A source of planned steps.

    Rank 0 keeps a few plans ready while the model trains; the others receive theirs. A plan is a broadcast of the
    control group, so it must be asked for in the same order on all ranks.

    Args:
        plan: lengths of a global batch -> Plan.
        fallback: used when `plan` fails for another reason than the batch itself.
        rows: (epoch, index) -> dataset rows of a step.
        lengths: tokens of every dataset row; needed on rank 0 only.
        steps_per_epoch: steps of an epoch.
        num_ahead: plans kept ready beyond the one asked for.
        control: group that carries the plans; None for a single process.
    """

    def __init__(
        self,
        plan: PlanFunction,
        fallback: PlanFunction,
        rows: Callable[[int, int], tuple[int, ...]],
        lengths: Any,
        steps_per_epoch: int,
        num_ahead: int,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self._plan, self._fallback, self._rows, self._lengths = plan, fallback, rows, lengths
        self._steps_per_epoch, self._num_ahead, self._control = steps_per_epoch, num_ahead, control
        self._is_planner = control is None or dist.get_rank() == 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan-ahead") if self._is_planner else None
        self._coming: dict[tuple[int, int], Future[Step]] = {}

    def step(self, epoch: int, index: int) -> Step:
        """The planned step. Waits, on all ranks, if rank 0 has not finished its plan.

        Raises:
            HeteroError: the batch cannot be planned; raised on every rank.
        """
        return broadcast(lambda: self._take(epoch, index), self._control)

    def close(self) -> None:
        """Forget the coming plans and end the worker."""
        self._coming.clear()
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _take(self, epoch: int, index: int) -> Step:
        assert self._worker is not None
        for ahead in range(self._num_ahead + 1):
            more_epochs, at = divmod(index + ahead, self._steps_per_epoch)
            key = (epoch + more_epochs, at)
            if key not in self._coming:
                self._coming[key] = self._worker.submit(self._solve, *key)
        # an epoch that was cut short leaves plans behind that nobody will take
        self._coming = {key: future for key, future in self._coming.items() if key >= (epoch, index)}
        return self._wait(self._coming.pop((epoch, index)))

    def _wait(self, future: Future[Step]) -> Step:
        if future.done():
            return future.result()
        start = time.perf_counter()
        step = future.result()
        waited = time.perf_counter() - start
        return Step(step.epoch, step.index, step.rows, step.lengths, step.plan, wait_s=waited)

    def _solve(self, epoch: int, index: int) -> Step:
        rows = self._rows(epoch, index)
        lengths = tuple(int(self._lengths[row]) for row in rows)
        try:
            plan = self._plan(lengths)
        except HeteroError as error:
            raise type(error)(f"Step {index} of epoch {epoch}, dataset rows {_brief(rows)}: {error}") from error
        except Exception:
            logger.warning("Planning step %d of epoch %d failed; using a simpler plan.", index, epoch, exc_info=True)
            plan = self._fallback(lengths)
        return Step(epoch, index, rows, lengths, plan)


def _brief(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown}, ... ({len(rows)} in all)" if len(rows) > 8 else shown
