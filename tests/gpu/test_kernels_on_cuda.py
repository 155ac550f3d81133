"""On a GPU: kernels against the definition, and what the whole attention call keeps of the raw kernel's speed."""

from __future__ import annotations

import math

import pytest
import torch

from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.attention.kernels.contract import Kernel, Scores, Segments
from hf_hetero.attention.kernels.cuda import TORCH_VARLEN
from hf_hetero.attention.kernels.flash import flash_kernels
from hf_hetero.attention.kernels.plain import PLAIN

pytestmark = pytest.mark.gpu

KERNELS = [*flash_kernels(), TORCH_VARLEN]  # those that are installed
LENGTHS = [1, 700, 33, 2048, 5, 512]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_error_is_the_types_own(kernel: Kernel, dtype: torch.dtype, kv_heads: int, window: int | None) -> None:
    """Against fp64, a kernel errs no more than 1.5 times what plain attention errs in the same type."""
    torch.manual_seed(0)
    total, scores = sum(LENGTHS), Scores(1 / math.sqrt(64), window)
    segments = Segments.packed(LENGTHS, torch.device("cuda"))
    exact = [torch.randn(total, h, 64, device="cuda", dtype=torch.float64) for h in (8, kv_heads, kv_heads)]
    weights = torch.randn(total, 8, 64, device="cuda", dtype=torch.float64)
    results: list[list[torch.Tensor]] = []
    for attend, kind in ((PLAIN, torch.float64), (PLAIN, dtype), (kernel, dtype)):
        leaves = [x.to(kind).requires_grad_() for x in exact]
        out = attend(leaves[0], leaves[1], leaves[2], segments, scores)
        grads = torch.autograd.grad((out * weights.to(kind)).sum(), leaves)
        results.append([out.detach(), *grads])
    for reference, plain, ours in zip(*results, strict=True):
        allowed = 1.5 * (plain.double() - reference).abs().max() + 1e-6
        assert (ours.double() - reference).abs().max() <= allowed


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_parts_of_the_keys_merge_on_cuda(kernel: Kernel, window: int | None) -> None:
    """A kernel with more keys than queries, and a block against merged output: what gather and ring call."""
    torch.manual_seed(0)
    assert kernel.forward is not None
    assert kernel.backward is not None
    device, scores = torch.device("cuda"), Scores(1 / 8, window)
    shapes = ((500, 8), (1300, 2), (1300, 2), (500, 8))
    q, k, v, grad = (torch.randn(n, h, 64, device=device, dtype=torch.bfloat16) for n, h in shapes)
    whole = Segments.of([200, 300], [500, 800], device)
    out, lse = kernel.forward(q, k, v, whole, scores)
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = PLAIN.forward(*wide, whole, scores)  # type: ignore[misc]
    assert (out.double() - exact).abs().max() < 2e-2
    assert (lse - exact_lse).abs().max() < 1e-3
    found = kernel.backward(grad, q, k, v, exact.bfloat16(), exact_lse.float(), whole, scores)
    expected = PLAIN.backward(grad.double(), *wide, exact, exact_lse, whole, scores)  # type: ignore[misc]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_no_host_sync_in_attention() -> None:
    """At degree 1 a layer's attention never makes the host wait for the device."""
    from hf_hetero.attention.context import AttentionContext
    from hf_hetero.attention.interface import hetero_attention
    from hf_hetero.layout import contiguous

    kernel = choose_kernel("cuda", torch.bfloat16)
    context = AttentionContext(contiguous(LENGTHS, 1), (0,), 0, None, "ulysses", kernel, torch.device("cuda"))
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    module = torch.nn.Identity()
    hetero_attention(module, q, k, v, None, hetero=context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = hetero_attention(module, q, k, v, None, hetero=context)  # raises at a sync
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.shape == (1, sum(LENGTHS), 8, 64)


def test_one_rank_trains_on_a_gpu(tmp_path: object) -> None:
    """HeteroTrainer on one GPU in bf16: the loss is near that of the plain Trainer's fp32 run on the CPU."""
    from helpers import LENGTHS as TEXT
    from helpers import arguments, samples, tiny_model

    from hf_hetero import HeteroTrainer

    losses: list[float] = []
    for changes in ({"use_cpu": False, "bf16": True}, {"use_cpu": True}):
        trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1, **changes), train_dataset=samples(TEXT))
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
