"""This module fits times that cannot be negative to measurements of which some are wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SPREADS_IN_MEDIAN = 1.4826
"""Standard deviations of a normal distribution in the median of its absolute values."""
NUM_WEIGHINGS = 8
"""Times that the weights of outliers are found anew; they settle within a few."""
USUAL_SPREADS = 2.0
"""Residuals beyond so many typical ones count less: a process that something disturbs is late, sometimes by far."""


def nonnegative_least_squares(left: Floats, right: Floats) -> Floats:
    """Return the x >= 0 for which |left @ x - right| is least.

    The active-set method of Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23: the entry that
    promises most is let go from 0, the free ones are solved for, and those that would be negative are held at 0 again.

    Args:
        left: shape (num_rows, num_columns).
        right: shape (num_rows,).
    """
    # columns may differ by many powers of ten, which a tolerance could not tell from noise
    scale = np.sqrt((left**2).sum(axis=0))
    scale[scale == 0] = 1.0
    a = left / scale
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.abs(right).max(initial=0.0))) * len(right)
    for _ in range(10 * a.shape[1]):
        promise = np.where(free, -np.inf, a.T @ (right - a @ x))
        if free.all() or promise.max() <= tolerance:
            break
        free[int(promise.argmax())] = True
        while free.any():
            solved = np.zeros_like(x)
            solved[free] = np.linalg.lstsq(a[:, free], right, rcond=None)[0]
            negative = free & (solved <= 0)
            if not negative.any():
                x = solved
                break
            # go as far towards the solution as all stay at 0 or above; who arrives there is held
            steps = x[negative] / (x[negative] - solved[negative])
            x = x + float(steps.min()) * (solved - x)
            free &= x > 1e-15 * max(1.0, float(x.max()))
            x[~free] = 0.0
    return x / scale


def robust_nonnegative_least_squares(left: Floats, right: Floats, num_exact: int = 0) -> Floats:
    """Fit as `nonnegative_least_squares`, but let rows count less that all others contradict (Huber's weights).

    Args:
        left, right: the rows.
        num_exact: rows at the end that are no measurements and always count in full.
    """
    num_measured = len(right) - num_exact
    weights = np.ones(len(right))
    x = nonnegative_least_squares(left, right)
    for _ in range(NUM_WEIGHINGS):
        residuals = np.abs(left @ x - right)[:num_measured]
        usual = USUAL_SPREADS * SPREADS_IN_MEDIAN * float(np.median(residuals))
        if usual <= 0:
            break
        weights[:num_measured] = np.sqrt(np.minimum(1.0, usual / np.maximum(residuals, 1e-300)))
        x = nonnegative_least_squares(left * weights[:, None], right * weights)
    return x
