"""A problem is one global batch, ready to be planned: checked lengths, descending, and costs as small tables."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import sqrt

from hf_hetero.costs import CostModel
from hf_hetero.costs.volume import Batch
from hf_hetero.errors import BadSample, InfeasibleBatch

MAX_TOKENS = 1 << 40
"""Tokens of a sample, at most: sums of squares of lengths stay finite, and a mistyped length is told."""


@dataclass(frozen=True)
class Problem:
    """A `Problem` is what every search of this room reads.

    Samples are named by their position in `lengths`, which descends: 0 is the longest. Degrees are named by their
    index in `degrees`.

    Args:
        cost: seconds and tokens that a group may hold.
        num_ranks: ranks of the run; every micro-batch partitions them.
        degrees: usable degrees, ascending; groups of these degrees, placed largest first, are always aligned.
        lengths: tokens of each sample, descending.
        order: position of each of them in the caller's batch.
    """

    cost: CostModel
    num_ranks: int
    degrees: tuple[int, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    capacity: int = field(init=False)
    linear_s: tuple[float, ...] = field(init=False)
    fixed_s: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        # tables, because searches ask millions of times; `object.__setattr__` is how frozen dataclasses set a field
        set_field = object.__setattr__
        set_field(self, "capacity", self.cost.capacity_tokens)
        set_field(self, "linear_s", tuple(self.cost.linear_s(d) for d in self.degrees))
        set_field(self, "fixed_s", tuple(self.cost.fixed_s(d) for d in self.degrees))

    def priced_by(self, cost: CostModel) -> Problem:
        """Return the same batch on a machine with another cost model, which offers the same degrees or fewer of them.

        Whether they hold the samples is for the caller to see (`holds_longest`).
        """
        offered = cost.degrees(self.num_ranks)
        return Problem(cost, self.num_ranks, tuple(d for d in self.degrees if d in offered), self.lengths, self.order)

    def of(self, samples: Sequence[int]) -> Problem:
        """Return a part of the batch as a batch of its own: its sample `i` is the caller's `samples[i]`.

        Args:
            samples: positions in the caller's batch, ascending.
        """
        number = {sample: i for i, sample in enumerate(samples)}
        part = [position for position, sample in enumerate(self.order) if sample in number]
        lengths = tuple(self.lengths[position] for position in part)
        return Problem(self.cost, self.num_ranks, self.degrees, lengths, tuple(number[self.order[p]] for p in part))

    @property
    def holds_longest(self) -> bool:
        """Tell whether some degree holds the longest sample."""
        return self.lengths[0] <= self.capacity * self.degrees[-1]

    @cached_property
    def batch(self) -> Batch:
        """List the tokens of each sample, in the order of the caller's batch."""
        position = {sample: position for position, sample in enumerate(self.order)}
        return Batch(self.lengths[position[sample]] for sample in range(len(self.order)))

    @cached_property
    def tokens_before(self) -> tuple[int, ...]:
        """Sum the tokens of the longest 0, 1, 2, ... samples."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the batch."""
        return self.tokens_before[-1]

    @cached_property
    def least_work(self) -> float:
        """Return the rank-seconds of the batch if every token were as cheap as at the cheapest degree."""
        squares = sum(length * length for length in self.lengths)
        return self.cost.attention_s_per_token2 * squares + min(self.linear_s) * self.num_tokens

    @cached_property
    def cheap_exchange_s(self) -> float:
        """Return the rank-seconds of a token up to which a degree above 1 counts as cheap: about the cheapest's."""
        return 1.05 * min(self.linear_s[1:], default=0.0)

    @property
    def fewest_micro_batches(self) -> int:
        """Count the micro-batches that memory asks for at least."""
        return -(-self.num_tokens // (self.num_ranks * self.capacity))

    def room(self, index: int, memory: int, time: float) -> int:
        """Return the longest sample that fits into a group; -1 where none does.

        Args:
            index: of the group's degree.
            memory: tokens that it still has memory for.
            time: rank-seconds that it still has time for.
        """
        attention, linear = self.cost.attention_s_per_token2, self.linear_s[index]
        if (attention * memory + linear) * memory <= time:
            return memory
        if time <= 0:
            return -1
        return int(2 * time / (linear + sqrt(linear * linear + 4 * attention * time)))

    def group_seconds(self, degree: int, samples: Sequence[int]) -> float:
        """Return the seconds of a group of this degree (not index) that holds these samples."""
        return self.cost.seconds((self.lengths[sample] for sample in samples), degree)


def usable_degrees(cost: CostModel, num_ranks: int, max_degree: int | None = None) -> tuple[int, ...]:
    """List the degrees that tile the ranks when placed largest first: powers of two, and all ranks together.

    A group then starts at a sum of larger powers of two, so at a multiple of its own degree.
    """
    limit = num_ranks if max_degree is None else min(max_degree, num_ranks)
    return tuple(d for d in cost.degrees(num_ranks) if d <= limit and (d & (d - 1) == 0 or d == num_ranks))


def make_problem(cost: CostModel, num_ranks: int, max_degree: int | None, lengths: Sequence[int]) -> Problem:
    """Check a batch and sort it: the only way in for lengths.

    Raises:
        BadSample: a length that is not an integer of at least 1 and at most 2**40.
        InfeasibleBatch: a sample that no usable degree can hold, whatever its group does to hold more tokens.
    """
    checked = [checked_length(sample, length) for sample, length in enumerate(lengths)]
    degrees = usable_degrees(cost, num_ranks, max_degree)
    order = sorted(range(len(checked)), key=lambda sample: -checked[sample])
    problem = Problem(cost, num_ranks, degrees, tuple(checked[sample] for sample in order), tuple(order))
    if checked:
        refuse_too_long(problem if len(cost.by_activations) == 1 else problem.priced_by(cost.leanest))
    return problem


def refuse_too_long(problem: Problem) -> None:
    """Refuse a batch whose longest sample no degree holds.

    Raises:
        InfeasibleBatch: the batch has such a sample.
    """
    if not problem.holds_longest:
        capacity, degree = problem.capacity, problem.degrees[-1]
        raise InfeasibleBatch(
            f"sample {problem.order[0]} has {problem.lengths[0]} tokens; even degree {degree} holds "
            f"{capacity * degree} ({capacity} tokens a rank). "
            "Lower the maximum length, add ranks, raise the memory limit, or keep less in memory "
            "(HeteroConfig.activation_policies, or gradient checkpointing with keep_exchanged=False)."
        )


def checked_length(sample: int, length: object) -> int:
    """Return a length as a Python int, so that its square cannot overflow, and refuse what is none.

    Raises:
        BadSample: the length is not an integer of at least 1 and at most 2**40.
    """
    try:
        tokens = -1 if isinstance(length, bool) else operator.index(length)  # type: ignore[arg-type]
    except TypeError:
        tokens = -1
    if not 1 <= tokens <= MAX_TOKENS:
        raise BadSample(
            f"sample {sample} has length {length!r}; a length is a whole number of tokens from 1 to {MAX_TOKENS}. "
            "Drop the sample, or count its tokens again."
        )
    return tokens
