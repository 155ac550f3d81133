"""What a cost model becomes once memory has run out: the same machine, with room for less than a rank held then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

from hf_hetero.costs.cost_model import CostModel
from hf_hetero.costs.crossings import Crossings
from hf_hetero.plan import Group, Plan

SHARE = 0.9
"""Of what a rank held when its memory ran out, this much is tried next."""


def activation_bytes(cost: CostModel, group: Group, tokens: float, lengths: Sequence[int]) -> float:
    """Predict the bytes of a rank's activations.

    Args:
        cost: of the machine.
        group: that the rank is in; one by a policy that the cost model lacks counts as one without.
        tokens: that the rank holds.
        lengths: tokens of each sample of the global batch.
    """
    model = cost.by_activations.get(group.activations, cost)
    held = tokens * model.activation_bytes_per_token
    if group.method == "gather" and group.degree > 1 and cost.kv_bytes_per_token is not None:
        crossings = Crossings(**{item.name: getattr(model, item.name) for item in fields(Crossings)})
        held += crossings.bytes_gathered(group, lengths)
    return held


def room_left(
    cost: CostModel, plan: Plan, group: Group, tokens: int, lengths: Sequence[int], longest: int | None = None
) -> int:
    """Return the bytes for activations with which to go on after a rank of a plan's group ran out of memory.

    They are less than the rank held, and than there were; but no less than the longest sample needs, if that is less.
    A rank that held no token says nothing of what tokens take.

    Args:
        cost, group, tokens, lengths: as of `activation_bytes`.
        plan: of the step.
        longest: tokens that must have room in the largest group; None: those of the longest sample.
    """
    room = cost.memory_bytes_per_rank - cost.model_state_bytes_per_rank
    held = min(room, activation_bytes(cost, group, tokens, lengths) if tokens else room)
    tokens_needed = math.ceil((longest or max(lengths)) / max(cost.degrees(plan.num_ranks)))
    needed = math.ceil(tokens_needed * cost.leanest.activation_bytes_per_token)
    return max(int(SHARE * held), needed) if needed < held else int(SHARE * held)


def with_room(cost: CostModel, room_bytes: float) -> CostModel:
    """Return the same machine with so many bytes for activations, marked as one whose memory ran out.

    Raises:
        ConfigError: they hold no token.
    """
    return replace(cost, memory_bytes_per_rank=cost.model_state_bytes_per_rank + room_bytes, ran_out=1)


def no_more_than(cost: CostModel, kept: CostModel) -> CostModel:
    """Return a cost model that holds no more tokens on a rank than another, whose memory ran out, does."""
    if cost.capacity_tokens <= kept.capacity_tokens:
        return cost
    return with_room(cost, math.ceil(kept.capacity_tokens * cost.activation_bytes_per_token))


def fits(cost: CostModel, plan: Plan, lengths: Sequence[int]) -> bool:
    """Return whether each group of a plan has room, as the planner counts it."""
    room = {name: m.memory_bytes_per_rank - m.model_state_bytes_per_rank for name, m in cost.by_activations.items()}

    def has_room(group: Group) -> bool:
        tokens = sum(lengths[sample] for sample in group.samples) / group.degree
        return not tokens or (
            group.activations in room
            and activation_bytes(cost, group, tokens, lengths) <= room[group.activations] * (1 + 1e-9)
        )

    return all(has_room(group) for group in plan.groups)
