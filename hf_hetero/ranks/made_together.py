"""A trainer is made on all ranks or on none, and all of them train the same weights.

What keeps one rank from making its trainer (a file that only its node lacks, a row that only it has met) is said in the
job's store, where the others look once they have made theirs. No group of ranks is asked: the rank that fails may have
left the others in a collective of somebody else's, and would not be heard in another one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from hf_hetero import errors
from hf_hetero.errors import CollectiveFailed, HeteroError
from hf_hetero.ranks.agreement import broadcast, gather, gather_objects, in_words
from hf_hetero.ranks.last_words import job_store, tell
from hf_hetero.ranks.naming import JOB_LIMIT, all_ranks, named
from hf_hetero.ranks.waits import WORD_AFTER_S

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
LOOKS_S = 0.02, 0.2
"""How often a rank looks for the others: at first, and at last."""
LINGER_S = 10.0
"""How long rank 0, with which the store may end, stays for the others to read what has come of it."""
MOST_NAMED = 8
"""Ranks that are named of those that are missing."""
UNDERWAY = "_hf_hetero_is_being_made"
"""An attribute of a trainer whose constructor is being run: those of its base classes do not meet again."""


def made_together(init: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """Have a trainer's constructor end on all ranks in the same way; in a single process it is left as it is.

    Where it raises on a rank, that error is raised there, and on all others a `HeteroError` that names rank and error.

    Args:
        init: of a class that has `args` once it is made.
    """

    @functools.wraps(init)
    def wrapped(self: T, *args: P.args, **kwargs: P.kwargs) -> None:
        if UNDERWAY in vars(self):
            init(self, *args, **kwargs)
            return
        setattr(self, UNDERWAY, True)
        try:
            with _missing_named():
                init(self, *args, **kwargs)
        except BaseException as error:
            if (meeting := Meeting.of_this_rank()) is not None:
                meeting.refuse(error)
            raise
        finally:
            delattr(self, UNDERWAY)
        if (meeting := Meeting.of_this_rank()) is not None:
            trainer: Any = self
            meeting.agree(trainer.args.ddp_timeout)

    return wrapped


@contextmanager
def _missing_named() -> Iterator[None]:
    """Give what fails because another rank has gone its name; there may be no others, and no job yet.

    Raises:
        CollectiveFailed: a rank that was waited for has gone, or is late.
    """
    try:
        yield
    except RuntimeError:
        if not _has_others():
            raise
        with named("The making of a trainer", all_ranks, JOB_LIMIT):
            raise


class Meeting:
    """A `Meeting` is where the ranks of a job tell each other, in its store, that they have made their next trainer.

    Args:
        store: of the job.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._rank, self._num_ranks = store, dist.get_rank(), dist.get_world_size()
        self._number, self._place = 0, ""  # until this rank has come

    @classmethod
    def of_this_rank(cls) -> Meeting | None:
        """Return the next meeting of this rank; None where there are no others, or no store to meet in."""
        store = job_store() if _has_others() else None
        return None if store is None else cls(store)

    def refuse(self, error: BaseException) -> None:
        """Say that this rank has not made its trainer, and why; unless it is another rank's error that it met.

        Raises:
            HeteroError: it is, and this is what the other had left word of.
        """
        why: HeteroError | None = None
        with suppress(Exception):  # the store lives on a rank that may have gone
            self._come()
            why = self._why() if isinstance(error, CollectiveFailed) else None
        if why is not None:
            raise why from error
        with suppress(Exception):
            kind, text = in_words(error) if isinstance(error, Exception) else (HeteroError.__name__, repr(error))
            self._store.set(f"{self._place}/outcome", json.dumps([self._rank, kind, text]))
        tell(error)  # for those that wait in a collective that this rank does not come to
        self._linger()

    def agree(self, timeout_s: float) -> None:
        """Wait until all ranks have made theirs.

        Raises:
            HeteroError: what has kept another rank from it.
            CollectiveFailed: some have not come within `timeout_s` seconds, or the job's store has gone.
        """
        try:
            self._come()
            if self._store.add(f"{self._place}/made", 1) == self._num_ranks:
                self._store.set(f"{self._place}/outcome", "")
                with suppress(Exception):  # some stores keep all
                    for name in ("outcome", "made", "heard"):
                        self._store.delete_key(f"hf_hetero/trainer-{self._number - 1}/{name}")
            self._wait(timeout_s)
            why = self._why()
        except RuntimeError as lost:
            raise CollectiveFailed(
                f"Rank {self._rank} has made its trainer, and the job's store, by which it hears of the others, has "
                f"gone: {str(lost).splitlines()[0]} Look for the first error of the other ranks."
            ) from lost
        self._linger()  # also where all is well: a script may end here, on rank 0 first
        if why is not None:
            raise why

    def _come(self) -> None:
        """Count the trainers that this rank has made, or failed to, with this one: its number is the place to meet."""
        self._number = self._store.add(_count(self._rank), 1)
        self._place = f"hf_hetero/trainer-{self._number}"

    def _wait(self, timeout_s: float) -> None:
        start, look_s, word_s = time.monotonic(), LOOKS_S[0], WORD_AFTER_S
        while not self._store.check([f"{self._place}/outcome"]):
            waited_s = time.monotonic() - start
            if waited_s > timeout_s:
                raise CollectiveFailed(
                    f"Rank {self._rank} has made its trainer and waited {timeout_s:g} s for {self._missing()} to make "
                    f"theirs. Look for their first error; if they are only slow, raise {JOB_LIMIT}."
                )
            if waited_s > word_s:
                word_s = 2 * waited_s
                if self._rank == 0:
                    logger.warning("Rank 0 has waited %.3g s for %s to make their trainer.", waited_s, self._missing())
            time.sleep(look_s)
            look_s = min(1.5 * look_s, LOOKS_S[1])

    def _missing(self) -> str:
        """Name the ranks that have not come."""
        missing = [rank for rank in range(self._num_ranks) if self._store.add(_count(rank), 0) < self._number]
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        return f"ranks {missing[:MOST_NAMED]}{more}"

    def _why(self) -> HeteroError | None:
        """Return what a rank that has not made its trainer left word of; None: there is none."""
        if not self._store.check([f"{self._place}/outcome"]) or not (said := self._store.get(f"{self._place}/outcome")):
            return None
        rank, kind, text = json.loads(said)
        error: HeteroError = getattr(errors, kind)(f"Rank {rank} could not make its trainer, so none goes on: {text}")
        error.is_known_to_all = True
        return error

    def _linger(self) -> None:
        """Note that this rank knows; rank 0 stays until all do, or some are late."""
        until = time.monotonic() + LINGER_S
        with suppress(Exception):
            heard = self._store.add(f"{self._place}/heard", 1)
            while self._rank == 0 and heard < self._num_ranks and time.monotonic() < until:
                time.sleep(LOOKS_S[0])
                heard = self._store.add(f"{self._place}/heard", 0)


