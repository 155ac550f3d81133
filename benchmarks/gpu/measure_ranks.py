"""Ranks of a group, one after another on one device: `python benchmarks/gpu/measure_ranks.py --device cpu`.

Each method at each degree, first against attention on one rank: is the error that of the kernel's own type? Then how
long each rank computes when what it receives is there: what a degree costs without its network. Efficiency is the time
of one rank for the whole pack by that of the slowest of d ranks, times d.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from exchange_by_hand import Pack, Tensors, VirtualGroup
from shapes import mix_pack
from stage import Stage, begin, seconds

from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.plan import METHODS

DEGREES = (2, 4, 8)
NAMES = ("out", "dq", "dk", "dv")


def equal(stage: Stage, kernel: Kernel) -> None:
    """Errors against fp64: of one rank, and of each group."""
    lengths = stage.pick([4096, *mix_pack("wiki-192k", 4096, 2048)], [64, *mix_pack("wiki-192k", 64, 40)])
    pack = Pack.random(lengths, stage.pick((16, 8, 128), (8, 4, 16)), stage.device, torch.bfloat16)
    exact = VirtualGroup(pack.to(torch.float64), 1, "ulysses", PLAIN).go_round(1)
    single = errors(VirtualGroup(pack, 1, "ulysses", kernel).go_round(1), exact)
    for degree in DEGREES:
        for method in METHODS:
            with stage.alone(f"{method} at degree {degree}"):
                group = VirtualGroup(pack, degree, method, kernel)
                found = errors(group.go_round(), exact)
                ratios = {name: round(found[name] / single[name], 2) for name in NAMES}
                verdict = "yes" if max(ratios.values()) <= 2 else "NO"
                stage.row(
                    "Error by that of one rank (1: the same)",
                    degree=degree,
                    method=method,
                    **ratios,
                    equal=verdict,
                )


def errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    """Largest differences, by name."""
    pairs = zip(NAMES, found, exact, strict=True)
    return {name: max(float((ours.double() - theirs).abs().max()), 1e-30) for name, ours, theirs in pairs}


def small_shards(stage: Stage, kernel: Kernel) -> None:
    """Seconds of each rank with messages at hand."""
    packs = {
        "github, 64K": stage.pick(mix_pack("github", 65536, 32768), mix_pack("github", 192, 100)),
        "one long": stage.pick([32768], [192]),
        "short, 16K": stage.pick(mix_pack("wiki-192k", 16384, 2048), mix_pack("wiki-192k", 128, 40)),
    }
    heads, repeats = stage.pick((32, 8, 128), (8, 4, 16)), stage.pick(5, 1)
    for name, lengths in packs.items():
        pack = Pack.random(lengths, heads, stage.device, torch.bfloat16)
        alone = VirtualGroup(pack, 1, "ulysses", kernel)
        single_s = seconds(stage.device, partial(alone.compute, 0), repeats)
        for degree in DEGREES:
            for method in METHODS:
                if stage.left_s < stage.pick(15, 3):
                    stage.note(f"No time left for {method} at degree {degree} of {name!r}.")
                    continue
                with stage.alone(f"{method} at degree {degree} of {name!r}"):
                    stage.row("Attention of small shards", **shard_row(stage, pack, degree, method, kernel, single_s))


def shard_row(stage: Stage, pack: Pack, degree: int, method: str, kernel: Kernel, single_s: float) -> dict[str, Any]:
    """One group's row."""
    group = VirtualGroup(pack, degree, method, kernel)
    group.go_round()
    repeats = stage.pick(5, 1)
    with group.settled():
        taken = [seconds(stage.device, partial(group.compute, rank), repeats, 1) for rank in range(degree)]
    return {
        "pack": f"{len(pack.lengths)} samples, {sum(pack.lengths):,} tokens",
        "degree": degree,
        "method": method,
        "one rank (ms)": round(1e3 * single_s, 3),
        "slowest of d (ms)": round(1e3 * max(taken), 3),
        "mean of d (ms)": round(1e3 * sum(taken) / degree, 3),
        "efficiency": round(single_s / (degree * max(taken)), 3),
    }


def small_layers(stage: Stage) -> None:
    """The same of what a layer computes with a token alone: an MLP and its gradients."""
    hidden, inner = stage.pick((1024, 3072), (64, 128))
    most = stage.pick(32768, 1024)
    with torch.device(stage.device):
        up, down = torch.nn.Linear(hidden, inner, bias=False), torch.nn.Linear(inner, hidden, bias=False)
    up, down = up.bfloat16(), down.bfloat16()
    whole_s = 0.0
    for degree in (1, *DEGREES):
        x = torch.randn(most // degree, hidden, device=stage.device, dtype=torch.bfloat16, requires_grad=True)

        def step(x: torch.Tensor = x) -> None:
            down(torch.nn.functional.silu(up(x))).sum().backward()

        taken = seconds(stage.device, step, stage.pick(10, 2))
        whole_s = whole_s or taken
        stage.row(
            "MLP of small shards",
            degree=degree,
            tokens=most // degree,
            ms=round(1e3 * taken, 3),
            efficiency=round(whole_s / (degree * taken), 3),
        )


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    kernel = choose_kernel(stage.device.type, torch.bfloat16)
    stage.fact("kernel", kernel.name)
    equal(stage, kernel)
    small_shards(stage, kernel)
    with stage.alone("The MLP of small shards"):
        small_layers(stage)
    stage.done()


if __name__ == "__main__":
    main()
