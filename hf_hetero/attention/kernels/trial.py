"""A trial: a kernel computes tiny packs on the device, before the first step, and is held to attention's definition.

A signature says how a function is called, and not what it gives back. Versions differ in the layout of the log-sum-exp
(of the pack, or of each run, padded to the longest), in how a causal run with more keys than queries is aligned, and in
what a backward makes of a log-sum-exp over more keys than its own. Each of these would train on in silence, wrongly.
The packs have grouped heads, runs of unequal lengths, runs of one query, and the window or softcap of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from hf_hetero.attention.kernels import plain
from hf_hetero.attention.kernels.contract import SINKS, SOFTCAP, WINDOW, Kernel, Scores, Segments
from hf_hetero.attention.kernels.plain import PLAIN

HOST = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
Pack = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Lengths of the runs of queries and of keys, and whether they are causal."""
PACKS: tuple[Pack, ...] = (
    ((1, 3, 70), (5, 3, 130), True),
    ((1, 1, 1), (3, 140, 1), True),
    ((1, 1, 1), (3, 140, 1), False),
    ((2, 66), (131, 9), False),
)
GRADIENTS = ("gradient of queries", "gradient of keys", "gradient of values")
ALLOWED = 0.05
"""Largest difference from the definition, as a share of the largest magnitude: many times what a half type's rounding
makes, and far below what another layout makes."""


def failure(kernel: Kernel, device: torch.device, dtype: torch.dtype, features: frozenset[str]) -> str | None:
    """Return in words what a kernel computes wrongly on a device; None if it is right.

    Waits for the device. All ranks have the same packages and the same kind of device, and come to the same answer.

    Args:
        kernel: to be tried.
        device, dtype: where, and in which type.
        features: what the model's layers use, and thus what is tried.

    Raises:
        torch.OutOfMemoryError: the device is full, which says nothing of the kernel.
    """
    softcap = 2.0 if SOFTCAP in features else None
    windows = (None, 4) if WINDOW in features else (None,)  # a model with windows has layers without, too
    for pack, window in product(PACKS, windows):
        if not pack[2] and (window is not None or not kernel.has_lse):
            continue  # queries that meet all keys of their run have no window, and only a ring has them
        scores = Scores(HEAD_DIM**-0.5, window, softcap)
        sinks = torch.linspace(-1, 1, HEADS, device=HOST) if SINKS in features else None
        try:
            for name, ours, theirs in _comparisons(kernel, pack, device, dtype, scores, sinks):
                if ours.shape != theirs.shape:
                    return f"its {name} has the shape {tuple(ours.shape)} where {tuple(theirs.shape)} is wanted"
                difference, largest = (ours.cpu().double() - theirs).abs().max(), theirs.abs().max()
                if not difference <= ALLOWED * largest:  # so that nan, which is not above anything, is wrong too
                    return f"its {name} is off by {difference:.2g} where the largest is {largest:.2g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a library raises where it does not run: each has its own
            return f"it fails on this device: {error}"
    return None


def _comparisons(
    kernel: Kernel,
    pack: Pack,
    device: torch.device,
    dtype: torch.dtype,
    scores: Scores,
    sinks: torch.Tensor | None,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield what a kernel makes of a pack, by name, and what it is by definition: in fp64, on the CPU."""
    inputs = _inputs(pack, dtype)
    ours = [x.to(device) for x in inputs], Segments.of(*pack[:2], device, pack[2])
    theirs = [x.double() for x in inputs], Segments.of(*pack[:2], HOST, pack[2])
    if kernel.forward is None or kernel.backward is None:
        # a pair knows nothing of sinks, which are merged in afterwards; another kernel has them itself
        on_device = None if sinks is None else sinks.to(device, dtype)
        found = _differentiated(kernel, *ours, replace(scores, sinks=on_device))
        expected = _differentiated(PLAIN, *theirs, replace(scores, sinks=sinks))
        yield from zip(("output", *GRADIENTS), found, expected, strict=True)
        return
    (q, k, v, grad), segments = ours
    (q64, k64, v64, grad64), segments64 = theirs
    out, lse = kernel.forward(q, k, v, segments, scores)
    out64, lse64 = plain.forward(q64, k64, v64, segments64, scores)
    yield "output", out, out64
    yield "log-sum-exp", lse, lse64
    # as if merged over more keys than these, like the blocks of a ring
    merged, merged_lse = (0.7 * out64).to(dtype), (lse64 + 0.3).float()
    found = kernel.backward(grad, q, k, v, merged.to(device), merged_lse.to(device), segments, scores)
    expected = plain.backward(grad64, q64, k64, v64, merged.double(), merged_lse.double(), segments64, scores)
    yield from zip(GRADIENTS, found, expected, strict=True)


def _inputs(pack: Pack, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw queries, keys, values and the gradient of the output, on the CPU, from random numbers of their own."""
    generator = torch.Generator().manual_seed(0)
    num_q, num_k = sum(pack[0]), sum(pack[1])
    shapes = ((num_q, HEADS), (num_k, KV_HEADS), (num_k, KV_HEADS), (num_q, HEADS))
    drawn = (torch.randn(*x, HEAD_DIM, generator=generator, dtype=torch.float32, device=HOST) for x in shapes)
    return [x.to(dtype) for x in drawn]


def _differentiated(
    kernel: Kernel, inputs: list[torch.Tensor], segments: Segments, scores: Scores
) -> list[torch.Tensor]:
    """Return output and gradients of a kernel that autograd differentiates."""
    *qkv, grad = inputs
    with torch.enable_grad():  # a kernel is chosen for evaluation, too
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = kernel(leaves[0], leaves[1], leaves[2], segments, scores)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
