"""On a GPU: kernels against the definition, what is found out before the first step, and that no layer waits.

The yardstick for a half type's error is attention written out in that type, by torch's own operations; as in the tests
of flash-attn (Dao-AILab/flash-attention, tests/test_flash_attn.py), a kernel may err a few times as much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_hetero.attention.kernels import choose_kernel, trial
from hf_hetero.attention.kernels.contract import SINKS, WINDOW, Kernel, Scores, Segments
from hf_hetero.attention.kernels.cuda import torch_varlen
from hf_hetero.attention.kernels.flash import flash_kernels
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.attention.token_ring import along, share_along

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
OFFERS = [*flash_kernels(), torch_varlen()]  # what is installed
KERNELS = [offer for offer in OFFERS if isinstance(offer, Kernel)]
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
LENGTHS = (1, 700, 33, 2048, 5, 512)
RUNS = {  # lengths of queries, of keys, whether causal
    "whole samples": (LENGTHS, LENGTHS, True),
    "more keys than queries": ((200, 1, 300), (500, 900, 800), True),
    "every query sees every key": ((200, 1, 300), (500, 3, 301), False),
    "one query a run": ((1, 1, 1, 1), (3, 700, 1, 64), True),
    "one query a run, every key": ((1, 1, 1, 1), (3, 700, 1, 64), False),
}
FACTOR, LEAST = 3, 1e-3


def eager(q: Any, k: Any, v: Any, runs: str, scores: Scores) -> torch.Tensor:
    """Attention written out in the tensors' own type, run by run."""
    q_lengths, k_lengths, causal = RUNS[runs]
    group, outs = q.shape[1] // k.shape[1], []
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    parts = zip(q.split(list(q_lengths)), k.split(list(k_lengths)), v.split(list(k_lengths)), strict=True)
    for queries, keys, values in parts:
        logits = torch.einsum("qhd,khd->hqk", queries * scores.scaling, keys)
        if causal:
            last = torch.arange(len(queries), device=q.device)[:, None] + len(keys) - len(queries)
            key = torch.arange(len(keys), device=q.device)
            hidden = key > last
            if scores.window is not None:
                hidden |= key <= last - scores.window
            logits = logits.masked_fill(hidden, -torch.inf)
        if scores.sinks is not None:
            sinks = scores.sinks.to(logits.dtype)[:, None, None].expand(-1, logits.shape[1], 1)
            logits = torch.cat([logits, sinks], dim=2)
        weights = logits.softmax(dim=2)[..., : len(keys)].to(values.dtype)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


def drawn(runs: str, kv_heads: int, head_dim: int = 64) -> list[torch.Tensor]:
    """Queries, keys, values, the gradient of the output, and sinks, in fp64."""
    torch.manual_seed(0)
    num_q, num_k = sum(RUNS[runs][0]), sum(RUNS[runs][1])
    shapes = ((num_q, 8), (num_k, kv_heads), (num_k, kv_heads), (num_q, 8))
    tensors = [torch.randn(*x, head_dim, device=DEVICE, dtype=torch.float64) for x in shapes]
    return [*tensors, torch.linspace(-1, 2, 8, device=DEVICE, dtype=torch.float64)]


def segments_of(runs: str) -> Segments:
    return Segments.of(*RUNS[runs][:2], DEVICE, RUNS[runs][2])


