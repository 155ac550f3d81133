"""This module deals a stream's examples out from rank 0 to the ranks that need them, step by step."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset, Sampler

from hf_hetero.data.streams.reading import Example, Position
from hf_hetero.data.streams.stream import Key, Stream
from hf_hetero.errors import HeteroError
from hf_hetero.ranks.agreement import broadcast, scatter
from hf_hetero.step import Step, StepExamples, StepShare, samples_by_rank

Examples = Mapping[int, Example]
"""By position of the sample in the global batch."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """`Dealt` is a rank's share of a step, with its examples: pickled, where they leave the process that read them."""

    share: StepShare
    examples: Examples | bytes


class StreamSampler(Sampler[Dealt]):
    """A `StreamSampler` gives whole optimizer steps: this rank's share of each, with its examples.

    One iteration is one epoch of the stream. The epochs are counted here, from where a checkpoint left the stream.

    Args:
        stream: on rank 0; None elsewhere.
        plan_step: plans (or receives) a step of an epoch; None: the epoch has ended. Called in order, on all ranks.
        control: group that deals out the examples; None for a single process.
        has_workers: whether other processes make tensors of the examples.
        num_trained: optimizer steps done.
        kept: where a checkpoint says to go on; None: it does not say.
        skips: whether what was trained of the first epoch is passed over.
        num_rows: examples of an epoch, where the stream knows.
        batch_size: examples of a step.
        num_kept: steps whose examples are kept, for `deal_again`: those that may be dealt out and not yet trained.
    """

    def __init__(
        self,
        stream: Stream | None,
        plan_step: Callable[[int, int], Step | None],
        control: dist.ProcessGroup | None,
        has_workers: bool,
        num_trained: Callable[[], int],
        kept: Position | None = None,
        skips: bool = True,
        num_rows: int | None = None,
        batch_size: int = 1,
        num_kept: int = 1,
    ) -> None:
        self._stream, self._plan_step, self._control = stream, plan_step, control
        self._num_trained, self._kept, self._skips = num_trained, kept, skips
        self._stays = control is None and not has_workers
        self._num_steps = None if num_rows is None else -(-num_rows // batch_size)
        self._dealt: deque[tuple[Key, Examples]] = deque(maxlen=num_kept)
        """Steps that were dealt out and may not be trained yet, with their examples; on rank 0."""
        self._next: Key | None = None
        self._has_ended = False

    def __len__(self) -> int:
        """Return the steps of an epoch.

        Raises:
            TypeError: the stream does not know, which is how `Trainer` asks.
        """
        if self._num_steps is None:
            raise TypeError("This stream has no length.")
        return self._num_steps

    def __iter__(self) -> Iterator[Dealt]:
        """Give the steps of an epoch in order."""
        if self._next is None:
            num_trained = self._num_trained()
            # rank 0 alone has read the stream; all ranks count on from the same place, for they ask for plans by it
            self._next = broadcast(lambda: self._enter(num_trained), self._control)
        else:
            self._next = self._go_on(*self._next)
        self._has_ended = False
        epoch, index = self._next
        while (step := self._plan_step(epoch, index)) is not None:
            index += 1
            self._next = epoch, index  # before the yield, after which nobody may come back
            yield self._deal(step)
        self._end(epoch, index)

    def _enter(self, num_trained: int) -> Key:
        """Begin to read with the step after those trained, and return its place; on rank 0."""
        assert self._stream is not None
        if self._kept is not None or not self._skips:
            position = self._kept or Position()
            self._stream.start(position, num_trained)
            return position.epoch, position.batches
        # the checkpoint does not say how many batches each epoch had, so steps are counted from the start
        self._stream.start(Position(), 0)
        epoch = index = 0
        while self._stream.num_taken < num_trained:
            if self._stream.take(epoch, index) is not None:
                index += 1
            elif index:
                epoch, index = epoch + 1, 0
            else:
                raise HeteroError(f"The stream ended before step {num_trained}, which was trained. It changed.")
        return epoch, index

    def _go_on(self, epoch: int, index: int) -> Key:
        """Go to the next epoch: the last one had ended, maybe without being asked whether it had; or was left early."""
        # `Trainer` stops asking after the steps that the stream's length promises; `_next` and the length are the same
        # on all ranks, so that all of them ask here, or none
        if not self._has_ended and index == self._num_steps and self._plan_step(epoch, index) is None:
            self._end(epoch, index)
        following = epoch + 1, 0
        if self._stream is not None and (self._stream.one_by_one or not self._has_ended):
            self._stream.start(Position(following[0]), self._num_trained())
        return following

    def _end(self, epoch: int, index: int) -> None:
        """Note that an epoch has ended, and let the stream note where the next one begins."""
        if self._stream is not None:
            self._stream.take(epoch, index, self._num_trained())
        self._has_ended = True

    def _deal(self, step: Step) -> Dealt:
        """Return this rank's examples, which rank 0 hands out. A collective of all ranks."""
        examples: Examples | None = None
        if self._stream is not None:
            batch = self._stream.take(step.epoch, step.index, self._num_trained())
            assert batch is not None
            examples = {position: batch.examples[row] for position, row in enumerate(step.rows)}
            self._dealt.append(((step.epoch, step.index), examples))
        return self._hand_out(step, examples)

    def deal_again(self, step: Step) -> Dealt:
        """Return this rank's examples of a step that was dealt out by another plan. A collective of all ranks."""
        return self._hand_out(step, dict(self._dealt).get((step.epoch, step.index)))

    def _hand_out(self, step: Step, examples: Examples | None) -> Dealt:
        """Return this rank's part of the examples of a step, which rank 0 has."""
        parts: list[Examples | bytes | HeteroError] | None = None
        if self._stream is not None:
            assert examples is not None
            parts = [examples] if self._stays else [*pickled_parts(step, examples)]
        rank = dist.get_rank() if self._control is not None else 0
        own = scatter(parts, self._control)
        # an error travels as a value, so that every rank has taken part in the exchange when it is raised
        if isinstance(own, HeteroError):
            raise own
        return Dealt(StepShare(step, rank), own)


def pickled_parts(step: Step, examples: Examples) -> Sequence[bytes | HeteroError]:
    """Pickle the examples that each rank needs; or give every rank the reason why that cannot be done."""
    try:
        return [pickle.dumps({n: examples[n] for n in sorted(needed)}) for needed in samples_by_rank(step)]
    except Exception as error:  # pickle raises errors of many kinds, and what an example's own methods do
        return [_cannot_travel(step, examples, error)] * step.plan.num_ranks


def _cannot_travel(step: Step, examples: Examples, error: Exception) -> HeteroError:
    """Say which example cannot be pickled, and why."""
    what = "An example of the stream"
    for position, example in examples.items():
        try:
            pickle.dumps(example)
        except Exception as raised:
            what, error = f"Row {step.rows[position]} of the stream, with {sorted(example)},", raised
            break
    return HeteroError(
        f"{what} cannot be handed to other processes: {type(error).__name__}: {error}. Let the stream give lists, "
        "arrays or tensors."
    )


class DealtDataset(Dataset[StepExamples]):
    """A `DealtDataset` opens what was dealt.

    Args:
        num_rows: of the stream, where it knows.
    """

    def __init__(self, num_rows: int | None = None) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        """Return the examples of the stream.

        Raises:
            TypeError: it does not know.
        """
        if self._num_rows is None:
            raise TypeError("This stream has no length.")
        return self._num_rows

    def __getitems__(self, dealt: Dealt) -> StepExamples:
        """Return this rank's examples of a step."""
        examples: Any = dealt.examples
        return StepExamples(dealt.share, pickle.loads(examples) if isinstance(examples, bytes) else examples)
