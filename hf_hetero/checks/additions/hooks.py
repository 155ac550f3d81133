"""Hooks on gradients are called once a micro-batch, of which a step has as many as its plan: they must add up.

    hook(a) + hook(b) = hook(a + b)

Scaling and masking do. Clipping does not, nor does an optimizer that steps in a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

LIBRARIES = frozenset({"torch", "accelerate", "transformers", "peft", "hf_hetero"})
"""Whose hooks are known to go with plans."""
CLOSE = 1e-3


def problems(model: torch.nn.Module) -> Iterator[str]:
    """Yield, in words, why a model's hooks on gradients are refused."""
    weights = dict(model.named_parameters())
    if name := next((name for name, p in weights.items() if _own(getattr(p, "_post_accumulate_grad_hooks", None))), ""):
        yield (
            f"{name} has a hook of its own for its gradient (register_post_accumulate_grad_hook), which is called in "
            "each micro-batch, before the gradient of the step is there. Do it in a callback's on_pre_optimizer_step."
        )
    if name := next((name for name, p in weights.items() if not _add_up(p)), ""):
        yield (
            f"{name} has a hook that changes its gradient (register_hook), and the sum of two changed ones adds up "
            "otherwise than their changed sum: a step has as many gradients to change as its plan. Do it in a "
            "callback's on_pre_optimizer_step."
        )


def is_own(function: Any) -> bool:
    """Return whether a function is somebody's own, and none of a library that goes with plans."""
    function = getattr(function, "func", function)  # of a partial
    module: Any = getattr(function, "__module__", None) or type(function).__module__
    return str(module).split(".")[0] not in LIBRARIES


def _own(hooks: Any) -> list[Callable[..., Any]]:
    """Return those hooks that are somebody's own."""
    return [hook for hook in (hooks or {}).values() if is_own(hook)]


def _add_up(weight: torch.nn.Parameter) -> bool:
    """Return whether each hook of a weight gives of a sum of gradients the sum of what it gives of each."""
    own = _own(weight._backward_hooks)  # pyright: ignore[reportPrivateUsage]
    if not own or weight.is_meta or isinstance(weight, DTensor):
        return True
    generator = torch.Generator().manual_seed(0)
    # of all sizes, because nobody knows where a hook clips
    sizes = 10.0 ** (12 * torch.rand(weight.shape, generator=generator) - 9)
    first, second = ((sizes * torch.randn(weight.shape, generator=generator)).to(weight) for _ in range(2))
    for hook in own:
        with torch.no_grad():
            one, two, both = (_changed(hook, gradient) for gradient in (first, second, first + second))
        if bool(((one + two - both).abs() > CLOSE * (one.abs() + two.abs() + both.abs())).any()):
            return False
    return True


def _changed(hook: Callable[..., Any], gradient: torch.Tensor) -> torch.Tensor:
    """Return what a hook makes of a gradient; most that give nothing only look."""
    changed = hook(gradient.clone())
    return gradient if changed is None else changed
