"""Trials cover what a planner asks about, and the steps that hold them are plans that training takes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hf_hetero.profile.trials import Trial, TrialStep, in_steps, trials


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("tokens", "longest"), [(6144, 8192), (300, 300), (4096, 65536), (40, 20)])
def test_every_trial_is_timed_once(num_ranks: int, tokens: int, longest: int) -> None:
    """All steps hold equally many samples; their plans time each trial once, on all ranks, whatever the order."""
    degrees = [degree for degree in (1, 2, 4, 8) if degree <= num_ranks]
    chosen = trials(degrees, tokens, longest, ["recompute"], ["gather", "ring"])
    assert {trial.degree for trial in chosen} == set(degrees)
    steps = in_steps(chosen, num_ranks)
    assert Counter(trial for step in steps for trial in step.trials) == Counter(chosen)
    assert len({len(step.lengths()) for step in steps}) == 1
    assert not len(steps[0].lengths()) % num_ranks
    for step in steps:
        lengths = list(step.lengths())
        random.Random(0).shuffle(lengths)
        plan = step.plan(lengths)
        used = Counter(sample for m in plan.micro_batches for group in m.groups for sample in group.samples)
        assert used == Counter(range(len(lengths)))
        for trial, micro_batch in zip(step.trials, plan.micro_batches, strict=False):
            assert micro_batch.degrees == (trial.degree,) * (num_ranks // trial.degree)
            for group in micro_batch.groups:
                assert sorted(lengths[sample] for sample in group.samples) == sorted(trial.lengths)
                assert group.activations == trial.activations
                assert group.method == trial.method


def test_limits() -> None:
    """No group holds more than its ranks do, no sample is longer than asked for, and both limits are reached."""
    for trial in trials([1, 2], 1000, 1500):
        assert sum(trial.lengths) <= 1000 * trial.degree
        assert max(trial.lengths) <= 1500
    lengths = {trial.lengths for trial in trials([1, 2], 1000, 1500)}
    assert {(1000,), (1500,)} <= lengths
    assert {len(pack) for pack in lengths} >= {1, 4, 16}


def test_steps_can_be_told_apart() -> None:
    """Two steps of the same trials have other samples, so that each has its own plan."""
    first, second = in_steps([Trial(1, (64,)), Trial(1, (64,))], 1)
    assert isinstance(first, TrialStep)
    assert sorted(first.lengths()) != sorted(second.lengths())
