"""Laws of every plan, whatever the batch, the ranks and the costs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner.reference import SHARED, batches, optimal_seconds, problems, small_cost

from hf_hetero.costs import CostModel
from hf_hetero.errors import BadSample, ConfigError, InfeasibleBatch
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner
from hf_hetero.planner.draft import draft_seconds
from hf_hetero.planner.problem import make_problem
from hf_hetero.planner.search.homogeneous import best_homogeneous

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(batches())
def test_any_batch_gets_a_valid_plan_between_the_bound_and_static(batch: tuple[list[int], int, CostModel]) -> None:
    """Each sample once, all ranks in every micro-batch, memory kept to the token; bound <= seconds <= best static."""
    lengths, num_ranks, cost = batch
    plan = Planner(cost, num_ranks).plan(lengths)
    assert problems(plan, lengths, num_ranks, cost) == []
    assert plan.seconds == cost.plan_seconds(plan, lengths)
    assert plan.lower_bound_s <= plan.seconds * (1 + 1e-9)
    problem = make_problem(cost, num_ranks, None, lengths)
    static = best_homogeneous(problem)
    assert static is not None
    assert plan.seconds <= draft_seconds(problem, static) * (1 + 1e-9)


@many
@given(batches(), st.randoms())
def test_the_order_of_the_samples_does_not_matter(
    batch: tuple[list[int], int, CostModel], order: random.Random
) -> None:
    """The same batch in another order takes the same seconds; the same batch again gets the same plan."""
    lengths, num_ranks, cost = batch
    planner = Planner(cost, num_ranks)
    plan = planner.plan(lengths)
    assert planner.plan(lengths).digest() == plan.digest()
    shuffled = order.sample(lengths, len(lengths))
    assert planner.plan(shuffled).seconds == plan.seconds


@settings(max_examples=60, deadline=None)
@given(batches(max_ranks=4, max_samples=6))
def test_close_to_the_best_of_all_plans(batch: tuple[list[int], int, CostModel]) -> None:
    """On batches small enough to try every plan: none is faster than the bound, and the best is not far ahead."""
    lengths, num_ranks, cost = batch
    plan = Planner(cost, num_ranks).plan(lengths)
    best_s = optimal_seconds(lengths, num_ranks, cost)
    assert plan.lower_bound_s <= best_s * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= plan.seconds <= best_s * 1.35


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 12, 24, 64])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([40] * 200, id="all equal"),
        pytest.param([100] * 130, id="each fills a rank exactly"),
        pytest.param([51] * 300, id="no two fit one rank"),
        pytest.param([100], id="one sample"),
        pytest.param([1], id="one token"),
        pytest.param([100, *[1] * 3000], id="one long, thousands of short"),
        pytest.param([37, 63] * 64, id="memory is full to the last token"),
        pytest.param([33, 33, 33] * 64, id="memory is 99 % full"),
        pytest.param([97, 3, 60, 38] * 50, id="fits only if paired well"),
    ],
)
def test_traps(lengths: list[int], num_ranks: int) -> None:
    """Batches that broke planners before: each gets a valid plan, at any number of ranks."""
    cost = small_cost(100, (2, 4, 8, 16, 32, 64))
    plan = Planner(cost, num_ranks).plan(lengths)
    assert problems(plan, lengths, num_ranks, cost) == []


@pytest.mark.parametrize("degree", [2, 4, 8, 16, 32, 64])
def test_a_sample_may_fill_its_group_exactly(degree: int) -> None:
    """Memory is compared in whole tokens: a sample as long as the memory of a degree fits it."""
    cost = small_cost(100, (2, 4, 8, 16, 32, 64))
    lengths = [100 * degree] * 3 + [100 * d + 1 for d in (1, 2, 4, 8) if d < degree]
    assert problems(Planner(cost, 64).plan(lengths), lengths, 64, cost) == []


def test_as_few_micro_batches_as_memory_allows() -> None:
    """Where micro-batches are dear, memory is filled to 99 %, with larger groups where small ones leave ends."""
    cost = small_cost(100, (2, 4, 8), micro_batch_s=1000.0)
    lengths = [66] * 24  # 99 % of two micro-batches on 8 ranks, but only one sample fits a rank
    assert len(Planner(cost, 8).plan(lengths).micro_batches) == 2


def test_squares_of_long_samples_do_not_overflow() -> None:
    """Lengths whose square needs more than 32 or 64 bits, as numpy integers, cost what they cost."""
    cost = small_cost(10**10, (2, 4), attention_s_per_token2=1e-12)
    lengths = np.array([4 * 10**10, 5 * 10**9, 70_000], dtype=np.int64)
    plan = Planner(cost, 4).plan(lengths.tolist())
    assert plan.seconds >= 1e-12 * float(4 * 10**10) ** 2 / 4


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_numpy_integers_are_lengths(kind: type[np.integer]) -> None:
    """An array gets the plan that a list of the same numbers gets."""
    lengths = [400, 90, 80, 7]
    planner = Planner(small_cost(), 8)
    assert planner.plan(np.array(lengths, dtype=kind)).digest() == planner.plan(lengths).digest()


def test_nothing_to_do() -> None:
    """No samples, no micro-batches."""
    plan = Planner(small_cost(), 8).plan([])
    assert plan.micro_batches == ()
    assert plan.seconds == plan.lower_bound_s == 0


@pytest.mark.parametrize("length", [0, -5, 2.5, 3.0, True, "7", None, 2**41, np.float64(3), float("nan")])
def test_what_is_not_a_length_is_refused(length: object) -> None:
    """The message names the sample, its value, and what to do."""
    with pytest.raises(BadSample, match=r"sample 2 has length .*whole number of tokens.*Drop the sample"):
        Planner(small_cost(), 8).plan([5, 6, length])


def test_a_sample_that_nothing_holds_is_refused() -> None:
    """The message names the sample, its tokens, what fits, and the remedies."""
    with pytest.raises(InfeasibleBatch) as refused:
        Planner(small_cost(16384, (2, 4, 8)), 8).plan([5] * 17 + [262144])
    assert str(refused.value) == (
        "sample 17 has 262144 tokens; even degree 8 holds 131072 (16384 tokens a rank). "
        "Lower the maximum length, add ranks, raise the memory limit, or keep less in memory "
        "(HeteroConfig.activation_policies, or gradient checkpointing with keep_exchanged=False)."
    )


def test_max_degree_is_kept() -> None:
    """No group is larger, and a sample that would need one is refused."""
    planner = Planner(small_cost(), 8, max_degree=2)
    assert max(group.degree for group in planner.plan([200, 150, 90]).groups) <= 2
    with pytest.raises(InfeasibleBatch, match="even degree 2 holds 200"):
        planner.plan([201])


@pytest.mark.parametrize(
    "changed",
    [
        {"num_ranks": 0},
        {"num_ranks": 2.5},
        {"max_degree": 0},
        {"max_degree": "2"},
        {"solver": "cplex"},
        {"mip_backend": "scip"},
        {"mip_time_limit_s": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, object]) -> None:
    """Each names the setting and its value."""
    with pytest.raises(ConfigError, match=next(iter(changed))):
        replace(Planner(small_cost(), 8), **changed)


@pytest.mark.parametrize("degree", [0, 3, 16, "2"])
def test_a_degree_that_is_not_offered_is_refused(degree: Any) -> None:
    """The message names it and those that are."""
    with pytest.raises(ConfigError, match=f"Degree {degree!r} is not offered on 8 ranks: choose one of 1, 2, 4, 8"):
        Planner(small_cost(), 8).static([5, 6], degree)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared lengths and cost models")
@pytest.mark.parametrize("name", ["wikipedia", "prolong", "github", "wlbllm"])
def test_real_lengths_on_64_ranks_are_near_the_bound(name: str) -> None:
    """512 real samples of at most 192K tokens: 15 % above the bound at worst, and far below static."""
    cost = CostModel.load(SHARED / "data" / "costs" / "gpt-7b_64xa100_192k.json")
    lengths = np.loadtxt(SHARED / "data" / "lengths" / f"{name}.txt", dtype=np.int64)
    for seed in range(2):
        batch = np.random.default_rng(seed).choice(lengths[lengths <= 196_608], 512).tolist()
        plan: Plan = Planner(cost, 64).plan(batch)
        assert problems(plan, batch, 64, cost) == []
        assert plan.gap < 0.15
