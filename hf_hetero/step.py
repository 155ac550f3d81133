"""This module has the types of an optimizer step on its way: Step -> StepShare -> StepExamples -> StepBatch.

Step           what all ranks agree on: which samples of the dataset, their lengths, the plan
StepShare      the same, seen by one rank: its groups, their layouts, the samples it must read
StepExamples   the samples it has read
StepBatch      its tensors, one micro-batch after the other
StepPart       some of these: what `Trainer` takes for one of its batches
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from hf_hetero.layout import Layout, Mutual, Span, layout_of
from hf_hetero.model.loss import num_targets
from hf_hetero.plan import Group, Plan
from hf_hetero.samples.samples import Drawn


@dataclass(frozen=True, slots=True)
class Step:
    """A `Step` is what all ranks agree on.

    Args:
        epoch: epoch of the dataset, from 0.
        index: step within the epoch, from 0.
        drawn: the samples of the global batch; a plan's sample is a position among them.
        plan: who computes what.
        wait_s: how long the planning rank waited for the plan, in seconds.
        static_s: seconds of the best plan with one degree, by degree; empty where nobody has looked.
        as_text: what each sample was planned as, in tokens of text that take as long; (): as its own tokens.
    """

    epoch: int
    index: int
    drawn: Drawn
    plan: Plan
    wait_s: float = 0.0
    static_s: Mapping[int, float] = field(default_factory=dict[int, float])
    as_text: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the dataset's row of each sample."""
        return self.drawn.rows

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each sample."""
        return self.drawn.lengths

    @property
    def planned_lengths(self) -> tuple[int, ...]:
        """Return the lengths that the plan was made of, and that its seconds and bytes are of."""
        return self.as_text or self.drawn.lengths

    def shared_rows(self) -> tuple[int, ...]:
        """Return the rows that several ranks may hold tokens of, ascending. Each of these ranks reads them itself."""
        # by group, not by span, which would need every layout: a rank that holds no token of a row has no fingerprint
        # of it to compare, and that is no disagreement; and without a list of readers, which may be all ranks
        rows, first, shared = self.rows, dict[int, tuple[int, ...]](), set[int]()
        for group in self.plan.groups:
            for sample in group.samples:
                if group.degree > 1 or first.setdefault(rows[sample], group.ranks) != group.ranks:
                    shared.add(rows[sample])
        return tuple(sorted(shared))

    def digest(self) -> int:
        """Return a 63-bit fingerprint of everything that must be the same on all ranks."""
        # without `wait_s`, which rank 0 alone knows when it plans, nor predictions; 63 bits: it travels as an int64
        content = repr((self.epoch, self.index, self.drawn, self.plan.digest()))
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class StepShare:
    """A `StepShare` is a step as one rank sees it."""

    step: Step
    rank: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return this rank's group in each micro-batch."""
        return self.step.plan.share(self.rank)

    def layout(self, group: Group) -> Layout:
        """Return which tokens each rank of a group holds."""
        return layout_of(group, self.step.lengths)

    def samples(self) -> tuple[int, ...]:
        """Return the positions in the global batch of the samples this rank holds tokens of, ascending."""
        needed: set[int] = set()
        for group in self.groups:
            spans = self.layout(group).spans[group.ranks.index(self.rank)]
            needed.update(group.samples[span.sample] for span in spans)
        return tuple(sorted(needed))


def samples_by_rank(step: Step) -> list[set[int]]:
    """Return for each rank the positions in the global batch of the samples it holds tokens of."""
    positions: list[set[int]] = [set() for _ in range(step.plan.num_ranks)]
    for micro_batch in step.plan.micro_batches:
        for group in micro_batch.groups:
            for rank, spans in zip(group.ranks, layout_of(group, step.lengths).spans, strict=True):
                positions[rank].update(group.samples[span.sample] for span in spans)
    return positions


