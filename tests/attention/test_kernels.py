"""Kernels equal the definition of causal attention, sample by sample, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from hf_hetero.attention.kernels import (
    CPU,
    FLOATS,
    PLAIN,
    SINKS,
    SOFTCAP,
    WINDOW,
    Kernel,
    Pack,
    Scores,
    choose_kernel,
    features_of,
)
from hf_hetero.errors import UnsupportedModel


def pack_of(lengths: list[int]) -> Pack:
    bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    return Pack(tuple(lengths), bounds, max(lengths, default=0))


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scores: Scores
) -> torch.Tensor:
    """Token by token, head by head, in plain sums: slow, and independent of every kernel."""
    rows, start, group = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            first = start if scores.window is None else max(start, t - scores.window + 1)
            heads = []
            for h in range(q.shape[1]):
                logits = (k[first : t + 1, h // group] @ q[t, h]) * scores.scaling
                if scores.softcap is not None:
                    logits = scores.softcap * torch.tanh(logits / scores.softcap)
                total = logits.exp().sum() + (scores.sinks[h].exp() if scores.sinks is not None else 0)
                heads.append((logits.exp() / total) @ v[first : t + 1, h // group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


FEATURES = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all": {"window": 3, "softcap": 5.0, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_the_definition(kernel: Kernel, features: str, kv_heads: int) -> None:
    """Output and gradients within 1e-12 in fp64: all features, grouped and multi-query heads, samples of one token."""
    torch.manual_seed(0)
    lengths = [5, 1, 9, 1, 2]
    scores = Scores(1 / math.sqrt(8), **FEATURES[features])  # pyright: ignore
    tensors = [torch.randn(18, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    weights = torch.randn(18, 4, 8, dtype=torch.float64)
    found = kernel(*tensors, pack_of(lengths), scores)
    expected = by_definition(*tensors, lengths, scores)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_the_types_own(dtype: torch.dtype) -> None:
    """In a shorter type the error is no larger than 1.5 times that of torch's own attention in it."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(40, 4, 16, dtype=torch.float64) for _ in range(3))
    exact = CPU(q, k, v, pack_of([40]), Scores(0.25))
    short = [x.to(dtype) for x in (q, k, v)]
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in short), is_causal=True, scale=0.25
    )[0].transpose(0, 1)
    ours = CPU(short[0], short[1], short[2], pack_of([40]), Scores(0.25))
    assert (ours.double() - exact).abs().max() <= 1.5 * (stock.double() - exact).abs().max()


@pytest.mark.parametrize("shapes", [((0, 4), (0, 2)), ((3, 0), (3, 0))], ids=["no tokens", "no heads"])
def test_nothing_to_do_still_has_a_gradient(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """A rank without tokens or heads gets an empty output that hangs on its inputs; torch's operator would crash."""
    (tokens, heads), (_, kv_heads) = shapes
    tensors = [torch.randn(tokens, h, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    out = CPU(*tensors, pack_of([tokens] if tokens else []), Scores(1.0))
    out.sum().backward()
    assert out.numel() == 0
    assert all(x.grad is not None for x in tensors)


def test_missing_feature_is_refused_by_name() -> None:
    """A kernel that cannot do what a layer needs says so, and does not leave it out."""
    bare = Kernel("bare", None, FLOATS, frozenset(), PLAIN.attend)
    x = torch.randn(2, 1, 4)
    with pytest.raises(UnsupportedModel, match="'bare' cannot do sliding window, softcap"):
        bare(x, x, x, pack_of([2]), Scores(1.0, window=2, softcap=3.0))


def test_choice() -> None:
    """On CPU the CPU kernel; on CUDA torch's own for half types, the plain one for fp32; nothing for sinks."""
    assert choose_kernel("cpu", torch.float64).name == "cpu"
    assert choose_kernel("cuda", torch.bfloat16).name == "torch_varlen"
    assert choose_kernel("cuda", torch.float32).name == "plain"
    with pytest.raises(UnsupportedModel, match="attention sinks"):
        choose_kernel("cuda", torch.bfloat16, frozenset({SINKS}))


def test_features_of_configs() -> None:
    """What layers will ask for is read from the config."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

    assert features_of(LlamaConfig()) == frozenset()
    assert features_of(Qwen3Config()) == frozenset()
    assert WINDOW in features_of(MistralConfig(sliding_window=8))
    assert features_of(Gemma2Config()) == {WINDOW, SOFTCAP}


def test_flash_attn_through_transformers_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed flash-attn is found by transformers' name and called with its keywords; a stand-in for FA3."""
    import sys
    from types import ModuleType

    from transformers import modeling_flash_attention_utils as lookup

    from hf_hetero.attention import kernels

    calls: list[dict[str, object]] = []

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, None]:
        calls.append({"scale": softmax_scale, "causal": causal, "window": window_size, "max": max_seqlen_q})
        lengths = cu_seqlens_q.diff().tolist()
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return PLAIN(q, k, v, pack_of(lengths), Scores(softmax_scale or 1.0, window, softcap or None)), None

    module = ModuleType("flash_attn_interface")
    module.__dict__.update(
        flash_attn_func=flash_attn_varlen_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_varlen_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
    kernel = kernels.choose_kernel("cuda", torch.bfloat16, frozenset({WINDOW, SOFTCAP}), "flash_attention_3")
    assert (kernel.name, kernel.features) == ("flash_attention_3", {WINDOW, SOFTCAP})
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = Scores(0.3, window=4, softcap=2.0)
    found = kernel(q, k, v, pack_of([5, 7]), scores)
    assert torch.allclose(found, PLAIN(q, k, v, pack_of([5, 7]), scores))
    assert calls == [{"scale": 0.3, "causal": True, "window": (3, 3), "max": 7}]
    with pytest.raises(UnsupportedModel, match="attention sinks"):
        kernels.choose_kernel("cuda", torch.bfloat16, frozenset({SINKS}), "flash_attention_3")
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
