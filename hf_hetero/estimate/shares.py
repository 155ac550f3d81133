"""Shares say what of a card's data sheet training reaches: few numbers, each measured somewhere or named as assumed.

`benchmarks/estimate/compare_training_runs.py` prints what comes of them beside public measurements: training runs of
Qwen3 0.6B and 4B by prime-rl (its benchmarks/baselines, commit 559b4477) on H100, H200, B200 and RTX A6000. What is
called fitted was fitted to 22 of these, all together, by least squares of the logarithms, each constant held near what
else is known of it (2026-11-26). `Device.layer_s`, 3 ms, is what the smallest of them take beside all that: host's work
for a layer, its FSDP hooks and its recompute, before the GPU has much to do.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_hetero.estimate.devices import Device, known_device

DENSE = 0.59
"""Of the peak, in matrix products of training. Their tokens do not matter from a few thousand on: an eighth of 65,536
takes 0.97 of an eighth of the time in an MLP on H100 (hao-ai-lab/DistCA, commit 2afd2192, profiling data). What a layer
does between products is counted apart (`operations.traffic_bytes`): it is why small hidden sizes reach less."""

ATTENTION_TOKENS = 1000.0
"""What a token's attention costs beside the keys that it meets, in keys. Blocks on the diagonal are computed whole,
and each block of queries begins and ends. Core attention of one document on H100 takes 1.06 ms for 4,096 tokens, 13.5
for 16,384 and 206 for 65,536 (the same data): a (L^2 + 1000 L) is within a tenth of these, and too little for shorter
ones, of which starting the kernel is a part."""

ASSUMED = 0.35
"""Of the peak, where nobody has measured for us: AMD's kernels, and cards without flash attention."""

ATTENTION = {
    # FlashAttention 2 and torch's own kernel, which is made from it, use the instructions of Ampere. They are all that
    # Ampere and Ada have, and, as far as is known, RTX Blackwell; Hopper's and Blackwell's own are several times as
    # fast. Fitted: A6000; H200; B200. FlashAttention 2 by itself: 0.6 to 0.7 on A100, 0.35 on H100 (arXiv:2307.08691,
    # arXiv:2407.08608). Assumed: Ada and RTX Blackwell are like Ampere.
    "fa2": {"Ampere": 0.62, "Ada": 0.62, "RTX Blackwell": 0.62, "Hopper": 0.34, "Blackwell": 0.15},
    # Fitted: H100 and H200. By itself 0.65 to 0.75 forward (arXiv:2407.08608).
    "fa3": {"Hopper": 0.63},
    # Assumed: 0.71 forward on B200 (arXiv:2603.05451), less backward; on Hopper like 3, on RTX Blackwell like 2.
    "fa4": {"Hopper": 0.63, "Blackwell": 0.5, "RTX Blackwell": 0.62},
}
"""Of the peak, in attention forward and backward; kernel -> `Device.generation` -> share."""


def kernel_generation(kernel: str) -> str:
    """Return which of `ATTENTION` a kernel of attention counts as, by its name here or in transformers."""
    for number in ("3", "4"):
        if kernel in (f"fa{number}", f"flash_attention_{number}") or f"flash-attn{number}" in kernel:
            return f"fa{number}"
    return "fa2"


def attention_share(card: Device, kernel: str) -> float:
    """Return the share of its peak that a card reaches in attention, by a kernel's name."""
    return ATTENTION[kernel_generation(kernel)].get(card.generation, ASSUMED)


def reached(card: Device, kernel: str, dtype: torch.dtype = torch.bfloat16) -> Device:
    """Return what training reaches of a card's data sheet.

    Args:
        card: of `devices.KNOWN_DEVICES`.
        kernel: of attention, by its name (`attention.kernels`).
        dtype: that training computes in.
    """
    # fp32 products without tensor cores: the table's peak is that of bf16 on them, about 16 times as much on an A100
    slower = 16 if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else 1
    return replace(
        card,
        flops=DENSE * card.flops / slower,
        attention_flops=attention_share(card, kernel) * card.flops / slower,
        attention_tokens=ATTENTION_TOKENS,
    )


def cuda_device(device: torch.device, dtype: torch.dtype, kernel: str) -> Device:
    """Return what training reaches of this GPU; one that the table lacks counts as an A100 without NVLink."""
    name = torch.cuda.get_device_name(device)
    card = known_device(name) or known_device("A100 PCIe")
    assert card is not None
    return replace(reached(card, kernel, dtype), name=name)
