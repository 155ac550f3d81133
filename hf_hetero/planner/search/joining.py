"""Joining makes room where none is left: 2, 4 or 8 equal groups of a micro-batch become one that holds a sample.

Memory that is lost at the ends of small groups is won back this way, for the price of a larger degree's exchange. Which
groups would be joined depends only on the largest rooms of each kind of group, and a kind is looked at again only when
these have changed: where memory is tight, nearly every sample asks for a join.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from math import sqrt
from typing import NamedTuple

from hf_hetero.planner.problem import Problem

JOINS = (2, 4, 8)
"""How many equal groups may be joined; the largest number also says which rooms are given up. Half, up to 4: ±0.0 %,
CPU +1 %; double, from 4 to 16: ±0.0 % (-0.1 to +0.4), CPU -1 % (all)."""


class Join(NamedTuple):
    """A `Join` is what the largest rooms of one kind of group would become together.

    Args:
        smallest: the smallest of the rooms that are joined, as a key.
        longest: tokens of the longest sample that the joined group would hold.
        lost: rank-seconds that its exchange takes more.
        degree: index of its degree.
        work: rank-seconds that it would still have time for.
        kind: of the groups that are joined.
        number: how many they are.
    """

    smallest: int
    longest: int
    lost: float
    degree: int
    work: float
    kind: int
    number: int


class Joins:
    """`Joins` know the rooms of each kind of group: of one micro-batch, and of one degree.

    Args:
        problem: the batch.
        rooms: `longest sample that still fits << shift | group`, of all groups.
        shift: bits that hold a group's number.
        micro_batch, degree, tokens, work: of each group, as in `Packing`; they change while samples are packed.
    """

    def __init__(
        self,
        problem: Problem,
        rooms: Iterable[int],
        shift: int,
        micro_batch: list[int],
        degree: list[int],
        tokens: list[int],
        work: list[float],
    ) -> None:
        self._problem, self._shift, self._mask = problem, shift, (1 << shift) - 1
        self._micro_batch, self._degree, self._tokens, self._work = micro_batch, degree, tokens, work
        self._num_degrees = len(problem.degrees)
        self._larger = [_larger(problem, index) for index in range(len(problem.degrees))]
        self._rooms: dict[int, list[int]] = {}
        self._joins: dict[int, list[Join]] = {}
        self._longest: dict[int, int] = {}
        for key in rooms:
            group = key & self._mask
            kind = micro_batch[group] * self._num_degrees + degree[group]
            self._rooms.setdefault(kind, []).append(key)
        for keys in self._rooms.values():
            keys.sort()
        self._changed = set(self._rooms)

    def add(self, key: int) -> None:
        """Take in a group's room."""
        group = key & self._mask
        kind = self._micro_batch[group] * self._num_degrees + self._degree[group]
        keys = self._rooms.setdefault(kind, [])
        insort(keys, key)
        if len(keys) <= JOINS[-1] or key >= keys[-JOINS[-1]]:
            self._changed.add(kind)

    def remove(self, key: int) -> None:
        """Forget a group's room; the group is still of the kind it was."""
        group = key & self._mask
        kind = self._micro_batch[group] * self._num_degrees + self._degree[group]
        keys = self._rooms[kind]
        place = bisect_left(keys, key)
        if place >= len(keys) - JOINS[-1]:
            self._changed.add(kind)
        del keys[place]

    def best(self, length: int) -> Join | None:
        """Choose whom to join for a sample: rooms as large as can be, unless that makes exchange dear.

        Kinds are tried from their largest rooms down, and the first join that holds the sample and whose exchange is
        about as cheap as any is taken; where none is, the one that loses least.
        """
        for kind in self._changed:
            joins = self._joins[kind] = self._of(kind, length)
            self._longest[kind] = max([join[1] for join in joins], default=-1)
        self._changed.clear()
        joins = [
            join
            for kind, longest in self._longest.items()
            if longest >= length
            for join in self._joins[kind]
            if join[1] >= length
        ]
        best = max(joins, default=None)
        if best is None or self._is_cheap(best):
            return best
        for join in sorted(joins, reverse=True):
            if join[2:5] < best[2:5]:
                best = join
                if self._is_cheap(join):
                    break
        return best

    def _is_cheap(self, join: Join) -> bool:
        return self._problem.linear_s[join.degree] <= self._problem.cheap_exchange_s

    def take(self, join: Join) -> list[int]:
        """Take out the rooms of a join, and return their keys, largest first."""
        keys = self._rooms[join.kind]
        taken = keys[-join.number :]
        del keys[-join.number :]
        self._changed.add(join.kind)
        return taken[::-1]

    def _of(self, kind: int, length: int) -> list[Join]:
        """List the joins of a kind's largest rooms: 2, 4 and 8 of them, where there are as many.

        Those of more rooms are left out where fewer hold a sample of this length, and `_larger` says that this is the
        last to be looked at: samples only get shorter, so that the others would never be chosen.
        """
        keys, mask, attention = self._rooms[kind], self._mask, self._problem.cost.attention_s_per_token2
        joins: list[Join] = []
        tokens, work, counted = 0, 0.0, 0
        for count, large, all_tokens, linear, dearer, fixed, is_last in self._larger[kind % self._num_degrees]:
            if count > len(keys):
                break
            for key in keys[~counted:~count:-1]:
                tokens += self._tokens[key & mask]
                work += self._work[key & mask]
            counted = count
            # attention takes the same rank-seconds at any degree; what the groups hold now pays the larger one's
            # exchange
            lost = dearer * (all_tokens - tokens)
            left = work - lost - fixed
            # `Problem.room`, written out: where memory is tight this is called for nearly every sample
            if (attention * tokens + linear) * tokens <= left:
                longest = tokens
            elif left > 0:
                longest = int(2 * left / (linear + sqrt(linear * linear + 4 * attention * left)))
            else:
                continue
            smallest = keys[-count]
            most = (smallest >> self._shift) * JOINS[-1]
            longest = longest if longest < most else most
            joins.append(Join(smallest, longest, lost, large, left, kind, count))
            if is_last and longest >= length:
                break
        return joins


def least_useful_room(problem: Problem) -> int:
    """Return the tokens of the smallest room that may ever hold a sample, alone or as one of those that are joined."""
    return -(-problem.lengths[-1] // JOINS[-1])


def _larger(problem: Problem, small: int) -> list[tuple[int, int, int, float, float, float, bool]]:
    """List what groups of a degree can become.

    Returns:
        How many are joined; index of their degree then, and the tokens that it holds; rank-seconds of a token then, how
        many more that is than before, and how many more the group takes before its first token; and whether this join,
        where it holds a sample, is taken rather than those of more groups, which lose as much for more tokens.
    """
    larger: list[tuple[int, int, int, float, float, float, bool]] = []
    for count in JOINS:
        ranks = problem.degrees[small] * count
        if ranks in problem.degrees:
            large = problem.degrees.index(ranks)
            linear, dearer = problem.linear_s[large], problem.linear_s[large] - problem.linear_s[small]
            fixed = (problem.fixed_s[large] - problem.fixed_s[small]) * ranks
            more = [problem.degrees[small] * number for number in JOINS if number > count]
            lose_more = all(problem.linear_s[problem.degrees.index(d)] >= linear for d in more if d in problem.degrees)
            is_last = dearer >= 0 and lose_more
            larger.append((count, large, problem.capacity * ranks, linear, dearer, fixed, is_last))
    return larger
