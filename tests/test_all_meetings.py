"""Whatever goes wrong on whichever rank, and wherever: no ranks wait for different things.

Ranks are threads here, and what they tell each other is `hf_hetero.ranks.agreement` itself, over groups that only
compare who is at which exchange. All that ranks share is these exchanges, and each is met by all, so the order in which
ranks come to them changes nothing: a run is decided by what goes wrong, and all of that is tried, at every point of a
run.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import often
from transformers import TrainerState

from hf_hetero.errors import CollectiveFailed, HeteroError
from hf_hetero.ranks import agreement, groups
from hf_hetero.ranks.agreement import (
    any_of,
    broadcast,
    confirm_rows,
    confirm_step,
    gather,
    gather_objects,
    scatter,
)
from hf_hetero.ranks.naming import named
from hf_hetero.trainer.checkpoints.saving import Saving
from hf_hetero.trainer.checkpoints.writing import Writing

NUM_STEPS = 2
PATIENCE_S = 20.0
"""A rank that does not come for so long has a bug in this file."""


class Apart(BaseException):
    """Ranks wait for different things."""


class Killed(BaseException):
    """A rank is no more."""


class Ranks:
    """Stands in for `torch.distributed`: exchanges of all ranks, met only if all are at the same one.

    Args:
        num_ranks: threads.
        killed: rank, and at which of its exchanges it dies.
    """

    ReduceOp = SimpleNamespace(MAX="max")

    def __init__(self, num_ranks: int, killed: tuple[int, int] | None = None) -> None:
        self.num_ranks, self.killed = num_ranks, killed
        self.here = threading.local()
        self.changed = threading.Condition()
        self.waiting: dict[int, tuple[str, Any]] = {}
        self.met: dict[int, list[Any]] = {}
        self.gone: set[int] = set()
        self.num_exchanges = [0] * num_ranks
        self.places: set[str] = set()
        self.is_apart = False

    def get_rank(self) -> int:
        return self.here.rank

    def get_world_size(self) -> int:
        return self.num_ranks

    def is_initialized(self) -> bool:
        return False  # there are no groups of torch

    def meet(self, what: str, value: Any) -> list[Any]:
        """Come to an exchange, and wait for the others; what each of them brought."""
        rank = self.here.rank
        if self.killed == (rank, self.num_exchanges[rank]):
            raise Killed
        self.num_exchanges[rank] += 1
        with self.changed:
            self.waiting[rank] = what, copy.deepcopy(value)
            self._look()
            assert self.changed.wait_for(lambda: rank in self.met or self.gone or self.is_apart, PATIENCE_S)
            if rank in self.met:
                return self.met.pop(rank)
            if self.is_apart:
                raise Apart(str({other: at for other, (at, _) in self.waiting.items()}))
            self.waiting.pop(rank, None)
            raise RuntimeError("gloo: Connection closed by peer")

    def leave(self, rank: int) -> None:
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()

    def _look(self) -> None:
        if len(self.waiting) < self.num_ranks:
            return
        if len({what for what, _ in self.waiting.values()}) > 1:
            self.is_apart = True
        else:
            everything = [self.waiting[rank][1] for rank in range(self.num_ranks)]
            self.met = {rank: copy.deepcopy(everything) for rank in self.waiting}
            self.waiting.clear()
        self.changed.notify_all()

    def gather(self, mine: torch.Tensor, found: Any, dst: int, group: Any, async_op: bool = False) -> Any:
        def wait(timeout: Any = None) -> None:
            every = self.meet(f"numbers of {group.name}", mine)
            for place, value in zip(found or every, every, strict=True):
                place.copy_(value)
            if len(mine) == 2 + agreement.NUM_VALUES:  # an exchange begins
                self.places.add(agreement.PLACES[int(mine[1])])

        return SimpleNamespace(wait=wait, is_completed=lambda: True)

    def broadcast(self, tensor: torch.Tensor, src: int, group: Any, async_op: bool = False) -> Any:
        def wait(timeout: Any = None) -> None:
            tensor.copy_(self.meet(f"all numbers of {group.name}", tensor)[src])

        return SimpleNamespace(wait=wait, is_completed=lambda: True)

    def all_gather_object(self, found: list[Any], value: Any, group: Any) -> None:
        found[:] = self.meet(f"objects of {group.name}", value)

    def broadcast_object_list(self, message: list[Any], src: int, group: Any) -> None:
        message[:] = self.meet(f"broadcast of {group.name}", message)[src]

    def scatter_object_list(self, mine: list[Any], parts: Any, src: int, group: Any) -> None:
        mine[0] = self.meet(f"scatter of {group.name}", parts)[src][self.here.rank]

    def all_reduce(self, tensor: torch.Tensor, op: Any, group: Any) -> None:
        tensor.copy_(torch.stack(self.meet(f"sum of {group.name}", tensor)).amax(0))

    def barrier(self, group: Any) -> None:
        self.meet(f"barrier of {group.name}", None)


CONTROL = SimpleNamespace(name="control", group_desc="")
DEFAULT = SimpleNamespace(name="default", group_desc="")  # gradients, and what Trainer itself does together

Faults = frozenset[tuple[str, int]]
"""What goes wrong, and on which rank."""
ON_RANK_0 = ("plan", "deal", "plan to evaluate")
ON_ANY = (
    *("read", "other plan", "other rows", "model", "callback of the report", "callback of the step"),
    *("begin", "write", "write the rest", "finish", "write beside training"),
    *("read to evaluate", "model to evaluate", "metrics"),
)
ALONE = ("model", "callback of the report", "callback of the step", "model to evaluate", "metrics")
"""What a rank raises where it stands; the others learn that it has gone, and what it left word of."""


class Rank:
    """What one rank does in a run, exchange by exchange, as the trainer does.

    Args:
        ranks: all of them.
        faults: what goes wrong.
        told: how a rank that cannot read a step tells the others.
    """

    def __init__(self, ranks: Ranks, faults: Faults, told: Callable[..., Any]) -> None:
        self.ranks, self.faults, self.told = ranks, faults, told

    def goes_wrong(self, what: str) -> bool:
        return (what, self.ranks.get_rank()) in self.faults

    def at(self, what: str) -> None:
        if self.goes_wrong(what):
            raise OSError(f"{what} is broken")

    def other(self, what: str) -> int:
        return 1 + self.ranks.get_rank() if self.goes_wrong(what) else 0

    def run(self) -> None:
        self.planned, self.writing = 0, cast("Writing | None", None)
        for step in range(1, NUM_STEPS + 1):
            self.train(step)
            self.announce()
            self.save()
            self.evaluate()
        self.announce()

    def train(self, step: int) -> None:
        error: Exception | None = None
        try:
            self.read(step)
        except Exception as raised:
            error = raised
        self.told(step, self.other("other plan"), 1, error, CONTROL)
        confirm_rows(step, (0,), {0: self.other("other rows")}, CONTROL)
        self.at("model")
        self.ranks.meet("sum of gradients", None)
        gather(range(9), CONTROL)
        self.at("callback of the report")
        self.at("callback of the step")
        any_of([True, False], CONTROL)

    def read(self, step: int) -> None:
        """Plans are asked for a step ahead, as workers do."""
        while self.planned <= step:
            broadcast(lambda: self.at("plan"), CONTROL)
            parts = [(lambda: 1) if self.goes_wrong("deal") else 1] * self.ranks.num_ranks
            scatter(parts if self.ranks.get_rank() == 0 else None, CONTROL)
            self.planned += 1
            self.at("read")

    def save(self) -> None:
        """As a run that keeps its best model, where Trainer waits for all ranks once the model is written."""
        args: Any = SimpleNamespace(should_save=self.ranks.get_rank() == 0)
        saving, folder = Saving(args, CONTROL, may_wait=False), Path("folder")  # type: ignore[arg-type]

        def write() -> None:
            saving.together(partial(self.at, "write"), folder)
            self.ranks.barrier(DEFAULT)
            self.at("write the rest")

        for act in (partial(self.at, "begin"), write, partial(self.at, "finish")):
            saving.together(act, folder)
        any_of([False], CONTROL)
        fails = self.goes_wrong("write beside training")

        def write_beside_training() -> None:
            if fails:
                raise OSError("write beside training is broken")

        self.writing = Writing(write_beside_training, folder, TrainerState(), is_pushed=False)

    def announce(self) -> None:
        """What has become of the checkpoint that a thread writes: ranks look for it until it is whole."""
        if self.writing is None:
            return
        while not self.writing.is_whole(CONTROL):
            self.writing.wait()
        any_of([False], CONTROL)
        self.writing = None

    def evaluate(self) -> None:
        error: Exception | None = None
        try:
            broadcast(lambda: self.at("plan to evaluate"), CONTROL)
            self.at("read to evaluate")
        except Exception as raised:
            error = raised
        self.told(1, 0, 1, error, CONTROL)
        self.at("model to evaluate")
        gather_objects("outputs", CONTROL)
        self.at("metrics")
        any_of([False], CONTROL)


def run(
    num_ranks: int,
    faults: Faults,
    killed: tuple[int, int] | None = None,
    told: Callable[..., Any] = confirm_step,
) -> tuple[Ranks, list[BaseException | None]]:
    """How each rank ends."""
    ranks, ended = Ranks(num_ranks, killed), list[BaseException | None]([None] * num_ranks)

    def work(rank: int) -> None:
        ranks.here.rank = rank
        try:
            with named("Training", "a step"):  # as all of a run is
                Rank(ranks, faults, told).run()
        except BaseException as error:
            ended[rank] = error
        if ended[rank] is not None:
            ranks.leave(rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "dist", ranks)
        patch.setattr(groups, "dist", ranks)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    return ranks, ended


def single_faults(num_ranks: int) -> list[tuple[str, int]]:
    return [*((what, 0) for what in ON_RANK_0), *((what, rank) for what in ON_ANY for rank in range(num_ranks))]


def check(ended: list[BaseException | None], faults: Faults) -> None:
    """All ranks end in an error that says what went wrong, or that a rank has gone."""
    for error in ended:
        assert isinstance(error, HeteroError | OSError), (faults, ended)
        words = str(error)
        causes = ["another plan", "differs between", *(f"{what} is broken" for what, _ in faults), "cannot be sent"]
        assert isinstance(error, CollectiveFailed) or any(cause in words for cause in causes), (faults, ended)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_run_without_faults(num_ranks: int) -> None:
    """All ranks come through it, by every kind of exchange that there is."""
    ranks, ended = run(num_ranks, frozenset())
    assert ended == [None] * num_ranks
    assert ranks.places == set(agreement.PLACES)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_fault_reaches_all(num_ranks: int) -> None:
    """One thing that goes wrong, on each rank in turn."""
    for fault in single_faults(num_ranks):
        ranks, ended = run(num_ranks, frozenset([fault]))
        assert not ranks.is_apart, (fault, ended)
        check(ended, frozenset([fault]))
        if fault[0] not in ALONE:
            assert {str(error) for error in ended} == {str(ended[0])}, (fault, ended)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_two_faults(num_ranks: int) -> None:
    """Any two things that go wrong in the same step."""
    faults = single_faults(num_ranks)
    for number, first in enumerate(faults):
        for second in faults[number + 1 :]:
            ranks, ended = run(num_ranks, frozenset([first, second]))
            assert not ranks.is_apart, (first, second, ended)
            check(ended, frozenset([first, second]))


@pytest.mark.parametrize("num_ranks", often([2, 3], 2))
def test_killed_at_each_exchange(num_ranks: int) -> None:
    """A rank that dies before any exchange of a run: the others say that it has gone."""
    whole, _ = run(num_ranks, frozenset())
    for rank in range(num_ranks):
        for number in range(whole.num_exchanges[rank]):
            ranks, ended = run(num_ranks, frozenset(), killed=(rank, number))
            assert not ranks.is_apart
            assert isinstance(ended.pop(rank), Killed)
            assert all(isinstance(error, CollectiveFailed) for error in ended), (rank, number, ended)


def by_an_exchange_of_its_own(step: int, digest: int, num: int, error: Exception | None, control: Any) -> int:
    """How it was once told that a rank cannot read a step."""
    agreement._all_gather_objects(None if error is None else str(error), agreement.BEFORE_STEP, control)
    return confirm_step(step, digest, num, None, control)


def test_these_ranks_would_notice() -> None:
    """A message that others do not look for where they are leaves ranks that wait for different things."""
    ranks, ended = run(2, frozenset([("read", 1)]), told=by_an_exchange_of_its_own)
    assert ranks.is_apart
    assert all(isinstance(error, Apart) for error in ended)
    assert run(2, frozenset(), told=by_an_exchange_of_its_own)[1] == [None, None]  # as long as nothing fails
