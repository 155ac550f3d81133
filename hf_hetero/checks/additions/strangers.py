"""Parts of a model that are no library's are tried in place: two samples in one pack must give what each gives alone.

A model's type says nothing about a module that somebody has put into it, a method or a hook of theirs. Most look at one
token at a time, as a norm does. One that looks at its neighbours would see those of other samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from hf_hetero.checks.additions.hooks import is_own
from hf_hetero.errors import UnsupportedModel

logger = logging.getLogger(__name__)

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CLOSE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference, relative, that is rounding; 1e-3 for all other types."""

Logits = Callable[[Sequence[int]], torch.Tensor]
"""Which of two samples, packed -> their logits, of shape (num_tokens, vocab_size)."""


def problems(model: torch.nn.Module) -> list[str]:
    """Return, in words, why parts of a model are refused whoever made them: they do not look at samples one by one."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            found.append(
                f"{name} ({type(module).__name__}) takes mean and variance of a batch, and what is in one is up to "
                "the plan; use a norm of each token, such as LayerNorm."
            )
        elif type(module).__name__ == "_SpectralNorm":
            found.append(f"{name} (spectral_norm) changes in each forward pass, and a step has several; remove it.")
    return found[:1]


def parts_of(model: torch.nn.Module) -> list[str]:
    """Return the names of a model's innermost parts that are somebody's own: modules, methods, hooks on them."""
    return [name for name, module in model.named_modules() if name and _is_strange(module)]


def _is_strange(module: torch.nn.Module) -> bool:
    """Return whether what a module computes is somebody's own."""
    forward = vars(module).get("forward", type(module).forward)
    hooks = (hook for name in HOOKS for hook in vars(module)[name].values())
    return is_own(type(module)) or is_own(forward) or any(map(is_own, hooks))


def check(model: torch.nn.Module, logits: Logits, dtype: torch.dtype) -> None:
    """Refuse a model with parts of somebody's own that see what is packed beside a sample; without any, do nothing.

    Args:
        model: as it is, with all its weights.
        logits: of the model, under a plan.
        dtype: that it computes in.

    Raises:
        UnsupportedModel: with the parts, and what the trial showed.
    """
    if not (parts := parts_of(model)):
        return
    what = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
    if any(p.is_meta or isinstance(p, DTensor) for p in model.parameters()):
        logger.warning("Parts of the model are your own (%s), and cannot be tried where weights are sharded.", what)
        return
    try:
        with _undisturbed(model):
            alone = torch.cat([logits([number]) for number in (0, 1)]).double()
            packed = logits([0, 1]).double()
    except Exception as error:
        logger.warning("Parts of the model are your own (%s), and could not be tried: %r.", what, error)
        return
    # "not <=", so that nan does not pass
    if not float((packed - alone).abs().max()) <= CLOSE.get(dtype, 1e-3) * float(alone.abs().max()):
        raise UnsupportedModel(
            f"Parts of the model are no library's ({what}), and two samples that are packed give other logits than "
            "each of them alone: a part looks at more than the token it is given. Only attention may, through "
            "transformers' interface. Let it look at one token at a time, or use plain Trainer."
        )


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Any:
    """Leave modes, gradients and random numbers as they were; nothing is drawn at random meanwhile."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
