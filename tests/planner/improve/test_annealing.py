"""Laws of annealing: what it gives is a plan, no slower, the same each time, and its energy is what it says it is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from planner.reference import batches, optimal_seconds, problems, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.planner.draft import Draft, draft_seconds, to_plan
from hf_hetero.planner.improve.annealing import Moves, annealed
from hf_hetero.planner.improve.energy import DraftState
from hf_hetero.planner.problem import Problem, make_problem
from hf_hetero.planner.search.fast import fast_draft
from hf_hetero.planner.search.homogeneous import best_homogeneous

some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def started(batch: tuple[list[int], int, CostModel]) -> tuple[Problem, Draft]:
    """A batch and the best draft with one degree."""
    lengths, num_ranks, cost = batch
    problem = make_problem(cost, num_ranks, None, lengths)
    draft = best_homogeneous(problem)
    assert draft is not None
    return problem, draft


def held(draft: Draft) -> list[int]:
    return sorted(sample for groups in draft for _, samples in groups for sample in samples)


@some
@given(batches())
def test_a_plan_no_slower_the_same_each_time(batch: tuple[list[int], int, CostModel]) -> None:
    """Any batch, with zero costs, one rank, or odd degrees: memory and ranks are kept, and every sample comes once."""
    lengths, num_ranks, cost = batch
    problem, draft = started(batch)
    found = annealed(problem, draft, 4000)
    plan = to_plan(problem, found, "annealing", 0.0)
    assert problems(plan, lengths, num_ranks, cost) == []
    assert plan.seconds == pytest.approx(draft_seconds(problem, found))
    assert draft_seconds(problem, found) <= draft_seconds(problem, draft)
    assert annealed(problem, draft, 4000) == found


def moved(problem: Problem, draft: Draft, num_moves: int, power: float) -> DraftState:
    """A state after moves that are all made where ranks and memory allow them, however slow the step becomes."""
    state = DraftState(problem, draft, power)
    chance = random.Random(0).random
    moves = Moves(state, chance).often()
    state.allowed = 10 * draft_seconds(problem, draft)
    for _ in range(num_moves):
        moves[int(chance() * len(moves))]()
    return state


def differences(state: DraftState, problem: Problem, power: float) -> list[str]:
    """What a state says of itself and is not so, counted from its groups' samples."""
    wrong: list[str] = []
    fresh = DraftState(problem, state.draft(), power)
    pairs = zip([m for m in state.micro_batches if m.groups], fresh.micro_batches, strict=False)
    for number, (mine, true) in enumerate(pairs):
        if (mine.num_free, mine.energy) != (true.num_free, pytest.approx(true.energy, rel=1e-6)):
            wrong.append(f"num_free or energy of micro-batch {number}")
        if mine.weight != pytest.approx(sum(group.weight for group in mine.groups), rel=1e-6):
            wrong.append(f"weight of micro-batch {number}")
        for group, same in zip(mine.groups, true.groups, strict=True):
            weight = same.weight * (true.scale / mine.scale) ** power
            for name, value in (("tokens", same.tokens), ("squares", same.squares), ("seconds", same.seconds)):
                if getattr(group, name) != pytest.approx(value, rel=1e-6):
                    wrong.append(f"{name} of a group of micro-batch {number}")
            if group.weight != pytest.approx(weight, rel=1e-6, abs=1e-9):
                wrong.append(f"weight of a group of micro-batch {number}")
    wrong += [f"holder of {s}" for s in range(len(problem.lengths)) if s not in state.holders[s].samples]
    wrong += (
        ["groups"] if {id(g) for g in state.groups} != {id(g) for m in state.micro_batches for g in m.groups} else []
    )
    return wrong


@some
@given(batches())
def test_the_state_is_what_its_samples_say(batch: tuple[list[int], int, CostModel]) -> None:
    """After many moves, sums, energies and holders are those counted from scratch; no sample is lost."""
    problem, draft = started(batch)
    for power in (32.0, 256.0):
        state = moved(problem, draft, 500, power)
        assert differences(state, problem, power) == []
        assert held(state.draft()) == list(range(len(problem.lengths)))
        assert state.step_seconds() == pytest.approx(draft_seconds(problem, state.draft()))


