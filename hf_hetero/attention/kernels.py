"""Causal attention over packed samples on one device: one signature, several kernels, each with a stated record.

The only door to flash-attn and its kin; they are reached through transformers' own lookup, so every name that
`attn_implementation` accepts works here too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.errors import UnsupportedModel

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = HALF | {torch.float32, torch.float64}
WINDOW, SOFTCAP, SINKS = "sliding window", "softcap", "attention sinks"


@dataclass(frozen=True, slots=True)
class Pack:
    """Boundaries of packed samples: on the host for loops and sizes, on the device for kernels.

    Args:
        lengths: tokens of each sample.
        cu_seqlens: int32 tensor on the device, shape (num_samples + 1,).
        max_seqlen: tokens of the longest sample.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns q @ k into weights.

    Args:
        scaling: factor on q @ k.
        window: a token sees itself and the `window - 1` tokens before it; None means all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: one logit a query head that takes part in the softmax and has no value. Shape (num_heads,).
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def features(self) -> frozenset[str]:
        """What a kernel must be able to do."""
        used = {WINDOW: self.window, SOFTCAP: self.softcap, SINKS: self.sinks}
        return frozenset(name for name, value in used.items() if value is not None)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pack, Scores], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to compute attention of packed samples.

    Args:
        name: for the log.
        device_type: "cpu" or "cuda"; None means any.
        dtypes: element types it computes in.
        features: of "sliding window", "softcap", "attention sinks".
        attend: (q, k, v, pack, scores) -> out. q and out: (num_tokens, num_heads, head_dim); k and v:
            (num_tokens, num_kv_heads, head_dim), where num_heads is a multiple of num_kv_heads. Differentiable.
    """

    name: str
    device_type: str | None
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    attend: Attend

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scores: Scores) -> torch.Tensor:
        """Attention; an empty pack, or a rank without heads, gives an empty output that still has a gradient.

        Raises:
            UnsupportedModel: the layer needs what this kernel cannot do.
        """
        missing = scores.features - self.features
        if missing:
            raise UnsupportedModel(
                f"Kernel {self.name!r} cannot do {', '.join(sorted(missing))}, which this model uses. "
                "Install flash-attn, or train without it."
            )
        if q.numel() == 0:
            return q + 0 * (k.sum() + v.sum())
        return self.attend(q, k, v, pack, scores)


# ---------------------------------------------------------------------------------------------- plain mathematics


def attend_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scores: Scores) -> torch.Tensor:
    """The definition, one sample at a time: any device, any type, every feature. Memory grows with length squared."""
    group_size = q.shape[1] // k.shape[1]
    outputs: list[torch.Tensor] = []
    for q_s, k_s, v_s in zip(*(x.split(list(pack.lengths)) for x in (q, k, v)), strict=True):
        k_s, v_s = (x.repeat_interleave(group_size, dim=1) for x in (k_s, v_s))
        position = torch.arange(q_s.shape[0], device=q.device)
        distance = position[:, None] - position[None, :]
        hidden = distance < 0 if scores.window is None else (distance < 0) | (distance >= scores.window)
        outputs.append(weigh(q_s, k_s, v_s, hidden, scores))
    return torch.cat(outputs)


def weigh(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Softmax attention of one sample with a mask. q, k, v: (..., num_tokens, num_heads, head_dim) with equal heads.

    Args:
        hidden: True where a query must not see a key; broadcasts to (..., num_heads, num_queries, num_keys).
    """
    logits = torch.einsum("...qhd,...khd->...hqk", q, k) * scores.scaling
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.to(logits.dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    # half types lose digits in a long softmax; wider ones stay as they are
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("...hqk,...khd->...qhd", weights[..., : k.shape[-3]], v)


# ------------------------------------------------------------------------------------------------------------ CPU

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(num_tokens, num_heads, head_dim) -> (1, num_heads, num_tokens, head_dim), as the CPU operator wants it."""
    return x.transpose(0, 1).unsqueeze(0)


class _CpuAttention(torch.autograd.Function):
    """torch's flash attention for CPU, sample by sample; exact in fp64, grouped heads without copies.

    One Function around the loop: slicing inside autograd would give every sample a gradient of the whole pack's size.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], scaling: float
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        lses: list[torch.Tensor] = []
        pieces = zip(*(x.split(list(lengths)) for x in (q, k, v, out)), strict=True)
        for q_s, k_s, v_s, out_s in pieces:
            result, lse = _cpu_forward(
                _heads_first(q_s), _heads_first(k_s), _heads_first(v_s), 0.0, True, scale=scaling
            )
            out_s.copy_(result[0].transpose(0, 1))
            lses.append(lse)
        ctx.save_for_backward(q, k, v, out, *lses)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, *lses = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        rows = (x.split(list(ctx.lengths)) for x in (grad_outputs[0], q, k, v, out, *grads))
        for lse, *inputs, grad_q, grad_k, grad_v in zip(lses, *rows, strict=True):
            found = _cpu_backward(*map(_heads_first, inputs), lse, 0.0, True, scale=ctx.scaling)
            for grad, part in zip((grad_q, grad_k, grad_v), found, strict=True):
                grad.copy_(part[0].transpose(0, 1))
        return *grads, None, None


def _attend_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scores: Scores) -> torch.Tensor:
    if scores.features:
        return attend_plainly(q, k, v, pack, scores)
    return _CpuAttention.apply(q, k, v, pack.lengths, scores.scaling)  # pyright: ignore[reportReturnType]


