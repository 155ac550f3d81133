"""A sample with images is planned as the text that takes as long; one without, as itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from hf_hetero.costs import CostModel
from hf_hetero.costs.planned_lengths import planned_lengths
from hf_hetero.planner import Planner

COST = CostModel.load("llama-8b_8xh100_nvlink")
MOST = 1_000_000


@pytest.mark.parametrize(("tokens", "extra"), [*product((1, 300, 20_000), (0.4, 900.0, 12_345.6))])
@pytest.mark.parametrize("attention", [0.0, 1e-12, COST.attention_s_per_token2])
def test_it_takes_as_long(tokens: int, extra: float, attention: float) -> None:
    """Its seconds are those of the tokens, and of the tower's linear work, to half a token."""
    cost = replace(COST, attention_s_per_token2=attention, activation_policies={})
    [alike] = planned_lengths(cost, MOST, [tokens], [extra])
    expected = attention * tokens**2 + cost.linear_s_per_token * (tokens + extra)
    assert cost.work(max(alike - 0.5, tokens), 1) <= expected * (1 + 1e-12)
    assert expected <= cost.work(alike + 0.5, 1) * (1 + 1e-12)
    if not attention:
        assert alike == round(tokens + extra)


def test_without_images_it_is_itself() -> None:
    """No tower token changes no length."""
    assert planned_lengths(COST, MOST, [5, 7, 2], [0.0, 0.0, 0.0]) == (5, 7, 2)
    assert planned_lengths(COST, MOST, [], []) == ()


def test_no_sample_is_refused_for_its_images() -> None:
    """It is planned as no more than the largest group holds; one whose tokens alone are more, as these."""
    planner = Planner(COST, num_ranks=8)
    most = COST.leanest.capacity_tokens * planner.degrees[-1]
    lengths = planned_lengths(COST, most, [100, most, most + 1], [1e9, 1e9, 1e9])
    assert lengths == (most, most, most + 1)
    assert planner.plan(lengths[:2]).num_samples == 2


def test_a_machine_without_linear_work() -> None:
    """Where tokens take no time but to attend, there is nothing to compare a tower with."""
    cost = replace(COST, linear_s_per_token=0.0, activation_policies={})
    assert planned_lengths(cost, MOST, [5], [100.0]) == (5,)