def test_a_wrong_state_would_be_noticed() -> None:
    """A weight, a sum, a holder or a rank that is off is a difference."""
    problem, draft = started(([60, 50, 50, 40, 30, 20], 2, small_cost()))  # no group holds all
    for wrong in ("weight", "tokens", "seconds", "holder", "num_free"):
        state = moved(problem, draft, 200, 32.0)
        group = max(state.groups, key=lambda group: group.weight)
        if wrong == "holder":
            state.holders[group.samples[0]] = next(other for other in state.groups if other is not group)
        elif wrong == "num_free":
            group.micro_batch.num_free += 1
        else:
            setattr(group, wrong, 1.1 * getattr(group, wrong))
        assert any(difference.startswith(wrong) for difference in differences(state, problem, 32.0)), wrong


def test_a_rise_is_the_difference_of_energies() -> None:
    """What a move is said to cost is what it costs, for groups of one micro-batch and of two; memory is kept."""
    chance = random.Random(3)
    lengths = [chance.randint(1, 90) for _ in range(30)]
    problem = make_problem(small_cost(100, (2, 4)), 4, None, lengths)
    draft = fast_draft(problem)
    assert draft is not None
    state = DraftState(problem, draft, 32.0)
    moves, made = Moves(state, chance.random).often(), 0
    for _ in range(3000):
        before = sum(micro_batch.energy for micro_batch in state.micro_batches)
        state.allowed = 0.01 * before
        was = state.draft()
        chance.choice(moves)()
        after = sum(micro_batch.energy for micro_batch in state.micro_batches)
        assert after - before <= state.allowed + 1e-6 * before  # to the rounding of sums of powers
        made += state.draft() != was
    assert made > 100


@some
@given(batches(max_ranks=4, max_samples=6))
def test_small_batches_near_the_optimum(batch: tuple[list[int], int, CostModel]) -> None:
    """Never below the best of all plans: such a draft would be no plan."""
    problem, draft = started(batch)
    optimum = optimal_seconds(*batch)
    assert draft_seconds(problem, annealed(problem, draft, 4000)) >= optimum * (1 - 1e-9)


def test_most_small_batches_are_solved() -> None:
    """From one group after the other to the best of all plans, in at least 8 of 10 batches of seven samples."""
    solved = 0
    for seed in range(10):
        chance = random.Random(seed)
        lengths = [chance.randint(5, 90) for _ in range(7)]
        problem = make_problem(small_cost(), 4, None, lengths)
        alone = [[(1, [sample])] for sample in range(7)]
        found = draft_seconds(problem, annealed(problem, alone, 20_000))
        solved += found <= optimal_seconds(lengths, 4, small_cost()) * (1 + 1e-9)
    assert solved >= 8


def test_a_micro_batch_may_be_emptied() -> None:
    """A short sample alone in a micro-batch moves to another one, and the micro-batch is gone."""
    cost, chance = replace(small_cost(5500), micro_batch_s=1e-3), random.Random(0)
    lengths = sorted([*(chance.randint(2000, 5500) for _ in range(44)), 150], reverse=True)
    full = [[(1, [sample]) for sample in range(start, min(start + 16, 44))] for start in range(0, 44, 16)]
    problem = make_problem(cost, 16, None, lengths)
    draft = [full[0], [(1, [44])], *full[1:]]
    found = annealed(problem, draft, 40_000)
    assert len(found) < len(draft)
    assert held(found) == list(range(45))
    assert draft_seconds(problem, found) < draft_seconds(problem, draft)


def test_little_time_ends_it() -> None:
    """More moves than there is time for: it ends with a plan that is no slower, and with what the clock allowed."""
    problem, draft = started(([60, 50, 50, 40, 30, 20], 2, small_cost()))
    found = annealed(problem, draft, 10**12, time_limit_s=0.05)
    assert held(found) == list(range(6))
    assert draft_seconds(problem, found) <= draft_seconds(problem, draft)


def test_one_sample_on_one_rank() -> None:
    """Nothing to exchange, and nobody to exchange it with."""
    problem = make_problem(small_cost(), 1, None, [7])
    assert annealed(problem, [[(1, [0])]], 1000) == [[(1, [0])]]
    free = CostModel(0.0, 0.0, 0.0, 0.0, {}, 1.0, 0.0, 9.0)
    problem = make_problem(free, 1, None, [7, 3])
    assert annealed(problem, [[(1, [0])], [(1, [1])]], 1000) == [[(1, [0])], [(1, [1])]]
