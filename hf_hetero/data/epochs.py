"""This module says what each epoch trains on: which rows, in which order, and the samples they hold."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from hf_hetero.data.counting import Counted, Source, count_together, still_holds
from hf_hetero.data.lengths import fingerprint, is_table
from hf_hetero.data.plan_ahead import Draws
from hf_hetero.data.planning import Planning
from hf_hetero.data.sampler import GlobalBatches, StepDataset
from hf_hetero.errors import BadSample
from hf_hetero.ranks.agreement import broadcast, gather, raise_together
from hf_hetero.samples.samples import Drawn, Samples, limited

logger = logging.getLogger(__name__)


class Epochs:
    """`Epochs` says what each epoch trains on: which rows, in which order, and the samples they hold.

    Most datasets and orders are the same, or known, in every epoch: rows are counted once, when the run starts, and
    plans are made across the border of epochs. A dataset that is told of each epoch (`set_epoch`) is counted anew when
    the epoch begins, and a sampler is asked then; steps are planned up to the border until it is crossed.

    Args:
        batches: rows of each step.
        rows: the dataset as it is read.
        read: counts the rows; a collective.
        control: group of all ranks; None for a single process.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        rows: StepDataset,
        read: Callable[[], tuple[Counted, str]],
        control: dist.ProcessGroup | None,
    ) -> None:
        self._batches, self._rows, self._read, self._control = batches, rows, read, control
        self._samples: Samples | None = None
        self.column: str | None = None
        self.content: dict[str, str] = {}
        if not rows.changes_with_epochs:
            self.content = {"lengths": self._count()}

    @property
    def draws(self) -> Draws:
        """Return what draws the samples of each step. They are known on rank 0 only."""
        return draws_of(self._batches, lambda: self._samples, self._is_known_ahead)

    @property
    def _is_known_ahead(self) -> bool:
        """Return whether the samples of an epoch are known before it begins."""
        return self._batches.is_known_ahead and not self._rows.changes_with_epochs

    def begin(self, epoch: int, forget: Callable[[], None]) -> None:
        """Find out what an epoch trains on, before its first step. A collective of all ranks, if there is anything to.

        Args:
            epoch: from 0.
            forget: plans that were made before, of an epoch that was cut short.
        """
        if self._is_known_ahead:
            return
        forget()
        # a user's code that fails on one rank must not leave the others to wait for it in the next collective
        error: Exception | None = None
        try:
            self._rows.set_epoch(epoch)
            self._batches.begin(epoch)
        except Exception as raised:
            error = raised
        raise_together(error, self._control)
        if self._rows.changes_with_epochs:
            self._count()

    def _count(self) -> str:
        """Count the rows, and return a fingerprint of their lengths. A collective of all ranks."""
        counted, content = self._read()
        if counted.num_rows != self._batches.num_rows:
            raise BadSample(
                f"The dataset has {counted.num_rows} rows now, and had {self._batches.num_rows} when training started. "
                "Let it keep as many in every epoch."
            )
        self._samples, self.column = counted.samples, counted.column
        return content


def draws_of(
    batches: GlobalBatches, samples: Samples | Callable[[], Samples | None] | None, is_known_ahead: bool = True
) -> Draws:
    """Return what draws the samples of each step.

    Args:
        batches: rows of each step.
        samples: that the rows hold, or what gives them; needed on rank 0 only.
        is_known_ahead: whether those of an epoch are known before it begins.
    """

    def draw(epoch: int, index: int) -> Drawn:
        counted = samples() if callable(samples) else samples
        assert counted is not None
        return counted.of(batches.rows(epoch, index))

    def after(step: tuple[int, int]) -> tuple[int, int] | None:
        # nothing follows the last step of an epoch while the next one's rows are not known: plans wait at the border
        following = batches.after(step)
        return following if is_known_ahead or following[0] == step[0] else None

    return Draws(draw, after)


