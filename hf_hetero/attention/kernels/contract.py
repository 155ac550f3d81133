"""The contract says what a kernel is given and gives back: runs of queries and of keys; output and log-sum-exp.

The log-sum-exp makes attention additive, so one pair of functions, forward and backward, serves whole samples, gathered
keys and blocks of a ring. For one query with scores s over keys of a set A, write

    Z_A = sum of exp(s) over A,    lse_A = log Z_A,    out_A = sum of exp(s) v over A / Z_A.

Forward. Sums over disjoint sets A and B add up, so with Z = Z_A + Z_B

    out = (Z_A out_A + Z_B out_B) / Z = exp(lse_A - lse) out_A + exp(lse_B - lse) out_B,    lse = log(Z_A + Z_B):

exactly attention over all keys (`merge`). No exponent is above 0, so nothing overflows. A sink is one more key, with a
score and without a value (`with_sinks`).

Backward. With weights p = exp(s - lse), and dp = grad_out . v, the gradient of a score is p (dp - grad_out . out), and
those of q, k and v follow from it and p. Other keys enter only by `lse` and `out`, and `out` only by grad_out . out. So
a backward pass over A that is given the merged `out` and `lse` has the gradients that A's keys have among all keys; dq
is the sum over the sets.

Keys ahead. Where tokens of a stretch look at each other, a query meets keys after it beside those of its run: another
set, disjoint from the first, merged in the same way. Counted from the end of the stretch to its beginning, a token
comes after those that it looks ahead to, so that this set, too, is causal runs, which every kernel knows (`Ahead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.errors import UnsupportedModel

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = HALF | {torch.float32, torch.float64}
WINDOW, SOFTCAP, SINKS = "sliding window", "softcap", "attention sinks"
NO_LSE = (
    "Kernel {!r} gives no log-sum-exp, without which tokens of an image cannot look at each other. Install flash-attn, "
    "or let hf_hetero choose the kernel: torch has one of its own."
)


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments are runs of queries with the run of keys that each meets: on the host for loops, on the device too.

    Queries and keys of a tensor are its runs, one after the other. No run is empty.

    Args:
        q_lengths, k_lengths: tokens of each run.
        cu_q, cu_k: where they start, and the end; int32 tensors on the device, shape (R + 1,).
        max_q, max_k: tokens of the longest run; 0 without runs.
        causal: the last query of a run meets all of its keys, the one before it all but the last, and so on; else
            every query of a run meets all of its keys.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool = True

    @classmethod
    def of(
        cls, q_lengths: Sequence[int], k_lengths: Sequence[int], device: torch.device, causal: bool = True
    ) -> Segments:
        """Make segments from the lengths alone."""
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (q_lengths, k_lengths)
        )
        max_q, max_k = max(q_lengths, default=0), max(k_lengths, default=0)
        return cls(tuple(q_lengths), tuple(k_lengths), cu_q, cu_k, max_q, max_k, causal)

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device, causal: bool = True) -> Segments:
        """Make segments of whole samples, each of which meets itself."""
        return cls.of(lengths, lengths, device, causal)


@dataclass(frozen=True, slots=True)
class Ahead:
    """`Ahead` says which queries meet which keys after them, beside those of their runs. No window limits these.

    Args:
        q_rows: of the queries, in the order of the runs; none twice. int64.
        k, v: keys and values in the order of the runs, shapes (Tk, Hk, D) and (Tk, Hk, Dv).
        segments: the runs, causal: what comes later in the sample stands earlier here.
    """

    q_rows: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    segments: Segments


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores say how a layer turns q @ k into weights.

    Args:
        scaling: factor on q @ k.
        window: a token sees itself and the `window - 1` tokens before it; None means all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: one logit a query head that takes part in the softmax and has no value. Shape (H,).
        causal: a token sees none after it. A kernel is told by its segments.
        mutual: the context's stretches of tokens look at each other. A kernel is told by `Ahead`.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    causal: bool = True
    mutual: bool = False

    @property
    def features(self) -> frozenset[str]:
        """Return what a kernel must be able to do."""
        used = {WINDOW: self.window, SOFTCAP: self.softcap, SINKS: self.sinks}
        return frozenset(name for name, value in used.items() if value is not None)

    def without_sinks(self) -> Scores:
        """Return the same scores for a kernel that meets only the keys."""
        return replace(self, sinks=None)

    def of_heads(self, start: int, end: int) -> Scores:
        """Return the same scores for some of the query heads: sinks belong to heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[start:end])


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, Scores], tuple[torch.Tensor, torch.Tensor]]
"""(q, k, v, segments, scores without sinks) -> out, lse. q: (Tq, H, D); k: (Tk, Hk, D); v: (Tk, Hk, Dv), H a
multiple of Hk, Dv equal to D unless `unequal_values`; out: (Tq, H, Dv); lse: (Tq, H), fp32 or wider. Not
differentiable."""

Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(grad_out, q, k, v, out, lse, segments, scores without sinks) -> dq, dk, dv. Out and lse may be merged over more keys
than these; then the gradients are those keys' part. Any out with the same product with grad_out may stand for it."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, Scores], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel is a way to compute attention, and what it can do.

    Args:
        name: for the log.
        device_type: "cpu" or "cuda"; None means any.
        dtypes: element types it computes in.
        features: of "sliding window", "softcap", "attention sinks". A kernel with `forward` and `backward` has sinks.
        forward, backward: the pair; None where the library offers only a differentiable function.
        attend: (q, k, v, segments, scores) -> out, differentiable; None where the pair serves.
        unequal_values: whether values may have another size than queries and keys; else they are padded with zeros.
    """

    name: str
    device_type: str | None
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    forward: Forward | None = None
    backward: Backward | None = None
    attend: Attend | None = None
    unequal_values: bool = False

    @property
    def has_lse(self) -> bool:
        """Return whether outputs over parts of the keys can be merged, as a ring needs."""
        return self.forward is not None and self.backward is not None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scores: Scores,
        ahead: Ahead | None = None,
    ) -> torch.Tensor:
        """Compute differentiable attention. q: (Tq, H, D); k: (Tk, Hk, D); v: (Tk, Hk, Dv); out: (Tq, H, Dv).

        Without queries, keys or heads the output is empty and still has a gradient.

        Args:
            q, k, v: rows in the order of the runs.
            segments: the runs.
            scores: of the layer.
            ahead: keys after some of the queries, which these meet, too; None: there are none.

        Raises:
            UnsupportedModel: the layer needs what this kernel cannot do.
        """
        self.require(scores.features)
        # the zero reaches back to all three: a rank without queries takes part in the exchange of gradients, which
        # its peers' backward would wait for
        if q.numel() == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
        (v,), value_dim = self.padded([v], q.shape[2]), v.shape[2]
        if self.attend is not None:
            if ahead is not None:
                raise UnsupportedModel(NO_LSE.format(self.name))
            return self.attend(q, k, v, segments, scores)[..., :value_dim]
        if ahead is not None:
            ahead = replace(ahead, v=self.padded([ahead.v], q.shape[2])[0])
        keys_ahead = (None, None) if ahead is None else (ahead.k, ahead.v)
        call = self, segments, scores.without_sinks(), ahead
        out: Any = _Attend.apply(q, k, v, scores.sinks, *keys_ahead, *call)
        return out if out.shape[-1] == value_dim else out[..., :value_dim]

    def require(self, features: frozenset[str]) -> None:
        """Refuse, by name, what this kernel cannot do.

        Raises:
            UnsupportedModel: with what is missing.
        """
        if missing := features - self.features:
            raise UnsupportedModel(
                f"Kernel {self.name!r} cannot do {', '.join(sorted(missing))}, which this model uses. "
                "Install flash-attn, or train without it."
            )

    def padded(self, values: Sequence[torch.Tensor], head_dim: int) -> list[torch.Tensor]:
        """Return values, or gradients of outputs, as wide as the kernel wants them: zeros change nothing."""
        if self.unequal_values:
            return list(values)
        return [F.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x for x in values]


class _Attend(torch.autograd.Function):
    """`_Attend` calls a kernel's pair. The sinks are merged in afterwards, so a kernel need not know of them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        k_ahead: torch.Tensor | None,
        v_ahead: torch.Tensor | None,
        kernel: Kernel,
        segments: Segments,
        scores: Scores,
        ahead: Ahead | None,
    ) -> torch.Tensor:
        assert kernel.forward is not None
        out, lse = kernel.forward(q, k, v, segments, scores)
        if ahead is not None:
            rows, endless = ahead.q_rows, replace(scores, window=None)
            part, part_lse = kernel.forward(q[rows], ahead.k, ahead.v, ahead.segments, endless)
            merged, lse[rows] = merge(out[rows].to(lse.dtype), lse[rows], part.to(lse.dtype), part_lse)
            out[rows] = merged.to(out.dtype)
        out, lse = with_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks, k_ahead, v_ahead)
        ctx.call = kernel.backward, segments, scores
        ctx.ahead = None if ahead is None else (ahead.q_rows, ahead.segments)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks, k_ahead, v_ahead = ctx.saved_tensors
        backward, segments, scores = ctx.call
        grad = grad_outputs[0].contiguous()
        grads = backward(grad, q, k, v, out, lse, segments, scores)
        grads_ahead: Sequence[torch.Tensor | None] = (None, None)
        if ctx.ahead is not None:
            rows, runs = ctx.ahead
            queries = grad[rows], q[rows], k_ahead, v_ahead, out[rows], lse[rows]
            grad_q, *grads_ahead = backward(*queries, runs, replace(scores, window=None))
            grads[0].index_add_(0, rows, grad_q)
        return *grads, sinks_gradient(grad, out, lse, sinks), *grads_ahead, None, None, None, None


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over the keys of both: the same queries, disjoint keys. Computed in the wider of the types."""
    total = torch.logaddexp(lse, other_lse)
    return out * (lse - total).exp()[..., None] + other_out * (other_lse - total).exp()[..., None], total


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge in one more key a head, which has a logit and no value; return output and log-sum-exp."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.detach().to(lse.dtype))
    return (out * (lse - total).exp()[..., None]).to(out.dtype), total


def sinks_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the gradient of the sinks' logits, from the merged output and log-sum-exp. Shape (H,)."""
    if sinks is None:
        return None
    # as of any key, p (dp - grad_out . out), where dp is 0 because a sink has no value; summed over the queries
    weights = (sinks.detach().to(lse.dtype) - lse).exp()
    return -(weights * (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum(0).to(sinks.dtype)