def differentiated(attend: Any, tensors: list[torch.Tensor], dtype: torch.dtype, has_sinks: bool) -> list[torch.Tensor]:
    """Output and gradients, of the sinks too, in fp64 again."""
    q, k, v, grad, sinks = (x.to(dtype).detach().requires_grad_() for x in tensors)
    leaves = [q, k, v, sinks] if has_sinks else [q, k, v]
    out = attend(q, k, v, sinks if has_sinks else None)
    return [out.detach().double(), *(x.double() for x in torch.autograd.grad(out, leaves, grad.detach()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize(("window", "has_sinks"), [(None, False), (128, False), (None, True), (128, True)])
@pytest.mark.parametrize("runs", RUNS)
@EACH_KERNEL
def test_error_is_the_types_own(
    kernel: Kernel, runs: str, window: int | None, has_sinks: bool, kv_heads: int, dtype: torch.dtype
) -> None:
    """Against the definition in fp64, a kernel errs a few times what attention written out in the same type errs."""
    causal = RUNS[runs][2]
    if window is not None and not causal:
        pytest.skip("only causal runs have windows")
    # what a half type cannot hold of the inputs is no error of a kernel
    tensors = [x.to(dtype).double() for x in drawn(runs, kv_heads)]
    segments, scores = segments_of(runs), Scores(1 / 8, window)

    def by(attention: Kernel) -> Any:
        return lambda q, k, v, sinks: attention(q, k, v, segments, replace(scores, sinks=sinks))

    exact = differentiated(by(PLAIN), tensors, torch.float64, has_sinks)
    written_out = differentiated(
        lambda q, k, v, sinks: eager(q, k, v, runs, replace(scores, sinks=sinks)), tensors, dtype, has_sinks
    )
    found = differentiated(by(kernel), tensors, dtype, has_sinks)
    for ours, theirs, reference in zip(found, written_out, exact, strict=True):
        allowed = FACTOR * (theirs - reference).abs().max() + LEAST * reference.abs().max()
        assert (ours - reference).abs().max() <= allowed


@EACH_KERNEL
def test_a_wrong_window_is_noticed(kernel: Kernel) -> None:
    """The comparison can fail: a window wider by one token errs far more than the type does."""
    tensors = drawn("whole samples", 2)
    segments = segments_of("whole samples")
    exact, found = (
        differentiated(lambda q, k, v, _: attention(q, k, v, segments, Scores(1 / 8, window)), tensors, dtype, False)  # noqa: B023
        for attention, window, dtype in ((PLAIN, 3, torch.float64), (kernel, 4, torch.bfloat16))
    )
    assert all(
        (ours - theirs).abs().max() > 0.1 * theirs.abs().max() for ours, theirs in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("runs", RUNS)
@EACH_KERNEL
def test_pairs_on_cuda(kernel: Kernel, runs: str, window: int | None, kv_heads: int) -> None:
    """The log-sum-exp of each query and head; and the gradients against output and log-sum-exp over more keys."""
    if window is not None and not RUNS[runs][2]:
        pytest.skip("only causal runs have windows")
    assert kernel.forward is not None
    assert kernel.backward is not None
    assert PLAIN.forward is not None
    assert PLAIN.backward is not None
    segments, scores = segments_of(runs), Scores(1 / 8, window)
    q, k, v, grad = (x.bfloat16() for x in drawn(runs, kv_heads)[:4])
    wide = [x.double() for x in (q, k, v)]
    out, lse = kernel.forward(q, k, v, segments, scores)
    exact, exact_lse = PLAIN.forward(*wide, segments, scores)
    assert (out.double() - exact).abs().max() < 2e-2 * exact.abs().max()
    assert lse.shape == exact_lse.shape
    assert lse.dtype == torch.float32
    assert (lse - exact_lse).abs().max() < 1e-3
    merged, merged_lse = (0.7 * exact).bfloat16(), (exact_lse + 0.3).float()
    found = kernel.backward(grad, q, k, v, merged, merged_lse, segments, scores)
    expected = PLAIN.backward(grad.double(), *wide, merged.double(), merged_lse.double(), segments, scores)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max()


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("runs", RUNS)
@EACH_KERNEL
def test_a_projection_takes_the_place_of_the_output_on_cuda(kernel: Kernel, runs: str, kv_heads: int) -> None:
    """A token ring sends one number a head for the output: the gradients err no more than by the output itself.

    Twice the projection is another product with the gradient, and gives other gradients.
    """
    assert kernel.forward is not None
    assert kernel.backward is not None
    assert PLAIN.backward is not None
    segments, scores = segments_of(runs), Scores(1 / 8)
    q, k, v, grad = (x.bfloat16() for x in drawn(runs, kv_heads)[:4])
    out, lse = kernel.forward(q, k, v, segments, scores)
    projection = along(grad, share_along(grad, out.float()))
    wide = [x.double() for x in (grad, q, k, v, out, lse)]
    exact = PLAIN.backward(*wide, segments, scores)
    by_output, by_projection, by_another = (
        kernel.backward(grad, q, k, v, one.bfloat16(), lse, segments, scores)
        for one in (out, projection, 2 * projection)
    )
    for number, theirs in enumerate(exact):
        usual, ours = ((found[number].double() - theirs).abs().max() for found in (by_output, by_projection))
        assert ours <= 1.5 * usual + LEAST * theirs.abs().max()
    assert (by_another[0].double() - exact[0]).abs().max() > 0.1 * exact[0].abs().max()


@pytest.mark.parametrize("head_dim", [12, 96, 128, 256])
@EACH_KERNEL
def test_sizes_of_heads(kernel: Kernel, head_dim: int) -> None:
    """Other sizes of heads, one that is filled up among them; and smaller values, as some models have."""
    tensors = [x.bfloat16().double() for x in drawn("more keys than queries", 2, head_dim)]
    segments = segments_of("more keys than queries")
    tensors[2], tensors[3] = (x[..., : head_dim // 2].contiguous() for x in tensors[2:4])
    exact, found = (
        differentiated(lambda q, k, v, _: attention(q, k, v, segments, Scores(head_dim**-0.5)), tensors, dtype, False)  # noqa: B023
        for attention, dtype in ((PLAIN, torch.float64), (kernel, torch.bfloat16))
    )
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).abs().max() < 2e-2 * theirs.abs().max()


@pytest.mark.parametrize("shapes", [((0, 8), (0, 2)), ((3, 0), (3, 0))], ids=["no tokens", "no heads"])
@EACH_KERNEL
def test_nothing_to_do_on_cuda(kernel: Kernel, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """A rank without tokens or heads gets an empty output that hangs on its inputs; no kernel is launched for it."""
    (tokens, heads), (_, kv_heads) = shapes
    tensors = [
        torch.randn(tokens, h, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    out = kernel(*tensors, Segments.packed((tokens,) if tokens else (), DEVICE), Scores(1.0))
    out.sum().backward()
    assert out.shape == (tokens, heads, 64)
    assert all(x.grad is not None for x in tensors)


def test_nothing_is_passed_over() -> None:
    """All that is installed takes the call that is made of it."""
    assert not [offer for offer in OFFERS if isinstance(offer, str)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_KERNEL
def test_kernels_pass_their_trial(kernel: Kernel, dtype: torch.dtype) -> None:
    """What is tried before the first step is passed on this device, with all that a kernel can do."""
    for features in (frozenset[str](), kernel.features):
        assert trial.failure(kernel, DEVICE, dtype, features) is None
    assert choose_kernel("cuda", dtype, frozenset({WINDOW, SINKS})).name == KERNELS[0].name


@EACH_KERNEL
def test_another_layout_fails_the_trial(kernel: Kernel) -> None:
    """The trial can fail on this device: heads in another order in the log-sum-exp, or a backward without it."""
    assert kernel.forward is not None
    assert kernel.backward is not None
    forward, backward = kernel.forward, kernel.backward

    def other_order(*call: Any) -> Any:
        out, lse = forward(*call)
        return out, lse.flip(1)

    def its_own(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, segments: Any, scores: Any) -> Any:
        return backward(grad, q, k, v, *forward(q, k, v, segments, scores), segments, scores)

    for wrong, words in (
        (replace(kernel, forward=other_order), "log-sum-exp is off"),
        (replace(kernel, backward=its_own), "gradient of queries is off"),
    ):
        assert words in str(trial.failure(wrong, DEVICE, torch.bfloat16, frozenset()))


@EACH_KERNEL
def test_no_host_sync_in_attention(kernel: Kernel) -> None:
    """At degree 1 a layer's attention never makes the host wait for the device, forward or backward."""
    from hf_hetero.attention.context import AttentionContext
    from hf_hetero.attention.interface import hetero_attention
    from hf_hetero.layout import contiguous

    context = AttentionContext(contiguous(LENGTHS, 1), (0,), 0, None, "ulysses", kernel, DEVICE)
    q, k, v = (
        torch.randn(1, h, sum(LENGTHS), 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)
    )
    sinks = torch.zeros(8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    module = torch.nn.Identity()

    def layer() -> torch.Tensor:
        out, _ = hetero_attention(module, q, k, v, None, sliding_window=128, s_aux=sinks, hetero=context)
        grads = torch.autograd.grad(out, [q, k, v, sinks], torch.ones_like(out))
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape, sinks.shape]
        return out

    layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = layer()  # raises at a sync
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
