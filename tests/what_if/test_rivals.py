"""Rivals are priced alike, and set as for a whole run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from costs.test_cost_model import a_cost_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero import CostModel, HeteroError, Plan, Planner
from hf_hetero.costs import ActivationPolicy
from hf_hetero.what_if import rivals as rivals_module
from hf_hetero.what_if.one_degree import first_come
from hf_hetero.what_if.rivals import Rivals
from hf_hetero.what_if.simulate import simulate
from hf_hetero.what_if.sources import global_batches, read_source

COST = a_cost_model()
"""A rank holds 100 tokens."""
POLICIES = {"recompute": ActivationPolicy(COST.activation_bytes_per_token / 2, 1e-3, 2.0)}


@pytest.mark.parametrize("cost", [COST, replace(COST, activation_policies=POLICIES)], ids=["plain", "policies"])
@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 390), min_size=1, max_size=30), num_ranks=st.sampled_from([4, 5, 8]))
def test_every_rival_keeps_the_laws(lengths: list[int], num_ranks: int, cost: CostModel) -> None:
    """All samples once, memory kept, padding never shortens, and none is below the certified bound."""
    planner = Planner(cost, num_ranks)
    bound_s = planner.plan(lengths).lower_bound_s
    ways = set[str]()
    for priced in Rivals(planner, 390).plans(lengths):
        ways.add(priced.way)
        assert sorted(s for group in priced.plan.groups for s in group.samples) == list(range(len(lengths)))
        assert all(padded >= length for padded, length in zip(priced.lengths, lengths, strict=True))
        for group in priced.plan.groups:
            tokens = sum(priced.lengths[sample] for sample in group.samples)
            assert tokens <= group.degree * priced.cost.capacity_tokens
        assert priced.cost.plan_seconds(priced.plan, priced.lengths) >= bound_s * (1 - 1e-9)
    assert ways >= {"dynamic-cp", "wlb-llm", "verl", "first-come", "padded-rows"}


def test_settings_hold_the_context() -> None:
    """Degrees, and limits of tokens a rank, are those with which a sample as long as the context could be held."""
    settings_of: dict[str, list[int]] = {}
    for priced in Rivals(Planner(COST, 4), 190).plans([10] * 9):
        settings_of.setdefault(priced.way, []).append(priced.setting)
    assert settings_of["verl"] == settings_of["wlb-llm"] == [2, 4]
    assert settings_of["first-come"] == settings_of["padded-rows"] == [2]
    assert settings_of["megatron"] == [100, 50]


def test_the_best_setting_of_a_run_is_taken() -> None:
    """A rival's seconds are the least over the settings of the sum over the steps, not the sum of the least."""
    batches, planner = [[90, 10, 10, 10], [25] * 8, [50, 50, 3, 3]], Planner(COST, 4)
    by_setting: dict[tuple[str, int], float] = {}
    for lengths in batches:
        for priced in Rivals(planner, 100).plans(lengths):
            key = priced.way, priced.setting
            seconds = priced.cost.plan_seconds(priced.plan, priced.lengths)
            by_setting[key] = by_setting.get(key, 0.0) + seconds
    result = simulate(batches, planner, 100)
    for way in ("megatron", "verl", "wlb-llm", "first-come", "padded-rows", "dynamic-cp"):
        fewest = min(seconds for (name, _), seconds in by_setting.items() if name == way)
        assert sum(result.ways[way].seconds) == pytest.approx(fewest)
    assert result.ways["megatron"].note.startswith("as released, ")
    assert result.ways["dynamic-cp"].note.startswith("tuned by us")


def test_the_tuned_line_is_the_strongest_of_its_kind() -> None:
    """For each batch, what is tuned is no slower than the release at any limit, and for some batches it is faster."""
    faster = list[bool]()
    for cost, mix, num_ranks, context in (
        ("gpt-7b_64xa100_192k", "wiki-192k", 64, 90_000),
        ("llama-8b_8xa100_pcie", "github", 8, 32_768),
    ):
        (lengths,) = global_batches(read_source(mix, 128, max_tokens=context), 128, 1)
        seconds: dict[str, list[float]] = {}
        for priced in Rivals(Planner(CostModel.load(cost), num_ranks), context).plans(lengths):
            seconds.setdefault(priced.way, []).append(priced.cost.plan_seconds(priced.plan, lengths))
        assert seconds["dynamic-cp"][0] <= min(seconds["megatron"])
        faster.append(seconds["dynamic-cp"][0] < min(seconds["megatron"]))
    assert faster == [False, True]


def test_a_rival_that_drops_a_sample_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the seconds of a plan without one of the samples are not taken for those of the step."""

    def without_the_last(lengths: list[int], cost: CostModel, num_ranks: int, degree: int) -> Plan:
        return first_come(lengths[:-1], cost, num_ranks, degree)

    simulate([[50, 40, 30]], Planner(COST, 4))
    monkeypatch.setattr(rivals_module, "first_come", without_the_last)
    with pytest.raises(HeteroError, match="A plan of 2 samples is no plan of a step of 3"):
        simulate([[50, 40, 30]], Planner(COST, 4))
