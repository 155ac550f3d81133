"""A kernel's pair keeps the contract: the definition, whole or in parts, whatever meets whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention.dense_attention import Case, dense

from hf_hetero.attention.kernels.contract import FLOATS, Kernel, Scores, Segments, merge
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.plain import BLOCK_QUERIES, PLAIN
from hf_hetero.errors import UnsupportedModel

KERNELS = pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=lambda kernel: kernel.name)
HOST = torch.device("cpu")
FEATURES = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "all": {"window": 3, "softcap": 5.0, "has_sinks": True},
    "smaller values": {"head_dim": 12, "value_dim": 4},
}


def packed(lengths: tuple[int, ...]) -> Segments:
    return Segments.packed(lengths, HOST)


def with_kernel(case: Case, kernel: Kernel) -> list[torch.Tensor]:
    """Output, and the gradients of q, k, v and the sinks."""
    q, k, v, weights, sinks = (x.requires_grad_() for x in case.tensors())
    scores = Scores(case.scaling, case.window, case.softcap, sinks if case.has_sinks else None)
    out = kernel(q, k, v, packed(case.lengths), scores)
    grads = torch.autograd.grad((out * weights).sum(), [q, k, v, sinks], allow_unused=True)
    return [out.detach(), *(torch.zeros_like(sinks) if g is None else g for g in grads)]


@KERNELS
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_the_definition(kernel: Kernel, features: str, kv_heads: int) -> None:
    """Output and gradients within 1e-12 in fp64: all features, grouped and multi-query heads, samples of one token."""
    case = Case((5, 1, 9, 1, 2), (4, kv_heads), **FEATURES[features])
    for ours, theirs in zip(with_kernel(case, kernel), dense(case), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 100, 600])
def test_long_samples_go_in_blocks(window: int | None) -> None:
    """The plain kernel never holds the scores of a whole long sample, and changes nothing by it."""
    case = Case((2 * BLOCK_QUERIES + 70, 3), (2, 1), window=window)
    for ours, theirs in zip(with_kernel(case, PLAIN), dense(case), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@KERNELS
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_parts_of_the_keys_merge(kernel: Kernel, softcap: float | None) -> None:
    """Queries after their keys: two calls over disjoint keys, merged, are one call over all; in backward too."""
    assert kernel.forward is not None
    assert kernel.backward is not None
    torch.manual_seed(0)
    scores = Scores(0.3, softcap=softcap)
    q, grad = (torch.randn(4, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(11, 2, 8, dtype=torch.float64) for _ in range(2))
    whole, before, own = (
        Segments.of([4], [11], HOST),  # the last query meets the last key
        Segments.of([4], [7], HOST, causal=False),
        Segments.of([4], [4], HOST),
    )
    out, lse = kernel.forward(q, k, v, whole, scores)
    parts = kernel.forward(q, k[:7], v[:7], before, scores), kernel.forward(q, k[7:], v[7:], own, scores)
    merged, merged_lse = merge(*parts[0], *parts[1])
    assert (merged - out).abs().max() < 1e-14
    assert (merged_lse - lse).abs().max() < 1e-14
    dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, whole, scores)
    first = kernel.backward(grad, q, k[:7], v[:7], out, lse, before, scores)
    second = kernel.backward(grad, q, k[7:], v[7:], out, lse, own, scores)
    assert (first[0] + second[0] - dq).abs().max() < 1e-14
    assert (torch.cat([first[1], second[1]]) - dk).abs().max() < 1e-14
    assert (torch.cat([first[2], second[2]]) - dv).abs().max() < 1e-14
    # a part's own output and log-sum-exp are not enough
    alone = kernel.backward(grad, q, k[:7], v[:7], *parts[0], before, scores)
    assert (alone[1] - dk[:7]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_the_types_own(dtype: torch.dtype) -> None:
    """In a shorter type the error is no larger than 1.5 times that of torch's own attention in it."""
    case = Case((40,), (4, 4), head_dim=16, value_dim=16, dtype=dtype)
    q, k, v, _, _ = (x.transpose(0, 1)[None] if x.dim() == 3 else x for x in case.tensors())
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scaling)
    exact, ours = dense(case)[0], with_kernel(case, CPU)[0]
    assert (ours.double() - exact).abs().max() <= 1.5 * (stock[0].transpose(0, 1).double() - exact).abs().max()


@pytest.mark.parametrize("shapes", [((0, 4), (0, 2)), ((3, 0), (3, 0))], ids=["no tokens", "no heads"])
def test_nothing_to_do_still_has_a_gradient(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """A rank without tokens or heads gets an empty output that hangs on its inputs; torch's operator would crash."""
    (tokens, heads), (_, kv_heads) = shapes
    tensors = [torch.randn(tokens, h, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    out = CPU(*tensors, packed((tokens,) if tokens else ()), Scores(1.0))
    out.sum().backward()
    assert out.numel() == 0
    assert all(x.grad is not None for x in tensors)


def test_missing_feature_is_refused_by_name() -> None:
    """A kernel that cannot do what a layer needs says so, and does not leave it out."""
    bare = Kernel("bare", None, FLOATS, frozenset(), PLAIN.forward, PLAIN.backward)
    x = torch.randn(2, 1, 4)
    with pytest.raises(UnsupportedModel, match="'bare' cannot do sliding window, softcap"):
        bare(x, x, x, packed((2,)), Scores(1.0, window=2, softcap=3.0))


def test_a_wrong_kernel_is_noticed() -> None:
    """The comparison with the definition can fail: a window that is one token too wide."""
    case = Case((9,), (2, 2), window=3)
    assert (with_kernel(replace(case, window=4), CPU)[0] - dense(case)[0]).abs().max() > 1e-3