@dataclass(frozen=True, slots=True)
class StepExamples:
    """`StepExamples` are the rows that hold a share's samples, by position of the sample in the global batch."""

    share: StepShare
    examples: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RankMicroBatch:
    """A `RankMicroBatch` is one micro-batch on one rank.

    Args:
        group: the ranks that share it.
        layout: which tokens each of them holds.
        spans: those that this rank holds, in memory order.
        inputs: keywords of the model's forward, tensors of shape (1, num_tokens), and one token more where one stands
            in: on a rank without tokens, or as the place of the last target (see `collators.spans.pack_spans`);
            positions may be of shape (3, 1, num_tokens). Inputs of images are of their own shapes.
        labels: each token's own label, shape (1, num_tokens), or (1, num_tokens, num_labels) where it is several
            numbers; None where samples have none.
        reaches: for each span, one more than the last position of its whole sample.
        learns: whether there is a backward pass.
        scored: for each span, the place in it of the token whose score is that of its whole sample, or None where that
            lies elsewhere; None where samples have no score.
        sources: for each span, where its row says that it is from; None: nobody asks.
        mutual: stretches whose tokens look at each other: of the samples that this rank has read, and of all samples of
            the group once the ranks have told each other.
        num_passes: times that all ranks go through the layers; 0: each goes as often as it has to.
    """

    group: Group
    layout: Layout
    spans: tuple[Span, ...]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor | None = None
    reaches: tuple[int, ...] | None = None
    learns: bool = True
    scored: tuple[int | None, ...] | None = None
    sources: tuple[str, ...] | None = None
    mutual: Mutual = field(default_factory=dict[int, tuple[tuple[int, int], ...]])
    num_passes: int = 0

    @property
    def num_tokens(self) -> int:
        """Return how many tokens of samples this rank holds."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_targets(self) -> int:
        """Return how many tokens of this rank have something to predict."""
        targets = self.inputs.get("shift_labels", self.inputs.get("labels"))
        if targets is None:
            return 0
        return num_targets(targets if targets.ndim == 2 else targets[..., 0])  # a label may be several numbers


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A `StepBatch` is all micro-batches of one rank.

    Args:
        share: what they were made from.
        micro_batches: as many as the plan has, on every rank.
        num_targets: tokens of this rank that have something to predict.
        fingerprints: of the step's shared rows, of those that this rank has read.
    """

    share: StepShare
    micro_batches: tuple[RankMicroBatch, ...]
    num_targets: int
    fingerprints: Mapping[int, int] = field(default_factory=dict[int, int])

    def pin_memory(self) -> StepBatch:
        """Return a copy in page-locked memory; torch's DataLoader calls this when asked to pin."""
        pinned = tuple(
            replace(m, inputs={name: tensor.pin_memory() for name, tensor in m.inputs.items()})
            for m in self.micro_batches
        )
        return replace(self, micro_batches=pinned)

    @property
    def is_labelled(self) -> bool:
        """Return whether there is anything to learn, or to take a loss of."""
        return all(m.labels is not None for m in self.micro_batches)

    def parts(self, number: int) -> list[StepPart]:
        """Deal the micro-batches out evenly and in order; the last part has at least one, others may be empty."""
        num_micro_batches = len(self.micro_batches)
        # rounded down, so that the last part cannot be empty: with it Trainer takes the optimizer step
        ends = [index * num_micro_batches // number for index in range(number + 1)]
        return [StepPart(self, range(start, end)) for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class StepPart(Mapping[str, torch.Tensor]):
    """A `StepPart` is some micro-batches of a step, in the place of one of Trainer's batches.

    It reads as a batch with one row: `input_ids`, `labels`, `position_ids` and an `attention_mask` of ones for the
    tokens that this rank holds, shape (1, num_tokens).

    Args:
        batch: of this rank.
        numbers: of the micro-batches.
    """

    batch: StepBatch
    numbers: range

    @property
    def micro_batches(self) -> tuple[RankMicroBatch, ...]:
        """Return the micro-batches themselves."""
        return self.batch.micro_batches[self.numbers.start : self.numbers.stop]

    @property
    def is_last(self) -> bool:
        """Return whether the step ends with this part."""
        return self.numbers.stop == len(self.batch.micro_batches)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise KeyError(name)
        # an empty part must still read as a batch, for Trainer counts its tokens
        rows = [self._of(m, name) for m in self.micro_batches]
        return torch.cat(rows, dim=1) if rows else torch.empty(1, 0, dtype=torch.long)

    def __iter__(self) -> Iterator[str]:
        labels = ("labels",) if self.batch.is_labelled else ()
        return iter(("input_ids", *labels, "position_ids", "attention_mask"))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    @staticmethod
    def _of(micro_batch: RankMicroBatch, name: str) -> torch.Tensor:
        """Return a tensor of a micro-batch without what stands in for missing tokens, shape (1, num_tokens)."""
        num_tokens = micro_batch.num_tokens
        if name == "attention_mask":
            return torch.ones(1, num_tokens, dtype=torch.long)
        if name == "labels":
            assert micro_batch.labels is not None
            return micro_batch.labels[:, :num_tokens]
        values = micro_batch.inputs[name]
        return (values[0] if values.ndim > 2 else values)[:, :num_tokens]  # of positions in three parts, the first