# ----------------------------------------------------------------------------------------------------------- CUDA


def _attend_torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scores: Scores) -> torch.Tensor:
    """`torch.nn.attention.varlen`: in torch itself, so nothing to install. Causal is spelled (-1, 0)."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if scores.window is None else (scores.window - 1, 0)
    out = varlen_attn(
        q,
        k,
        v,
        pack.cu_seqlens,
        pack.cu_seqlens,
        pack.max_seqlen,
        pack.max_seqlen,
        scale=scores.scaling,
        window_size=window,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def _flash_kernel(implementation: str) -> Kernel:
    """flash-attn by a name that transformers knows ("flash_attention_2", "kernels-community/flash-attn2", ...)."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (_, varlen, *_), (to_kwargs, _) = lazy_import_flash_attention(implementation)
    accepted = inspect.signature(varlen).parameters
    names = {WINDOW: {"window_size"}, SOFTCAP: {"softcap"}, SINKS: {"s_aux", "learnable_sink"}}
    features = frozenset(feature for feature, words in names.items() if words & accepted.keys())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scores: Scores) -> torch.Tensor:
        options = to_kwargs(
            query_length=q.shape[0],
            key_length=k.shape[0],
            is_causal=True,
            softmax_scale=scores.scaling,
            sliding_window=scores.window,
            softcap=scores.softcap,
            s_aux=scores.sinks,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_k=pack.max_seqlen,
        )
        out = varlen(q, k, v, cu_seqlens_q=pack.cu_seqlens, cu_seqlens_k=pack.cu_seqlens, **options)
        return out[0] if isinstance(out, tuple) else out

    return Kernel(implementation, "cuda", HALF, features, attend)


def _installed_flash() -> str | None:
    """The flash-attn that is installed, by transformers' name for it."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


PLAIN = Kernel("plain", None, FLOATS, frozenset({WINDOW, SOFTCAP, SINKS}), attend_plainly)
CPU = Kernel("cpu", "cpu", FLOATS, frozenset({WINDOW, SOFTCAP, SINKS}), _attend_cpu)
TORCH_VARLEN = Kernel("torch_varlen", "cuda", HALF, frozenset({WINDOW}), _attend_torch_varlen)


def choose_kernel(
    device_type: str, dtype: torch.dtype, features: frozenset[str] = frozenset(), wanted: str | None = None
) -> Kernel:
    """The best kernel that can do what a model needs.

    Args:
        device_type: "cpu" or "cuda".
        dtype: type that attention computes in.
        features: what the model's layers use.
        wanted: the model's own `attn_implementation`; a flash-attn name is honoured.

    Raises:
        UnsupportedModel: no kernel can, with what is missing.
    """
    if device_type == "cpu":
        return CPU
    if dtype not in HALF:
        logger.warning("No flash kernel computes in %s: using plain attention, slow and hungry. Train in bf16.", dtype)
        return PLAIN
    flash = wanted if wanted and "flash" in wanted else _installed_flash()
    candidates = [_flash_kernel(flash)] if flash else []
    candidates.append(TORCH_VARLEN)
    for kernel in candidates:
        if features <= kernel.features:
            return kernel
    raise UnsupportedModel(
        f"This model uses {', '.join(sorted(features))}; no kernel here ({[k.name for k in candidates]}) can. "
        "Install a flash-attn that can (FA3 or FA4 for attention sinks, flash-attn 2.6 or later for softcap)."
    )


def features_of(config: Any) -> frozenset[str]:
    """What the attention layers of a transformers config will ask of a kernel."""
    found: set[str] = set()
    layer_types = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
        found.add(WINDOW)
    if getattr(config, "attn_logit_softcapping", None):
        found.add(SOFTCAP)
    if getattr(config, "model_type", "") == "gpt_oss":
        found.add(SINKS)
    return frozenset(found)
