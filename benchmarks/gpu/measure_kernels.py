"""The whole attention call against the raw kernel: `python benchmarks/gpu/measure_kernels.py --device cpu`.

On packs of real lengths, forward and backward, for every kernel that is installed. The whole call is the function that
transformers calls, with tensors laid out as its models make them; the raw kernel is the pair of functions beneath it.
The goal: the whole call keeps 97 % of the kernel's speed, and never makes the host wait for the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from exchange_by_hand import Pack
from shapes import SHAPES, mix_pack
from stage import Stage, begin, seconds_in_turns, waits_for_device

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.interface import hetero_attention
from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.attention.kernels.contract import Kernel, Scores, Segments
from hf_hetero.attention.kernels.cuda import torch_varlen
from hf_hetero.attention.kernels.flash import flash_kernels
from hf_hetero.layout import contiguous

GOAL = 0.97


def packs(stage: Stage) -> dict[str, list[int]]:
    """Lengths of each pack."""
    return {
        "wiki, 16K": mix_pack("wiki-192k", stage.pick(16384, 128), stage.pick(16384, 64)),
        "github, 64K": mix_pack("github", stage.pick(65536, 192), stage.pick(32768, 96)),
        "64 of 256": [stage.pick(256, 16)] * stage.pick(64, 4),
        "one of 32K": [stage.pick(32768, 96)],
    }


def kernels(stage: Stage) -> list[Kernel]:
    """The one that a run would take first, then the others."""
    chosen = choose_kernel(stage.device.type, torch.bfloat16)
    others = [*flash_kernels(), torch_varlen()] if stage.device.type == "cuda" else []
    # what is installed and cannot be used is told in words instead
    usable = [kernel for kernel in (chosen, *others) if isinstance(kernel, Kernel) and kernel.has_lse]
    return list({kernel.name: kernel for kernel in usable}.values())


def calls(pack: Pack, kernel: Kernel, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Forward and backward: what is called raw, and whole."""
    lengths, scores = list(pack.lengths), Scores(pack.q.shape[2] ** -0.5)
    segments = Segments.packed(lengths, device)
    context = AttentionContext(contiguous(lengths, 1), (0,), 0, None, "ulysses", kernel, device)
    # as a model makes them: heads of a token side by side, then seen as (1, heads, tokens, size)
    leaves = [x.detach().requires_grad_() for x in (pack.q, pack.k, pack.v)]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in leaves)
    module, grad = torch.nn.Identity(), pack.grad.unsqueeze(0)
    assert kernel.forward is not None
    assert kernel.backward is not None
    out, lse = kernel.forward(pack.q, pack.k, pack.v, segments, scores)

    def whole() -> torch.Tensor:
        return hetero_attention(module, q, k, v, None, scaling=scores.scaling, hetero=context)[0]

    kept = whole()
    raw_saved = (pack.grad, pack.q, pack.k, pack.v, out, lse, segments, scores)
    return (
        {"raw": partial(kernel.forward, pack.q, pack.k, pack.v, segments, scores), "whole": whole},
        {
            "raw": partial(kernel.backward, *raw_saved),
            "whole": partial(torch.autograd.grad, kept, leaves, grad, retain_graph=True),
        },
    )


def compare(stage: Stage, kernel: Kernel, shape: str, heads: tuple[int, int, int]) -> None:
    """A kernel on all packs."""
    num_heads, _, size = heads
    for name, lengths in packs(stage).items():
        if stage.left_s < stage.pick(8, 1):
            stage.note(f"No time left for {kernel.name} on {name!r} with heads of {shape}.")
            continue
        with stage.alone(f"{kernel.name} on {name!r} with heads of {shape}"):
            pack = Pack.random(lengths, heads, stage.device, torch.bfloat16)
            forward, backward = calls(pack, kernel, stage.device)
            flops = 2 * num_heads * size * sum(n * n for n in lengths)  # causal: half of all pairs
            for direction, pair, operations in (("forward", forward, flops), ("backward", backward, 2.5 * flops)):
                taken = seconds_in_turns(stage.device, pair, stage.pick(7, 1))
                kept = taken["raw"] / taken["whole"]
                stage.row(
                    "The whole attention call against the raw kernel",
                    kernel=kernel.name,
                    heads=shape,
                    pack=name,
                    direction=direction,
                    **{"raw (ms)": round(1e3 * taken["raw"], 3), "whole (ms)": round(1e3 * taken["whole"], 3)},
                    kept=round(kept, 3),
                    goal="met" if kept >= GOAL else "MISSED",
                    **{"TFLOP/s": round(operations / taken["whole"] / 1e12, 1)},
                    **{"host waits": waits_for_device(stage.device, pair["whole"])},
                )


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    found = kernels(stage)
    stage.fact("kernels", [kernel.name for kernel in found])
    shapes = {name: SHAPES[name].heads for name in ("qwen3-8b-lora", "llama-3.2-1b")}
    for kernel in found:
        for name, heads in stage.pick(shapes, {"tiny": (8, 4, 16)}).items():
            compare(stage, kernel, name, heads)
    stage.done()


if __name__ == "__main__":
    main()