def _has_others() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_initialized() and dist.get_world_size() > 1


def confirm_weights(model: torch.nn.Module, control: dist.ProcessGroup | None) -> None:
    """Make sure that all ranks train the same weights. A collective of all ranks.

    DDP looks at the shapes of what is trained, in order, and not at names: ranks that train other layers of the same
    shapes would add up their gradients without a word.

    Args:
        model: not wrapped yet.
        control: group of all ranks.

    Raises:
        HeteroError: they do not; raised on every rank.
    """
    if control is None:
        return
    own = {name: _described(p) for name, p in model.named_parameters()}
    digest = hashlib.blake2b(repr(list(own.items())).encode(), digest_size=7).digest()
    digests = [row[0] for row in gather([int.from_bytes(digest)], control)]
    if len(set(digests)) == 1:
        return
    first = broadcast(lambda: own, control)
    differences = gather_objects(_difference(own, first), control)
    rank, words = next((rank, words) for rank, words in enumerate(differences) if words)
    num = sum(digest != digests[0] for digest in digests) - 1
    error = HeteroError(
        f"Rank {rank} has other weights to train than rank 0: {words}{f' ({num} more ranks differ, too)' * bool(num)}. "
        "All ranks need the same model, and the same requires_grad of each of its weights: load, freeze and add "
        "adapters alike on all of them."
    )
    error.is_known_to_all = True
    raise error


def _described(parameter: torch.nn.Parameter) -> str:
    """Say what of a weight must be the same on all ranks."""
    shape = "x".join(map(str, parameter.shape))
    return f"{shape} of {str(parameter.dtype).removeprefix('torch.')}, requires_grad={parameter.requires_grad}"


def _difference(own: dict[str, str], first: dict[str, str]) -> str:
    """Say what differs first between this rank's weights and rank 0's; nothing where none does."""
    for name in first | own:
        if own.get(name) != first.get(name):
            return f"{name} is {own.get(name, 'missing')} there and {first.get(name, 'missing')} on rank 0"
    return "" if list(own) == list(first) else "they come in another order"


def _count(rank: int) -> str:
    """Return the key under which the trainers of a rank are counted: a process may make many, one after the other."""
    return f"hf_hetero/trainers-of-rank-{rank}"
