"""What layers that carry state change in an estimate: fewer layers attend, and tokens of other ranks cost time.

An estimate takes every layer for one that attends. A layer with state has weights and no pairs of tokens; of a sample
that is shared, a rank fetches hidden states of other ranks. Where ranks share its heads, as many outputs go back, and
the work is divided; else the rank goes over these tokens as well as over its own.

What is kept of them grows with the degree, and a cost model has one number for the bytes of a token. So each token is
counted with as many others as a rank of the largest group holds: `HeteroConfig.max_degree` makes room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_hetero.costs import CostModel
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.state_layers.cuts import cut_of
from hf_hetero.state_layers.families import family_of, mixers_of, window_of

WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mlp", "moe", "mamba"})
DEGREES = tuple(2**power for power in range(1, 11))
WEIGHTS_A_STATE = 3
"""A number of the state costs a token as much as so many weights: it decays, takes in, and is read, in 6 operations."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """A `StateShape` is what of a model's layers with state decides their cost.

    Args:
        num_mixers: layers that carry state further than a few tokens.
        attending: share of all layers that attend.
        weights: of these mixers.
        numbers: that their states hold.
        widths: of what their linear layers give, all together.
        by_heads: degrees at which ranks share all of these mixers by heads.
    """

    num_mixers: int
    attending: float
    weights: int
    numbers: int
    widths: int
    by_heads: tuple[int, ...] = ()


def state_shape(model: torch.nn.Module, config: Any) -> StateShape | None:
    """Read the shape of a model's layers with state; None for a model without.

    Args:
        model: of transformers.
        config: of its text part.
    """
    mixers = list(mixers_of(model))
    if not mixers:
        return None
    far = [mixer for mixer in mixers if window_of(mixer) is None]
    kinds: list[str] = getattr(config, "layer_types", None) or []
    attending = sum(kind not in WITHOUT_ATTENTION for kind in kinds) if kinds else config.num_hidden_layers
    return StateShape(
        num_mixers=len(far),
        attending=attending / config.num_hidden_layers,
        weights=sum(p.numel() for mixer in far for p in mixer.parameters()),
        numbers=sum(numbers_of(mixer) for mixer in far),
        widths=sum(m.out_features for mixer in far for m in mixer.modules() if isinstance(m, torch.nn.Linear)),
        by_heads=tuple(degree for degree in DEGREES if all(cut_of(mixer, degree) is not None for mixer in far)),
    )


def numbers_of(mixer: torch.nn.Module) -> int:
    """Count the numbers that a mixer's state holds."""
    family = family_of(mixer)
    assert family is not None
    return math.prod(int(getattr(mixer, name)) for name in family.state)


def with_state_layers(cost: CostModel, states: StateShape | None, shape: ModelShape) -> CostModel:
    """Correct an estimate for the layers that carry state.

    Args:
        cost: estimated as if all layers attended.
        states: of the model; None: it has none.
        shape: of the model.
    """
    if states is None:
        return cost
    share = states.attending
    more = 1 + WEIGHTS_A_STATE * states.numbers / shape.active_params
    policies = {
        name: replace(
            policy,
            attention_s_per_token2=policy.attention_s_per_token2 * share,
            linear_s_per_token=policy.linear_s_per_token * more,
            activation_bytes_per_token=policy.activation_bytes_per_token
            + most_fetched_bytes(cost, states, replace(shape, checkpointing=True)),
        )
        for name, policy in cost.activation_policies.items()
    }
    # an exchange of hidden states forward and one back, where attention has two of each
    messages = share + states.num_mixers / shape.num_layers / 2
    return replace(
        cost,
        attention_s_per_token2=cost.attention_s_per_token2 * share,
        linear_s_per_token=cost.linear_s_per_token * more,
        all_to_all_bytes_per_token=cost.all_to_all_bytes_per_token * share,
        kv_bytes_per_token=None if cost.kv_bytes_per_token is None else cost.kv_bytes_per_token * share,
        query_bytes_per_token=None if cost.query_bytes_per_token is None else cost.query_bytes_per_token * share,
        all_to_all_latency_s={d: s * messages for d, s in cost.all_to_all_latency_s.items()},
        state_s_per_token=_fetched_s(cost, states, shape),
        activation_bytes_per_token=cost.activation_bytes_per_token + most_fetched_bytes(cost, states, shape),
        activation_policies=policies,
    )


def _fetched_s(cost: CostModel, states: StateShape, shape: ModelShape) -> dict[int, float]:
    """Return the seconds of a token that a rank fetches, by degree: what travels, and mixers that run anew."""
    if not states.num_mixers:
        return {}
    worth = states.weights + WEIGHTS_A_STATE * states.numbers
    again_s = cost.linear_s_per_token * worth / shape.active_params
    passes = 3 if shape.checkpointing and not shape.keeps_exchanged else 2
    num_bytes = passes * states.num_mixers * shape.hidden * shape.element_bytes
    return {
        degree: 2 * num_bytes / speed if degree in states.by_heads else again_s + num_bytes / speed
        for degree, speed in cost.all_to_all_bytes_per_s.items()
    }


def most_fetched_bytes(cost: CostModel, states: StateShape, shape: ModelShape) -> float:
    """Count the bytes that a token brings with it in the offered degree whose ranks keep most of others' tokens."""
    degrees = cost.all_to_all_bytes_per_s
    return max(((degree - 1) * fetched_bytes(states, shape, degree) for degree in degrees), default=0.0)


def fetched_bytes(states: StateShape, shape: ModelShape, degree: int) -> float:
    """Count what all layers keep of a token that a rank fetches.

    That is its hidden state, and, where the mixer is not shared by heads, what the mixer computes of it. With recompute
    that is so in one layer at a time; the others keep what was exchanged, if it is kept.
    """
    if not states.num_mixers:
        return 0.0
    by_heads = degree in states.by_heads
    kept = states.num_mixers * shape.hidden + (0 if by_heads else 2 * states.widths)
    if shape.checkpointing:
        exchanged = states.num_mixers * shape.hidden * (2 if by_heads else 1) if shape.keeps_exchanged else 0
        kept = exchanged + kept / states.num_mixers
    return kept * shape.element_bytes
