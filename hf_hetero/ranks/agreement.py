"""This module has the ranks tell each other, outside the model, plans, counts, and that something is wrong.

Everything here is a collective of the control group, which lives on the host. What goes wrong on one rank is raised on
all of them, with the same words, instead of leaving the others to wait.

So that a rank in trouble is heard wherever the others are, all exchanges begin with one message of the same form (see
`_meet`): a rank that fails while it reads a step reaches those that wait for a plan, or for the end of a step.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_hetero import errors
from hf_hetero.errors import BadSample, HeteroError, PlanMismatch
from hf_hetero.ranks.groups import limit_of, wait_for
from hf_hetero.ranks.naming import named

T = TypeVar("T")
Told = tuple[str, str]
"""An error on its way: the name of its class in `errors`, and its words."""

FROM_RANK_0 = "The broadcast from rank 0"
BEFORE_STEP = "The exchange before a step"
REPORT = "The exchange of a step's report"
DECISION = "The exchange of what comes next"
SAVED = "The exchange while saving"
RESULTS = "The exchange of results"
DEALING = "The dealing out of examples"
PLACES = (FROM_RANK_0, BEFORE_STEP, REPORT, DECISION, SAVED, RESULTS, DEALING)
NUM_VALUES = 16
"""Integers that the first message of each exchange has room for."""
MOST_WORDS = 20_000
"""Characters of an error that are told to other ranks."""
NOT_READ = -1
"""The fingerprint of a row that a rank has not read; those of rows are at least 0."""


def broadcast(make: Callable[[], T], control: dist.ProcessGroup | None) -> T:
    """Call `make` on rank 0 and give its result to all ranks.

    Raises:
        HeteroError: what `make` raised, on every rank.
    """
    if control is None:
        return make()
    message: list[Any] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message = [make()]
        except Exception as raised:
            error = raised
    # rank 0 acts on behalf of all, so that a HeteroError does not say whose it is; in any other the rank matters
    told = None if error is None else _told(error, says_rank=not isinstance(error, HeteroError))
    # raises rank 0's error on all ranks, before any of them waits for its result
    _meet(FROM_RANK_0, (), control, told, error)
    with _named(FROM_RANK_0, control):
        dist.broadcast_object_list(message, src=0, group=control)
    return message[0]


def confirm_step(
    step: int, digest: int, num_targets: int, error: Exception | None, control: dist.ProcessGroup | None
) -> int:
    """Make sure, before a step's first group collective, that all ranks hold the same plan and good samples.

    Args:
        step: for messages.
        digest: fingerprint of this rank's step.
        num_targets: tokens of this rank that have something to predict.
        error: what went wrong while this rank read its samples.

    Returns:
        Target tokens of the whole step.

    Raises:
        HeteroError: what went wrong, on every rank; `PlanMismatch` if plans differ.
    """
    # who raises an error that all ranks know must not exchange it again: the others raise it, too, and do not come here
    if error is not None and (control is None or getattr(error, "is_known_to_all", False)):
        raise error
    if control is None:
        return num_targets
    rows = _meet(BEFORE_STEP, [digest, num_targets], control, None if error is None else _told(error), error)
    # rank 0's plan is not simply believed: ranks whose plans differ would wait in different groups until their timeout
    digests = [row[0] for row in rows]
    if len(set(digests)) > 1:
        # the most frequent one, though rank 0 plans: whoever is alone is the one to be looked at
        usual = max(set(digests), key=digests.count)
        others = [rank for rank, value in enumerate(digests) if value != usual]
        mismatch = PlanMismatch(
            f"Step {step}: ranks {others} hold another plan than the rest. All ranks need the same dataset, seed and "
            "settings, and the plan must come from rank 0."
        )
        raise _known_to_all(mismatch, control)
    return sum(row[1] for row in rows)


def confirm_rows(
    step: int, shared: Sequence[int], fingerprints: Mapping[int, int], control: dist.ProcessGroup | None
) -> None:
    """Make sure that the ranks that share a row have read the same. Each reads it for itself.

    Args:
        step: for messages.
        shared: rows that several ranks may read; the same on all of them.
        fingerprints: of those that this rank has read, at least 0.

    Raises:
        BadSample: a row differs between ranks; raised on all.
    """
    if control is None or not shared:
        return
    own = torch.tensor([fingerprints.get(row, NOT_READ) for row in shared], dtype=torch.int64)
    # one all-reduce tells whether all readers agree: the largest fingerprint, and the smallest as the largest negative;
    # who has not read a row gives what is larger than nothing in either
    negatives = torch.where(own == NOT_READ, torch.iinfo(torch.int64).min, -own)
    extremes = torch.stack([own, negatives])
    with _named(BEFORE_STEP, control):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=control)
    differs = (extremes[0] != NOT_READ) & (extremes[0] != -extremes[1])
    if not differs.any():  # the same on all ranks, for all hold the same extremes: none leaves the others in the gather
        return
    index = int(differs.nonzero()[0, 0])
    versions: dict[int, list[int]] = {}
    for rank, [fingerprint] in enumerate(_all_gather(own[index : index + 1].tolist(), BEFORE_STEP, control)):
        if fingerprint != NOT_READ:
            versions.setdefault(fingerprint, []).append(rank)
    others = f" ({int(differs.sum()) - 1} more rows differ, too)" if differs.sum() > 1 else ""
    differing = BadSample(
        f"Step {step}: row {shared[index]} differs between the ranks that share it: "
        f"{' and '.join(f'ranks {ranks}' for ranks in versions.values())} read other tokens or labels{others}. "
        "Each of them reads it for itself, so a row must be the same at each read: where the dataset or the collator "
        "draws at random, seed it by the row's index (and epoch), or draw once, with dataset.map(), before training."
    )
    raise _known_to_all(differing, control)


def raise_together(error: Exception | None, control: dist.ProcessGroup | None) -> None:
    """Wait for all ranks, and raise on all of them what went wrong on any.

    Raises:
        HeteroError: what went wrong.
    """
    if error is not None and (control is None or getattr(error, "is_known_to_all", False)):
        raise error
    if control is not None:
        _meet(SAVED, (), control, None if error is None else _told(error), error)


def any_of(flags: Sequence[bool], control: dist.ProcessGroup | None) -> list[bool]:
    """Return for each of at most `NUM_VALUES` flags whether it is set on any rank."""
    if control is None:
        return list(flags)
    return [any(votes) for votes in zip(*_meet(DECISION, list(map(int, flags)), control), strict=True)]


def gather(values: Sequence[int], control: dist.ProcessGroup | None) -> list[list[int]]:
    """Return the integers of every rank; each rank gives as many."""
    if control is None:
        return [list(values)]
    rows = _meet(REPORT, values[:NUM_VALUES], control)
    if rest := values[NUM_VALUES:]:  # on all ranks or none, for each gives as many
        rows = [[*row, *more] for row, more in zip(rows, _all_gather(rest, REPORT, control), strict=True)]
    return rows


def gather_objects(value: T, control: dist.ProcessGroup | None) -> list[T]:
    """Return what every rank gives, in the order of the ranks."""
    if control is None:
        return [value]
    _meet(RESULTS, (), control)
    return _all_gather_objects(value, RESULTS, control)


def scatter(values: Sequence[T] | None, control: dist.ProcessGroup | None) -> T:
    """Give each rank its own of rank 0's values.

    Raises:
        HeteroError: a value cannot be sent; raised on every rank.
    """
    if control is None:
        assert values is not None
        return values[0]
    own: list[Any] = [None]
    parts: list[bytes] | None = None
    error: Exception | None = None
    try:  # pickled before ranks meet: what cannot be is told to all, instead of breaking one end of the scatter
        parts = None if values is None else [pickle.dumps(value) for value in values]
    except Exception as raised:
        error = HeteroError(f"Examples cannot be sent to other ranks: {type(raised).__name__}: {raised}")
        error.__cause__ = raised
    _meet(DEALING, (), control, None if error is None else _told(error), error)
    with _named(DEALING, control):
        dist.scatter_object_list(own, parts, src=0, group=control)
    return pickle.loads(own[0])


def _meet(
    place: str,
    values: Sequence[int],
    control: dist.ProcessGroup,
    told: Told | None = None,
    error: Exception | None = None,
) -> list[list[int]]:
    """Exchange the first message of any exchange, and raise if a rank is in trouble, or has come to another place.

    Args:
        place: one of `PLACES`.
        values: at most `NUM_VALUES` integers for the others; as many on each rank.
        control: group of all ranks.
        told, error: what went wrong on this rank.

    Returns:
        The integers of every rank.

    Raises:
        HeteroError: what went wrong on any rank, or that they have come apart; on all of them.
    """
    # of one length wherever a rank is, because ranks at different places meet in this one collective, too
    padding = [0] * (NUM_VALUES - len(values))
    rows = _all_gather([int(told is not None), PLACES.index(place), *values, *padding], place, control)
    if any(row[0] for row in rows):
        # all ranks have seen the same rows, so that all take part in this second exchange, and raise the same error
        kind, text = next(filter(None, _all_gather_objects(told, place, control)))
        raise _known_to_all(getattr(errors, kind)(text), control) from error
    if any(row[1] != rows[0][1] for row in rows):
        where = ", ".join(f"rank {rank} at {_lower(PLACES[row[1]])}" for rank, row in enumerate(rows))
        apart = HeteroError(
            f"The ranks have come apart: {where}. All ranks need the same number of steps, and whatever a script or a "
            "callback of theirs makes ranks do together (evaluate, save) must be asked for on all of them."
        )
        raise _known_to_all(apart, control)
    return [row[2 : 2 + len(values)] for row in rows]


def _known_to_all(error: HeteroError, control: dist.ProcessGroup) -> HeteroError:
    """Return the error once all ranks know it.

    A rank that ended earlier would close its connections, and with them take what others have not read yet.
    """
    with suppress(RuntimeError):  # they know, and may have gone
        dist.barrier(group=control)
    error.is_known_to_all = True
    return error


def _all_gather(values: Sequence[int], place: str, control: dist.ProcessGroup) -> list[list[int]]:
    """Return the integers of every rank; who waits long for them says so.

    Rank 0 gathers and hands them out. In an all-gather of gloo's they go round a ring: as many messages one after the
    other as there are ranks, each of which waits for a rank to wake up. A broadcast of gloo's is a tree.
    """
    own = torch.tensor(values, dtype=torch.int64)
    rows = torch.empty((dist.get_world_size(), len(own)), dtype=torch.int64)
    parts = list(rows.unbind()) if dist.get_rank() == 0 else None
    with _named(place, control):
        wait_for(dist.gather(own, parts, dst=0, group=control, async_op=True), _lower(place), control)
        wait_for(dist.broadcast(rows, src=0, group=control, async_op=True), _lower(place), control)
    return rows.tolist()


def _all_gather_objects(value: T, place: str, control: dist.ProcessGroup) -> list[T]:
    """Return what every rank gives, in the order of the ranks; all ranks have met just before."""
    values: list[Any] = [None] * dist.get_world_size()
    with _named(place, control):
        dist.all_gather_object(values, value, group=control)
    return values


def _named(place: str, control: dist.ProcessGroup) -> Any:
    """Return a context that gives a failing exchange of all ranks its name."""
    return named(place, f"all {dist.get_world_size()} ranks", limit=limit_of(control))


def _told(error: Exception, says_rank: bool = True) -> Told:
    """Put any exception into words as `in_words` does, with this rank's name."""
    kind, text = in_words(error)
    return kind, f"Rank {dist.get_rank()}: {text}" if says_rank and not text.startswith("Rank ") else text


def in_words(error: Exception) -> Told:
    """Put any exception into words that every rank can read, as the nearest kind of error that they all know."""
    # words instead of the object: an exception of the user's own may not be pickled, or not be known elsewhere
    kind = next((c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__), HeteroError.__name__)
    try:
        text = str(error)
    except Exception as unreadable:  # whatever a user's class does
        text = f"(its text cannot be read: {type(unreadable).__name__})"
    if type(error).__name__ != kind:
        text = f"{type(error).__name__}: {text}"
    if len(text) > MOST_WORDS:
        text = f"{text[:MOST_WORDS]}... ({len(text):,} characters)"
    return kind, text


def _lower(place: str) -> str:
    """Return the name of a place for the middle of a sentence."""
    return place[0].lower() + place[1:]
