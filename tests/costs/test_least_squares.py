"""The fit is the best of all that are nowhere negative, and no measurement that is far off moves it far."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_hetero.costs.least_squares import nonnegative_least_squares, robust_nonnegative_least_squares


def by_trying_all(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The best of the plain fits of every set of columns whose entries are all 0 or more."""
    num_columns = left.shape[1]
    best = np.zeros(num_columns)
    for size in range(1, num_columns + 1):
        for columns in itertools.combinations(range(num_columns), size):
            x = np.zeros(num_columns)
            x[list(columns)] = np.linalg.lstsq(left[:, columns], right, rcond=None)[0]
            if (x >= 0).all() and np.linalg.norm(left @ x - right) < np.linalg.norm(left @ best - right):
                best = x
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_other_fit_is_better(seed: int) -> None:
    """The residual is that of the best of all sets of columns, also where columns differ by many powers of ten."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(12, 5)) + rng.integers(0, 2)
    left *= 10.0 ** rng.integers(-9, 3, size=5)
    right = rng.normal(size=12) + rng.integers(0, 2)
    found = nonnegative_least_squares(left, right)
    assert (found >= 0).all()
    expected = np.linalg.norm(left @ by_trying_all(left, right) - right)
    assert np.linalg.norm(left @ found - right) == pytest.approx(expected, rel=1e-9)


def test_a_plain_fit_would_be_negative() -> None:
    """A negative control: of the problems above, many have a plain solution below 0."""
    plain = [
        np.linalg.lstsq(np.random.default_rng(s).normal(size=(12, 5)), np.ones(12), rcond=None)[0] for s in range(40)
    ]
    assert sum((x < 0).any() for x in plain) > 20


def test_nothing_to_fit() -> None:
    """A column of zeros gets 0, and so does all where nothing was measured but 0."""
    left = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert nonnegative_least_squares(left, np.array([3.0, 6.0])) == pytest.approx([3.0, 0.0])
    assert nonnegative_least_squares(left, np.zeros(2)) == pytest.approx([0.0, 0.0])


def test_outliers_count_less() -> None:
    """With a tenth of the measurements far too long, the truth is found within 2 %; a plain fit is off by more."""
    rng = np.random.default_rng(0)
    left = rng.uniform(0.1, 1.0, size=(60, 3))
    truth = np.array([2.0, 0.5, 1.0])
    right = left @ truth * rng.normal(1.0, 0.005, size=60)
    right[::10] *= 4
    assert robust_nonnegative_least_squares(left, right) == pytest.approx(truth, rel=0.02)
    assert nonnegative_least_squares(left, right) != pytest.approx(truth, rel=0.2)
