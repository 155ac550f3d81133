"""This module plans the coming steps in the background on rank 0, and hands each to all ranks when its turn comes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch.distributed as dist

from hf_hetero.data.plan_sources import Closeable, Comparing, PlanSource, Seeing
from hf_hetero.errors import HeteroError
from hf_hetero.plan import Plan
from hf_hetero.planner import PlannerLost
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import Step

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""Epoch, and step within it."""

WORTH_REPLACING = 0.99
"""An improved plan is taken if it needs at most this share of the time: for less, runs had better be alike."""

LONG_S = 10.0
"""A step that waits longer for its plan says so, while it waits."""


@dataclass(frozen=True, slots=True)
class Draws:
    """`Draws` says what is to be planned, and in which order.

    Args:
        draw: epoch, step within it -> the samples of the step; None: the data has ended before it. On rank 0 only.
        after: a step -> the next one; None: there is none.
    """

    draw: Callable[[int, int], Drawn | None]
    after: Callable[[Key], Key | None]


class PlanAhead:
    """`PlanAhead` gives a run its planned steps, one after the other.

    Rank 0 keeps a few plans ready while the model trains; the others receive theirs. A plan is a broadcast of the
    control group, so it must be asked for in the same order on all ranks. Plans that are ready early are improved in
    a second thread, the one that is needed last first; a step never waits for that.

    Args:
        source: plans, improves plans, and plans simply when that breaks; used on rank 0 only.
        draws: what is to be planned.
        num_ahead: plans kept ready beyond the one asked for.
        control: group that carries the plans; None for a single process.
    """

    def __init__(
        self,
        source: PlanSource,
        draws: Draws,
        num_ahead: int,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self._source, self._draws, self._num_ahead, self._control = source, draws, num_ahead, control
        is_planner = control is None or dist.get_rank() == 0
        # one thread for each, so that plans are made in the order of their steps, and improving never delays planning
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan-ahead") if is_planner else None
        self._improver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="improve-ahead") if is_planner else None
        self._lock = threading.RLock()  # a future that is done calls back at once, in the thread that holds the lock
        self._coming: dict[Key, Future[Step | None]] = {}
        self._improved: dict[Key, Plan] = {}
        self._improving = False
        self._closed = False

    def step(self, epoch: int, index: int) -> Step | None:
        """Return the planned step; None: the data has ended. Waits, on all ranks, while rank 0 still plans it.

        Raises:
            HeteroError: the batch cannot be planned; raised on every rank.
        """
        # what fails on rank 0 is handed to all, too: raised there alone, it would leave the others to wait for a plan
        return broadcast(lambda: self._take(epoch, index), self._control)

    def again(self, step: Step) -> Step:
        """Return a step with a new plan, of the same samples, because memory holds less than its plan was made for.

        Those that are ready already stay as they are. A collective of all ranks.

        Raises:
            HeteroError: the batch cannot be planned any more; raised on every rank.
        """

        def planned() -> Step:
            assert self._worker is not None
            return self._worker.submit(self._planned, step.epoch, step.index, step.drawn).result()

        return broadcast(planned, self._control)

    def forget(self) -> None:
        """Drop the coming plans, because what they are for has changed, or what they cost."""
        with self._lock:
            for future in self._coming.values():
                future.cancel()  # one that is underway ends, and is not taken
            self._coming.clear()
            self._improved.clear()

    def close(self) -> None:
        """Forget the coming plans, and end what makes them."""
        with self._lock:
            self._closed = True
            self._coming.clear()
            self._improved.clear()
        if isinstance(self._source, Closeable):
            self._source.close()  # before the threads: it ends the calls that they wait in
        for pool in (self._worker, self._improver):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, epoch: int, index: int) -> Step | None:
        """Return a step as soon as it is planned, and have those after it planned; on rank 0."""
        assert self._worker is not None
        with self._lock:
            key: Key | None = (epoch, index)
            for _ in range(self._num_ahead + 1):
                if key is not None and key not in self._coming:
                    self._coming[key] = self._worker.submit(self._solve, *key)
                    self._coming[key].add_done_callback(lambda _: self._wake_improver())
                key = self._draws.after(key) if key is not None else None
            future = self._coming.pop((epoch, index))
            better = self._improved.pop((epoch, index), None)
            # steps are taken in order, so that earlier ones are of an epoch that was cut short, which leaves
            # plans behind that nobody will take
            self._coming = {key: coming for key, coming in self._coming.items() if key > (epoch, index)}
            self._improved = {key: plan for key, plan in self._improved.items() if key in self._coming}
            self._wake_improver()
        step = self._wait(future, epoch, index)
        return step if step is None or better is None else replace(step, plan=better)

    def _wait(self, future: Future[Step | None], epoch: int, index: int) -> Step | None:
        """Return the step once it is planned, with the seconds that were waited for it."""
        if future.done():
            return future.result()
        start = time.perf_counter()
        if not wait([future], LONG_S).done:
            logger.warning("Step %d of epoch %d has waited %g s for its plan, and waits on.", index, epoch, LONG_S)
        step = future.result()
        return replace(step, wait_s=time.perf_counter() - start) if step is not None else None

    def _solve(self, epoch: int, index: int) -> Step | None:
        """Draw a step's samples and plan them; in the planning thread."""
        drawn = self._draws.draw(epoch, index)
        return None if drawn is None else self._planned(epoch, index, drawn)

    def _planned(self, epoch: int, index: int, drawn: Drawn) -> Step:
        """Plan the samples of a step; in the planning thread."""
        lengths, as_text = drawn.lengths, tuple[int, ...]()
        if drawn.tower_tokens and isinstance(self._source, Seeing):
            lengths = as_text = self._source.planned_lengths(lengths, drawn.tower_tokens)
        try:
            plan = self._source.plan(lengths)
        except HeteroError as error:
            # a simpler plan would not help: the batch itself is at fault
            raise type(error)(f"Step {index} of epoch {epoch}, dataset rows {_brief(drawn.rows)}: {error}") from error
        except Exception as error:
            self._warn(f"Planning step {index} of epoch {epoch} failed; using a simpler plan", error)
            return Step(epoch, index, drawn, self._source.static(lengths), as_text=as_text)
        static_s = self._static_seconds(epoch, index, lengths)
        return Step(epoch, index, drawn, plan, static_s=static_s, as_text=as_text)

    def _static_seconds(self, epoch: int, index: int, lengths: Sequence[int]) -> dict[int, float]:
        """Return what runs with one degree would take, by degree; nothing where that is not known."""
        if not isinstance(self._source, Comparing):
            return {}
        try:
            return self._source.static_seconds(lengths)
        except Exception as error:  # it is for the log, and costs no step its plan
            self._warn(f"Step {index} of epoch {epoch} is not compared with runs of one degree", error)
            return {}

    def _warn(self, what: str, error: Exception) -> None:
        """Say what failed, and where in the code if it should never fail; not once plans are no longer wanted."""
        if not self._closed:
            is_foreseen = isinstance(error, HeteroError | PlannerLost)
            logger.warning("%s: %s", what, error, exc_info=None if is_foreseen else error)

    def _wake_improver(self) -> None:
        """Let the improver look for work, unless it is at it: a plan is ready, or one was taken."""
        with self._lock:
            if self._improver is None or self._improving or self._closed:
                return
            self._improving = True
            self._improver.submit(self._improve_coming)

    def _improve_coming(self) -> None:
        """Improve plan after plan, until all that are ready have been."""
        while (step := self._next_to_improve()) is not None:
            try:
                improved = self._source.improve(step.plan, step.planned_lengths)
            except Exception as error:
                self._warn(f"Improving the plan of step {step.index} of epoch {step.epoch} failed", error)
                improved = step.plan
            with self._lock:
                # unless the step was taken meanwhile: its plan is already on its way to all ranks
                if _key(step) in self._coming:
                    self._improved[_key(step)] = _worth_it(step.plan, improved)

    def _next_to_improve(self) -> Step | None:
        """Return the ready step that is needed last, of those not improved yet; None ends the improver's turn.

        The last one, because there is most time for it; the next one may be taken before it is improved.
        """
        with self._lock:
            for key, future in sorted(self._coming.items(), reverse=True):
                if key in self._improved or not future.done() or future.cancelled() or future.exception():
                    continue
                if (step := future.result()) is not None:
                    return step
            self._improving = False  # under the lock of the look: a plan that is ready after it wakes the improver
            return None


def _key(step: Step) -> Key:
    """Return the epoch of a step, and its place there."""
    return step.epoch, step.index


def _worth_it(plan: Plan, improved: Plan) -> Plan:
    """Return the improved plan if it is clearly faster; else the plan as it was, with what was proven of it."""
    if improved.seconds <= plan.seconds * WORTH_REPLACING:
        return improved
    return replace(plan, lower_bound_s=max(plan.lower_bound_s, min(improved.lower_bound_s, plan.seconds)))


def _brief(rows: Sequence[int]) -> str:
    """Name the first of some rows, and say how many there are."""
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown}, ... ({len(rows)} in all)" if len(rows) > 8 else shown
