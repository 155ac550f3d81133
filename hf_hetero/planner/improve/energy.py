"""A draft whose groups change in place, and the energy that says how good it is.

The energy of a micro-batch is a power mean of its groups' seconds, weighted by their ranks. It grows with every group,
where the slowest group alone would say nothing about the others, and nears the slowest one's seconds as the power
rises. An exchange of samples concerns two groups, so that its energy takes a few operations whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from hf_hetero.planner.draft import Draft, micro_batch_seconds
from hf_hetero.planner.problem import Problem

LARGEST_JUMP = 2.0
"""No group becomes longer than this many times its micro-batch: that is never accepted, and its power overflows."""
UNIT_DRIFT = 0.03
"""Powers are taken of seconds in another unit where the slowest group is this share off: sums of them stay exact."""
SECONDS = attrgetter("seconds")


@dataclass(frozen=True, slots=True)
class Kinds:
    """Kinds of groups: each a degree, or what more tells groups of one degree apart. All lists go by kind.

    Args:
        names: what a draft calls them.
        degrees: ranks.
        capacity: tokens that a group holds.
        fixed_s: seconds before its first token.
        attention_s, linear_s: seconds that a square of tokens, and a token, add to a group.
    """

    names: Sequence[int]
    degrees: Sequence[int]
    capacity: Sequence[int]
    fixed_s: Sequence[float]
    attention_s: Sequence[float]
    linear_s: Sequence[float]


def kinds_of(problem: Problem) -> Kinds:
    """The degrees of a problem, on ranks that are alike."""
    degrees, attention = problem.degrees, problem.cost.attention_s_per_token2
    return Kinds(
        names=degrees,
        degrees=degrees,
        capacity=[problem.capacity * degree for degree in degrees],
        fixed_s=problem.fixed_s,
        attention_s=[attention / degree for degree in degrees],
        linear_s=[s / degree for s, degree in zip(problem.linear_s, degrees, strict=True)],
    )


@dataclass(slots=True, eq=False)
class MicroBatchState:
    """Groups that run side by side.

    Args:
        num_free: ranks without a group.
        groups: those that hold samples.
        slowest: the one of them that takes longest; None where there is none.
        scale: about its seconds; powers are taken of seconds in this unit.
        weight: sum of the groups' weights.
        energy: power mean of the groups' seconds.
    """

    num_free: int
    groups: list[GroupState] = field(default_factory=list["GroupState"])
    slowest: GroupState | None = None
    scale: float = 1.0
    weight: float = 0.0
    energy: float = 0.0

    def risen(self, more_weight: float, power: float) -> float:
        """What the energy becomes with so much more weight, less what it is."""
        weight = self.weight + more_weight  # a hair below 0, by rounding, where nothing is left
        return (self.scale * weight ** (1 / power) if weight > 0 else 0.0) - self.energy


@dataclass(slots=True, eq=False)
class GroupState:
    """Ranks that hold samples together.

    Args:
        micro_batch: where the group runs.
        index: of its kind.
        samples: positions in `Problem.lengths`.
        tokens: sum of their lengths.
        squares: sum of the squares of their lengths.
        seconds: how long the group takes.
        weight: what it adds to the power mean of its micro-batch.
    """

    micro_batch: MicroBatchState
    index: int
    samples: list[int]
    tokens: int
    squares: float
    seconds: float
    weight: float = 0.0


class DraftState:
    """A draft that changes in place, where memory allows it and the energy rises by at most `allowed` seconds.

    Args:
        problem: the batch.
        draft: where to begin; it calls groups by the names of their kinds.
        power: of the seconds.
        kinds: of the groups; None: the degrees of the problem.
        squares: of the tokens of each sample; None: those of its length.
    """

    def __init__(
        self,
        problem: Problem,
        draft: Draft,
        power: float,
        kinds: Kinds | None = None,
        squares: Sequence[float] | None = None,
    ) -> None:
        longest_s = 0.0 if kinds else max((micro_batch_seconds(problem, groups) for groups in draft), default=0.0)
        kinds = kinds or kinds_of(problem)
        self.degrees, self.lengths, self._names = kinds.degrees, problem.lengths, kinds.names
        self.power, self.allowed = power, 0.0
        self._squares = squares or [float(length * length) for length in problem.lengths]
        self._rank_share = [degree / problem.num_ranks for degree in kinds.degrees]
        self._capacity, self._fixed_s = kinds.capacity, kinds.fixed_s
        self._attention_s, self._linear_s = kinds.attention_s, kinds.linear_s
        self.micro_batches = [MicroBatchState(problem.num_ranks) for _ in range(len(draft) + 1)]  # one more, to open
        self.groups: list[GroupState] = []
        self.holders: list[GroupState] = []
        """The group of each sample."""
        drafted = zip(self.micro_batches, draft, strict=False)
        groups = [self.group(m, self._names.index(n), list(held)) for m, groups in drafted for n, held in groups]
        self._longest_s = longest_s or max((group.seconds for group in groups), default=0.0)
        holders = {sample: group for group in groups for sample in group.samples}
        self.holders = [holders[sample] for sample in range(len(self.lengths))]
        self._replace((), groups)

    def sharpen(self, power: float) -> None:
        """Take another power of the seconds."""
        self.power = power
        for micro_batch in self.micro_batches:
            self._weigh(micro_batch)

    def step_seconds(self) -> float:
        """Seconds of the step."""
        return sum(m.slowest.seconds for m in self.micro_batches if m.slowest is not None)

    def draft(self) -> Draft:
        """The groups as they are."""
        states = (micro_batch.groups for micro_batch in self.micro_batches if micro_batch.groups)
        return [[(self._names[group.index], sorted(group.samples)) for group in groups] for groups in states]

    def group(self, micro_batch: MicroBatchState, index: int, samples: list[int]) -> GroupState:
        """A group of these samples that is not in place yet."""
        tokens, squares = sum(self.lengths[s] for s in samples), sum(self._squares[s] for s in samples)
        return GroupState(micro_batch, index, samples, tokens, squares, self._seconds(index, tokens, squares))

    def like(self, other: GroupState, micro_batch: MicroBatchState, index: int) -> GroupState:
        """A group of another one's samples that is not in place yet."""
        tokens, squares = other.tokens, other.squares
        return GroupState(micro_batch, index, other.samples, tokens, squares, self._seconds(index, tokens, squares))

    def exchange(self, giver: GroupState, taker: GroupState, sample: int, back: tuple[int, ...]) -> None:
        """A sample goes from one group to another, for these others of that, if memory and energy allow it."""
        if giver is taker:
            return
        tokens, squares = self.lengths[sample], self._squares[sample]
        for other in back:
            tokens, squares = tokens - self.lengths[other], squares - self._squares[other]
        i, j, power = giver.index, taker.index, self.power
        left, taken = giver.tokens - tokens, taker.tokens + tokens
        if taken > self._capacity[j] or left > self._capacity[i]:
            return
        source, target = giver.micro_batch, taker.micro_batch
        left_squares, taken_squares = giver.squares - squares, taker.squares + squares
        # `_seconds`, written out: most moves end below, and a call would take as long as the rest
        giver_s = self._fixed_s[i] + self._attention_s[i] * left_squares + self._linear_s[i] * left if left else 0.0
        taker_s = self._fixed_s[j] + self._attention_s[j] * taken_squares + self._linear_s[j] * taken
        if taker_s > LARGEST_JUMP * target.scale or giver_s > LARGEST_JUMP * source.scale:
            return
        lighter = self._rank_share[i] * (giver_s / source.scale) ** power - giver.weight if left else -giver.weight
        heavier = self._rank_share[j] * (taker_s / target.scale) ** power - taker.weight
        if source is target:
            rise = source.risen(lighter + heavier, power)
        else:
            rise = source.risen(lighter, power) + target.risen(heavier, power)
        if rise <= self.allowed:
            giver.samples = [*(other for other in giver.samples if other != sample), *back]
            taker.samples = [*(other for other in taker.samples if other not in back), sample]
            giver.tokens, giver.squares, giver.seconds = left, left_squares, giver_s
            taker.tokens, taker.squares, taker.seconds = taken, taken_squares, taker_s
            self.holders[sample] = taker
            for other in back:
                self.holders[other] = giver
            giver.weight, taker.weight = giver.weight + lighter, taker.weight + heavier
            if source is not target:
                self._settle(target, heavier)
            if left:
                self._settle(source, lighter if source is not target else lighter + heavier)
            else:
                self._replace((giver,), ())

    def attempt(self, old: tuple[GroupState, ...], new: tuple[GroupState, ...]) -> None:
        """Groups are replaced by others of the same samples, if ranks, memory and energy allow it."""
        more_weight: dict[MicroBatchState, float] = {}
        more_ranks: dict[MicroBatchState, int] = {}
        for group in old:
            place = group.micro_batch
            more_weight[place] = more_weight.get(place, 0.0) - group.weight
            more_ranks[place] = more_ranks.get(place, 0) - self.degrees[group.index]
        for group in new:
            place, share = group.micro_batch, group.seconds / group.micro_batch.scale
            if group.tokens > self._capacity[group.index] or share > LARGEST_JUMP:
                return
            more_weight[place] = more_weight.get(place, 0.0) + self._rank_share[group.index] * share**self.power
            more_ranks[place] = more_ranks.get(place, 0) + self.degrees[group.index]
        if any(ranks > place.num_free for place, ranks in more_ranks.items()):
            return
        if sum(place.risen(more, self.power) for place, more in more_weight.items()) <= self.allowed:
            self._replace(old, new)
            for group in new:
                for sample in group.samples:
                    self.holders[sample] = group

    def _seconds(self, index: int, tokens: int, squares: float) -> float:
        return self._fixed_s[index] + self._attention_s[index] * squares + self._linear_s[index] * tokens

    def _replace(self, old: Sequence[GroupState], new: Sequence[GroupState]) -> None:
        for group in old:
            group.micro_batch.groups.remove(group)
            group.micro_batch.num_free += self.degrees[group.index]
            self.groups.remove(group)
        for group in new:
            group.micro_batch.groups.append(group)
            group.micro_batch.num_free -= self.degrees[group.index]
            self.groups.append(group)
        for micro_batch in dict.fromkeys(group.micro_batch for group in (*old, *new)):
            self._weigh(micro_batch)

    def _settle(self, micro_batch: MicroBatchState, more_weight: float) -> None:
        """Add to a micro-batch's weight what its groups' weights have changed by."""
        micro_batch.slowest = slowest = max(micro_batch.groups, key=SECONDS)
        if abs(slowest.seconds - micro_batch.scale) > UNIT_DRIFT * micro_batch.scale:
            self._weigh(micro_batch)
        else:
            micro_batch.weight += more_weight
            micro_batch.energy = micro_batch.scale * micro_batch.weight ** (1 / self.power)

    def _weigh(self, micro_batch: MicroBatchState) -> None:
        """Weigh a micro-batch's groups anew, in the seconds of the slowest of them."""
        groups, power = micro_batch.groups, self.power
        micro_batch.slowest = max(groups, key=SECONDS, default=None)
        micro_batch.weight = 0.0
        # of an empty micro-batch the unit is that of another: what it would cost to open it is weighed, too
        scale = micro_batch.slowest.seconds if micro_batch.slowest is not None else self._longest_s
        micro_batch.scale = scale or 1.0
        for group in groups:
            group.weight = self._rank_share[group.index] * (group.seconds / micro_batch.scale) ** power
            micro_batch.weight += group.weight
        micro_batch.energy = micro_batch.scale * micro_batch.weight ** (1 / power)
