"""A sample with images is planned as the text that would take as long: its planned length.

A planner knows lengths only. What a tower computes for a sample's images is linear work beside that of its tokens, so
the sample is given the length L for which, at degree 1,

    attention L^2 + linear L = attention n^2 + linear (n + e)

where n are its tokens and e its tower tokens. The same L is held against the memory, in which a tower's activations
want room, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from hf_hetero.costs.cost_model import CostModel


def planned_lengths(
    cost: CostModel, most: int, lengths: Sequence[int], tower_tokens: Sequence[float]
) -> tuple[int, ...]:
    """Return the planned length of each sample: no less than its tokens, whole, and exact to half a token.

    Args:
        cost: of the machine; degree 1 is priced by what a group does that does nothing to hold more tokens.
        most: tokens that the largest group holds. A sample is planned as no more than these for its images' sake: it
            would be refused for them, although only its tokens have to fit.
        lengths: tokens of each sample.
        tower_tokens: of each sample.
    """
    return tuple(_planned(cost, most, *sample) for sample in zip(lengths, tower_tokens, strict=True))


def _planned(cost: CostModel, most: int, tokens: int, extra: float) -> int:
    """Return the planned length of a sample of so many tokens and tower tokens."""
    attention, linear = cost.attention_s_per_token2, cost.linear_s_per_token
    if extra <= 0 or not linear:
        return tokens
    work = attention * tokens * tokens + linear * (tokens + extra)
    # the root of a quadratic, in the form that loses no digits where attention takes little
    alike = 2 * work / (linear + sqrt(linear * linear + 4 * attention * work))
    return max(tokens, min(round(alike), most))
