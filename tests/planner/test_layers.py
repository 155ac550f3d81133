"""Laws of the three layers, basic, methods, policies: each adds a freedom, and none is slower for having it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner.reference import optimal_seconds
from planner.reference import problems as faults
from planner.test_methods import COST as WITH_KEYS
from planner.test_methods import LENGTHS

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.errors import ConfigError, InfeasibleBatch
from hf_hetero.plan import METHODS, Group, MicroBatch, Plan
from hf_hetero.planner import Planner, basic, methods, policies
from hf_hetero.planner import problem as problems
from hf_hetero.planner.basic import Search
from hf_hetero.planner.problem import make_problem
from hf_hetero.what_if.mixes import MIXES, draw_lengths

COST = replace(WITH_KEYS, kv_bytes_per_token=None, num_kv_heads=None, ring_overlap=0.0)
"""Groups exchange heads, and nothing else is known."""
KNOWS_KEYS: dict[str, Any] = {"kv_bytes_per_token": 5e3, "num_heads": 6, "num_kv_heads": 2, "ring_overlap": 0.3}
POLICIES = {
    "recompute": ActivationPolicy(3e4, 1.3e-9, 2.7e-6),
    "offload": ActivationPolicy(1e4, 1.3e-9, 3.2e-6, exchanges=1.5),
}
COSTS = {
    "basic": COST,
    "methods": replace(COST, **KNOWS_KEYS),
    "policies": replace(COST, activation_policies=POLICIES),
    "both": replace(COST, activation_policies=POLICIES, **KNOWS_KEYS),
}
FAST = Search("fast", 1.0, "highs")
NO_SLOWER = 1 + 1e-9

batches = st.lists(st.integers(1, 12_000), min_size=1, max_size=20)


@settings(deadline=None, max_examples=40)
@given(batches, st.sampled_from([4, 6, 8]))
def test_the_basic_layer_is_no_slower_than_static(lengths: list[int], num_ranks: int) -> None:
    """With no freedom but who shares what: no run with one degree is faster, and the bound is below all of them."""
    problem = make_problem(COST, num_ranks, None, lengths)
    plan = basic.plan(problem, FAST)
    for degree in problem.degrees:
        if lengths_fit(degree * problem.capacity, lengths):
            static = basic.static(problem, degree)
            assert plan.lower_bound_s <= plan.seconds * NO_SLOWER <= static.seconds * NO_SLOWER**2
        else:
            with pytest.raises(InfeasibleBatch, match="Choose a larger degree"):
                basic.static(problem, degree)


@settings(deadline=None, max_examples=30)
@given(batches, st.sampled_from([4, 8]))
def test_methods_are_no_slower_than_the_basic_layer(lengths: list[int], num_ranks: int) -> None:
    """A choice of methods does not make a plan slower, nor than any static plan with a choice; its bound holds."""
    problem = make_problem(COSTS["methods"], num_ranks, None, lengths)
    plan = methods.plan(problem, FAST, METHODS)
    below = basic.plan(problem, FAST)
    with_choice = methods.with_methods(problem.cost, below, problem.batch, METHODS)
    assert plan.lower_bound_s <= plan.seconds * NO_SLOWER <= with_choice.seconds * NO_SLOWER**2
    static = methods.with_methods(problem.cost, basic.static(problem), problem.batch, METHODS)
    assert plan.seconds <= static.seconds * NO_SLOWER


@settings(deadline=None, max_examples=20)
@given(batches, st.sampled_from([4, 8]), st.sampled_from(["policies", "both"]))
def test_policies_are_no_slower_than_methods(lengths: list[int], num_ranks: int, cost_name: str) -> None:
    """A choice of policies does not make a plan slower than one policy for all, nor than a static plan."""
    problem = make_problem(COSTS[cost_name], num_ranks, None, lengths)
    plan = policies.plan(problem, FAST, METHODS)
    assert plan.lower_bound_s <= plan.seconds * NO_SLOWER
    assert plan.seconds <= policies.static(problem).seconds * NO_SLOWER
    for way in map(problem.priced_by, problem.cost.by_activations.values()):
        if way.holds_longest:
            assert plan.seconds <= methods.plan(way, FAST, METHODS).seconds * NO_SLOWER


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(batches, st.sampled_from([2, 4, 8]), st.sampled_from(list(COSTS)), st.sampled_from([("ulysses",), METHODS]))
def test_improving_is_never_slower_nor_proves_too_much(
    lengths: list[int], num_ranks: int, cost_name: str, allowed: tuple[str, ...]
) -> None:
    """Whatever freedom groups have: valid, no slower, the bound no lower and below every plan that is known."""
    pytest.importorskip("mip")
    cost = COSTS[cost_name]
    planner = Planner(cost, num_ranks, mip_time_limit_s=0.1, methods=allowed)
    if max(lengths) > cost.leanest.capacity_tokens * planner.degrees[-1]:
        return
    plan = planner.plan(lengths)
    better = planner.improve(plan, lengths)
    assert faults(better, lengths, num_ranks, cost) == []
    assert better.seconds == pytest.approx(cost.plan_seconds(better, lengths))
    assert better.seconds <= plan.seconds * NO_SLOWER
    assert plan.lower_bound_s <= better.lower_bound_s * NO_SLOWER
    known = [better.seconds, planner.static(lengths).seconds, planner.plan(lengths[::-1]).seconds]
    assert better.lower_bound_s <= min(known) * NO_SLOWER


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 12_000), min_size=1, max_size=5), st.sampled_from([2, 4]))
def test_what_is_proven_holds_for_every_policy(lengths: list[int], num_ranks: int) -> None:
    """An improved plan is not below the best of all plans, nor is its bound above that."""
    pytest.importorskip("mip")
    planner = Planner(COSTS["policies"], num_ranks, mip_time_limit_s=0.3)
    if max(lengths) > planner.cost_model.leanest.capacity_tokens * planner.degrees[-1]:
        return
    better = planner.improve(planner.plan(lengths), lengths)
    optimum = optimal_seconds(lengths, num_ranks, COSTS["policies"])
    assert better.lower_bound_s <= optimum * NO_SLOWER <= better.seconds * NO_SLOWER**2


@pytest.mark.parametrize("name", COSTS)
def test_a_poor_plan_is_improved_with_every_freedom(name: str) -> None:
    """One sample after the other is slow, whatever groups do; side by side is found, and more is proven."""
    pytest.importorskip("mip")
    cost, lengths = COSTS[name], LENGTHS if name in ("basic", "methods") else [40_000, *LENGTHS]
    planner = Planner(cost, 8, mip_time_limit_s=1.0)
    ranks = tuple(range(8))
    alone = Plan(8, tuple(MicroBatch((Group(ranks, (sample,)),)) for sample in range(len(lengths))))
    poor = methods.with_methods(cost, alone, lengths, METHODS)
    assert any(group.activations for group in poor.groups) == (len(lengths) > len(LENGTHS))
    better = planner.improve(poor, lengths)
    assert better.seconds < 0.97 * poor.seconds
    assert 0 < better.lower_bound_s <= better.seconds
    assert faults(better, lengths, 8, cost) == []


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_what_a_run_with_one_degree_proves_holds_for_every_method(seed: int) -> None:
    """Its groups exchange heads, its bound is below plans with other methods; so it stays when it is improved."""
    pytest.importorskip("mip")
    lengths = draw_lengths(MIXES["github"], 48, seed, max_tokens=60_000)[0].tolist()
    planner = Planner(CostModel.load("llama-8b_8xh100_pcie"), 8, mip_time_limit_s=0.1)
    best = planner.plan(lengths)
    longest = max(lengths)
    for degree in (d for d in planner.degrees if longest <= d * planner.cost_model.capacity_tokens):
        static = planner.static(lengths, degree)
        assert static.lower_bound_s <= best.seconds * NO_SLOWER
        assert planner.improve(static, lengths).lower_bound_s <= best.seconds * NO_SLOWER


def test_a_layer_without_its_freedom_hands_down() -> None:
    """Without policies the top layer is the middle one; without methods, the middle one is the lowest."""
    with_methods = make_problem(COSTS["methods"], 8, None, LENGTHS)
    assert policies.plan(with_methods, FAST, METHODS) == methods.plan(with_methods, FAST, METHODS)
    assert methods.plan(with_methods, FAST, METHODS) != basic.plan(with_methods, FAST)  # here it has a say
    plain = make_problem(COST, 8, None, LENGTHS)
    assert policies.plan(plain, FAST, METHODS) == methods.plan(plain, FAST, METHODS) == basic.plan(plain, FAST)
    assert policies.static(plain) == basic.static(plain)


@pytest.mark.parametrize("name", COSTS)
def test_lengths_enter_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length is checked once a call, and no second planner is built, however many layers have a say."""
    planner = Planner(COSTS[name], 8, mip_time_limit_s=0.05)
    checks: list[int] = []
    check = problems.checked_length

    def counted(sample: int, length: object) -> int:
        checks.append(sample)
        return check(sample, length)

    def unexpected(self: Planner) -> None:
        raise AssertionError(f"{self} was built while another one plans")

    monkeypatch.setattr(problems, "checked_length", counted)
    monkeypatch.setattr(Planner, "__post_init__", unexpected)
    with pytest.raises(AssertionError, match="was built"):
        Planner(COST, 8)  # it would be noticed
    plan = planner.plan(LENGTHS)
    assert checks == list(range(len(LENGTHS)))
    planner.static(LENGTHS)
    assert checks == 2 * list(range(len(LENGTHS)))
    pytest.importorskip("mip")
    planner.improve(plan, LENGTHS)
    assert checks == 3 * list(range(len(LENGTHS)))


