"""Laws of joining equal groups, held against a rule that looks at all rooms each time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from planner.reference import small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.problem import Problem, make_problem
from hf_hetero.planner.search.joining import Join, Joins, least_useful_room

SHIFT = 8
CAPACITY = 100


@dataclass
class Groups:
    """Groups of some micro-batches, each with what it has left and the room that this makes."""

    problem: Problem
    micro_batch: list[int] = field(default_factory=list[int])
    degree: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])
    work: list[float] = field(default_factory=list[float])

    def open(self, chance: random.Random) -> int:
        self.micro_batch.append(chance.choice([0, 0, 0, 1]))
        self.degree.append(chance.choice([0, 0, 0, 0, 1, 2, 3]))
        self.tokens.append(chance.randrange(70))
        self.work.append(chance.uniform(0, 100))
        return len(self.tokens) - 1

    def key(self, group: int) -> int:
        room = self.problem.room(self.degree[group], self.tokens[group], self.work[group])
        return room << SHIFT | group

    def joins(self) -> Joins:
        return Joins(self.problem, self.keys(), SHIFT, self.micro_batch, self.degree, self.tokens, self.work)

    def keys(self) -> list[int]:
        return sorted(self.key(group) for group in range(len(self.tokens)) if self.key(group) >= 0)


SPEEDS = ((100.0, 99.0, 1.0), (1e9, 1e9, 1e9), (100.0, 1.0, 101.0), (1.0, 100.0, 2.0))
"""Of exchanges at degrees 2, 4 and 8: at 1, they take as long as the token itself, at 100 next to nothing."""


def priced(speeds: tuple[float, ...] = SPEEDS[0]) -> CostModel:
    """8 ranks, whose exchanges have a latency that grows with the degree."""
    bandwidths, latency = dict(zip((2, 4, 8), speeds, strict=True)), {2: 10.0, 4: 20.0, 8: 30.0}
    return replace(small_cost(CAPACITY), all_to_all_bytes_per_s=bandwidths, all_to_all_latency_s=latency)


def drawn(chance: random.Random) -> Groups:
    """Groups that are partly full, many of them of one kind; some have memory and no time, or time and no memory."""
    problem = make_problem(priced(chance.choice(SPEEDS)), 8, None, [60, 5])
    made = Groups(problem)
    for _ in range(chance.randrange(40)):
        made.open(chance)
    return made


def chosen(made: Groups, length: int) -> list[int] | None:
    """The rule, word for word: rooms from the largest down; 2, 4 and 8 of a kind; the first that is cheap, or the best.

    Rooms of which even eight hold no such sample are not looked at.
    """
    problem, kinds = made.problem, dict[tuple[int, int], list[int]]()
    best: tuple[tuple[float, int, float], list[int]] | None = None
    for key in reversed(made.keys()):
        group = key & ((1 << SHIFT) - 1)
        if (key >> SHIFT) * 8 < length:
            break
        alike = kinds.setdefault((made.micro_batch[group], made.degree[group]), [])
        alike.append(group)
        ranks = problem.degrees[made.degree[group]] * len(alike)
        if len(alike) not in (2, 4, 8) or ranks not in problem.degrees:
            continue
        small, large = made.degree[group], problem.degrees.index(ranks)
        tokens, work = sum(made.tokens[g] for g in alike), 0.0
        for joined in alike:
            work += made.work[joined]
        lost = (problem.linear_s[large] - problem.linear_s[small]) * (CAPACITY * ranks - tokens)
        left = work - lost - (problem.fixed_s[large] - problem.fixed_s[small]) * ranks
        if problem.room(large, tokens, left) < length:
            continue
        if best is None or (lost, large, left) < best[0]:
            best = ((lost, large, left), list(alike))
            if problem.linear_s[large] <= problem.cheap_exchange_s:
                break
    return None if best is None else best[1]


def taken(joins: Joins, length: int) -> list[int] | None:
    join = joins.best(length)
    return None if join is None else [key & ((1 << SHIFT) - 1) for key in joins.take(join)]


def test_the_rule() -> None:
    """The groups that are joined are those that the rule names, largest room first."""
    chance = random.Random(0)
    for _ in range(1000):
        made, length = drawn(chance), chance.randint(5, 60)
        assert taken(made.joins(), length) == chosen(made, length)


def test_the_rule_holds_after_changes() -> None:
    """Where groups are opened and get samples, those are joined that would be if all rooms were looked at anew."""
    chance = random.Random(0)
    for _ in range(300):
        made = drawn(chance)
        joins = made.joins()
        for length in range(60, 5, -3):
            join, rule = joins.best(length), chosen(made, length)
            assert (join and (join.number, join.smallest)) == (rule and (len(rule), made.key(rule[-1])))
            for group in chance.sample(range(len(made.tokens)), k=min(2, len(made.tokens))):
                if made.key(group) >= 0:
                    joins.remove(made.key(group))
                    made.tokens[group] = max(0, made.tokens[group] - chance.randrange(30))
                    joins.add(made.key(group))
            opened = made.open(chance)
            if made.key(opened) >= 0:
                joins.add(made.key(opened))


def test_a_change_that_is_not_told_is_noticed() -> None:
    """Negative control: without `remove` and `add`, a room that is gone is still joined."""
    made = Groups(make_problem(priced(), 8, None, [60, 5]), [0] * 3, [0] * 3, [40, 35, 30], [1e3] * 3)
    joins = made.joins()
    assert taken(made.joins(), 60) == chosen(made, 60) == [0, 1]
    assert joins.best(60) is not None
    made.tokens[0] = 0
    assert chosen(made, 60) == [1, 2]
    assert taken(joins, 60) == [0, 1]


def test_what_a_join_says_is_so() -> None:
    """Tokens add up, and what is held so far pays the larger degree's exchange."""
    problem = make_problem(small_cost(CAPACITY), 8, None, [60])
    made = Groups(problem, [0, 0], [0, 0], [40, 30], [1000.0, 900.0])
    join = made.joins().best(60)
    assert isinstance(join, Join)
    assert (join.number, problem.degrees[join.degree], join.longest) == (2, 2, 70)
    assert join.lost == pytest.approx(0.1 * (200 - 70))
    assert join.work == pytest.approx(1900 - join.lost)


def test_rooms_of_no_use() -> None:
    """A room below an eighth of the shortest sample holds none, however many of them are joined."""
    for shortest in (1, 7, 8, 9, 60):
        room = least_useful_room(make_problem(small_cost(CAPACITY), 8, None, [60, shortest]))
        assert 8 * (room - 1) < shortest <= 8 * room
