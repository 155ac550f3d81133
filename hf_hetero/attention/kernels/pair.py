"""A pair is made of two raw functions of a library, which give and take a log-sum-exp, and of how they are called.

torch's own kernel and flash-attn's versions differ in names and in a few habits only: their log-sum-exp is (H, Tq),
their heads are multiples of eight, and a window is two numbers of keys, to the left and to the right of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.attention.kernels.contract import HALF, Kernel, Scores, Segments
from hf_hetero.attention.kernels.signatures import misfit

Tensors = tuple[torch.Tensor, ...]
Offer = Kernel | str
"""A kernel; or why there is none, in words for the log or for an error."""

MULTIPLE = 8  # elements of a head that the kernels want; shorter heads are filled up with zeros


@dataclass(frozen=True, slots=True)
class Calls:
    """`Calls` say how a library's two functions are called: by keyword, so that no order is taken for granted.

    Args:
        forward: (q, k, v, segments, scores) -> keywords. The function's first two results are out and lse.
        backward: (grad_out, (q, k, v, out, lse), (dq, dk, dv) to write to, segments, scores) -> keywords.
        returns_gradients: whether the gradients are the backward's first three results; else it writes them, and
            there is something to write to.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, Scores], dict[str, Any]]
    backward: Callable[[torch.Tensor, Tensors, Tensors, Segments, Scores], dict[str, Any]]
    returns_gradients: bool = False

    def misfit(self, forward: Any, backward: Any) -> str | None:
        """Return in words which of two functions does not take its call, and why; None if both do."""
        nothing = torch.empty(0)
        segments, scores = Segments((), (), nothing, nothing, 0, 0), Scores(1.0)
        reason = misfit(forward, self.forward(nothing, nothing, nothing, segments, scores))
        if reason is not None:
            return f"its forward does not take this package's call: {reason}"
        reason = misfit(backward, self.backward(nothing, (nothing,) * 5, (nothing,) * 3, segments, scores))
        return None if reason is None else f"its backward does not take this package's call: {reason}"


def pair(name: str, features: frozenset[str], calls: Calls, forward: Any, backward: Any) -> Kernel:
    """Make a kernel of two functions, which fills up short heads and turns the log-sum-exp round."""

    def pair_forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = calls.forward(_filled(q), _filled(k), _filled(v), segments, scores)
        out, lse, *_ = forward(**call)
        return out[..., : v.shape[-1]], lse.transpose(0, 1)

    def pair_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        saved = (*(_filled(x) for x in (q, k, v, out)), lse.transpose(0, 1).contiguous())
        grads: Tensors = () if calls.returns_gradients else tuple(torch.empty_like(x) for x in saved[:3])
        results = backward(**calls.backward(_filled(grad_out), saved, grads, segments, scores))
        if calls.returns_gradients:
            grads = tuple(results[:3])
        dq, dk, dv = (x[..., : like.shape[-1]] for x, like in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv

    return Kernel(name, "cuda", HALF, features, pair_forward, pair_backward)


def _filled(x: torch.Tensor) -> torch.Tensor:
    """Fill up a tensor's heads with zeros, which add nothing to q @ k, and to the output only zeros to cut off."""
    missing = -x.shape[-1] % MULTIPLE
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def window_of(segments: Segments, scores: Scores) -> tuple[int, int] | None:
    """Return the keys that a query meets to its left and right, aligned at the last; None: the mask says it all."""
    if not segments.causal or scores.window is None:
        return None
    return scores.window - 1, 0
