"""Whether a model has a loss of its routers, and whether it is the one whose parts can be added.

It is if the model's own function gives for random logits what this package's does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from hf_hetero.checks import overrides
from hf_hetero.model.experts.router_loss import COEFFICIENT, balance_of, choices_of, num_experts_of

FUNCTION = "load_balancing_loss_func"
"""What transformers calls it, in the module of each model that has it."""
CLOSE = 1e-5
"""Relative; it is computed in fp32."""
NUM_TOKENS, NUM_LAYERS = 13, 2
REMEDY = (
    "Set config.output_router_logits = False, or under TRL, whose trainer sets that itself, "
    "SFTConfig(router_aux_loss_coef=0.0)."
)


def coefficient_of(base: Any) -> float:
    """Return the factor of this loss in the whole; 0 where there is none."""
    text = base.config.get_text_config(decoder=True)
    return float(getattr(base, COEFFICIENT, None) or getattr(text, COEFFICIENT, None) or 0.0)


def is_wanted(base: Any) -> bool:
    """Return whether a transformers model adds a loss of its routers, of the form that is known, to its own."""
    return _has_one(base) and bool(coefficient_of(base))


def _has_one(base: Any) -> bool:
    text = base.config.get_text_config(decoder=True)
    return bool(getattr(text, "output_router_logits", False)) and overrides.calls(type(base).forward, FUNCTION)


def problems(base: Any) -> Iterator[str]:
    """Give the reasons to refuse a model for the loss of its routers, in words."""
    if not is_wanted(base):
        return
    num_experts, num_used = num_experts_of(base)
    own: Any = getattr(sys.modules[type(base).__module__], FUNCTION, None)
    if not num_experts or not num_used or own is None:
        yield f"the loss of its routers is computed in another way than transformers' {FUNCTION} does. {REMEDY}"
        return
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(NUM_TOKENS, num_experts, generator=generator) for _ in range(NUM_LAYERS))
    ours = balance_of(choices_of(layers, NUM_TOKENS, num_used), num_used).loss.item()
    try:
        theirs = float(own(layers, num_experts, num_used))
    except Exception as error:
        yield f"the loss of its routers could not be tried ({type(error).__name__}: {error}). {REMEDY}"
        return
    # "not <=", so that nan does not pass
    if not abs(theirs - ours) <= CLOSE * abs(ours):
        yield (
            f"the loss of its routers is {theirs:.6g} for random logits where that of Switch Transformers is "
            f"{ours:.6g}, so its parts are not known. {REMEDY}"
        )


def trainer_problems(trainer: Any, base: Any) -> Iterator[str]:
    """Give the reason to refuse a trainer whose checkpoints would cut off the gradient of this loss, in words.

    Args:
        trainer: with its arguments.
        base: the transformers model.
    """
    # releases of transformers before 5.23 know only the first names
    old, new = "gradient_checkpointing", "activation_checkpointing"
    name = new if hasattr(trainer.args, new) else old
    options = getattr(trainer.args, f"{name}_kwargs", None) or {}
    if getattr(trainer.args, name) and options.get("use_reentrant") and is_wanted(base):
        yield (
            "reentrant checkpoints cut off the gradient of the loss of its routers: use "
            f'{name}_kwargs={{"use_reentrant": False}}, or no such loss. {REMEDY}'
        )