def read_rows(dataset: Any, planning: Planning, rows: StepDataset, collate: Callable[..., Any]) -> tuple[Counted, str]:
    """Return the samples of a dataset's rows, on rank 0, which alone plans; and a fingerprint of their lengths.

    Args:
        dataset: map-style, as the user gave it.
        planning: limits, column of lengths, control group.
        rows: the dataset as it is read.
        collate: makes samples of the rows.

    Raises:
        BadSample: rows without tokens, or samples that are too long, on every rank.
        ConfigError: the dataset is not the same on all ranks, on every rank.
    """
    counted = count_together(Source(dataset, rows, collate, planning.length_column), planning.control)
    accepted: list[Samples] = []  # filled on rank 0 only: samples are many, and the other ranks do without

    def limit() -> str:  # on rank 0; what it raises, all ranks raise
        assert counted.samples is not None
        samples, change = within_limits(counted.samples, planning)
        if change:
            logger.warning("%s", change)
        planning.limits.check_lengths(samples)
        accepted.append(samples)
        return samples.fingerprint()

    content = broadcast(limit, planning.control)
    return replace(counted, samples=accepted[0] if accepted else None), content


@dataclass(frozen=True, slots=True)
class _KeptCount:
    """A `_KeptCount` is what was counted of a dataset.

    Args:
        dataset: that was.
        conditions: all that decides how its rows are read and counted.
        result: as `read_rows` returned it.
    """

    dataset: weakref.ref[Any]
    conditions: tuple[Any, ...]
    result: tuple[Counted, str]


class KeptCounts:
    """`KeptCounts` keeps what datasets hold, while they live, so that one need not be counted at each evaluation.

    A dataset is counted anew where its number of rows has changed, or a table's fingerprint, or how rows are read; or
    where some rows, read again, have other tokens than before. One that is told of epochs is counted each time, and so
    is a list, which may be changed in place.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _KeptCount] = {}

    def read(
        self, dataset: Any, planning: Planning, rows: StepDataset, collate: Callable[..., Any]
    ) -> tuple[Counted, str]:
        """Count as `read_rows`. A collective of all ranks, which take what they know or count together.

        Raises:
            BadSample, ConfigError: as `read_rows`.
        """
        earlier = self._kept.get(id(dataset))
        conditions = _conditions(dataset, planning, collate)
        source = Source(dataset, rows, collate, planning.length_column)
        # by vote, because counting is a collective: no rank may count while another takes what it knows
        if all(known for [known] in gather([int(_holds(earlier, source, conditions))], planning.control)):
            assert earlier is not None
            return earlier.result
        self.forget(dataset)
        result = read_rows(dataset, planning, rows, collate)
        if not rows.changes_with_epochs:
            self._keep(dataset, conditions, result)
        return result

    def forget(self, dataset: Any) -> None:
        """Count a dataset anew when it is asked for again."""
        self._kept.pop(id(dataset), None)

    def _keep(self, dataset: Any, conditions: tuple[Any, ...], result: tuple[Counted, str]) -> None:
        """Keep what was counted as long as the dataset lives: its `id` is another object's after that."""
        kept, number = self._kept, id(dataset)
        with suppress(TypeError):  # a list, for one, cannot be referred to without keeping it
            reference = weakref.ref(dataset, lambda _: kept.pop(number, None))
            kept[number] = _KeptCount(reference, conditions, result)


def _conditions(dataset: Any, planning: Planning, collate: Callable[..., Any]) -> tuple[Any, ...]:
    """Return all that decides how a dataset's rows are read and counted."""
    return (
        len(dataset),
        fingerprint(dataset) if is_table(dataset) else "",
        collate,
        planning.length_column,
        planning.most_tokens,
        planning.longer,
        planning.limits,
    )


def _holds(earlier: _KeptCount | None, source: Source, conditions: tuple[Any, ...]) -> bool:
    """Return whether this rank would take what it knows; if it cannot tell, counting will say why."""
    if earlier is None or earlier.dataset() is not source.dataset or earlier.conditions != conditions:
        return False
    samples = earlier.result[0].samples
    try:
        # only rank 0 has samples to compare; the others go along with its vote
        return samples is None or still_holds(source, samples.row_tokens)
    except Exception:
        return False


def within_limits(samples: Samples, planning: Planning) -> tuple[Samples, str]:
    """Return samples of at most as many tokens as the user set, and in words what was done about longer ones."""
    if planning.most_tokens is None:
        return samples, ""
    return limited(samples, planning.most_tokens, planning.longer)