@pytest.mark.parametrize("name", COSTS)
def test_a_plan_of_other_samples_is_not_improved(name: str) -> None:
    """Whatever its groups do: with other samples, or with lengths of other seconds, it is refused."""
    planner = Planner(COSTS[name], 8)
    plan = planner.plan([30_000, *LENGTHS])
    with pytest.raises(ConfigError, match="it cannot be improved for 12 samples"):
        planner.improve(plan, LENGTHS)
    with pytest.raises(ConfigError, match="with these lengths and this cost model it would take"):
        planner.improve(plan, [15_000, *LENGTHS])


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=20), st.data())
def test_a_part_of_a_batch_is_a_batch(lengths: list[int], data: st.DataObject) -> None:
    """Some samples of a checked batch are what they would be if they came alone, whatever prices them."""
    samples = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    whole = make_problem(COST, 8, 4, lengths)
    part = whole.of(samples)
    assert whole.batch == tuple(lengths)
    assert part == make_problem(COST, 8, 4, [lengths[sample] for sample in samples])
    fewer = COST.with_degrees([2, 8])
    assert part.priced_by(fewer) == make_problem(fewer, 8, 4, part.batch)


def test_the_readme_names_every_file() -> None:
    """Its table has a row for each file of the room, and none for others."""
    room = Path(policies.__file__).parent
    files = {path.relative_to(room).with_suffix("").as_posix() for path in room.rglob("*.py")}
    named = re.findall(r"^\| `([\w/]+)` \|", (room / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(name for name in files if not name.endswith("__init__"))


def lengths_fit(room: int, lengths: list[int]) -> bool:
    return max(lengths) <= room
