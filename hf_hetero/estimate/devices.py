"""Devices are cards by name, with what their data sheets say, and CPUs, which are timed."""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass

import torch

from hf_hetero.errors import ConfigError
from hf_hetero.estimate.model_shape import ModelShape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """`Device` is the speed of one rank's device: what a data sheet says, or (`shares.reached`) what training reaches.

    Args:
        flops: dense operations a second in the training type.
        link_bytes_per_s: what one rank sends in an all-to-all inside a node.
        network_bytes_per_s: what one rank's part of its node's network carries when all ranks send.
        latency_s: fixed time of one exchange.
        layer_s: fixed time of a layer's forward and backward pass, whatever it holds.
        host_bytes_per_s: what one rank copies to or from its host.
        ring_overlap: share of a ring's attention behind which its exchange hides.
        attention_flops: operations a second in attention; None: `flops`.
        attention_tokens: tokens that a sample's attention takes longer by, at each of its tokens.
        card_bytes: memory of the card; None: unknown.
        card_bytes_per_s: what that memory reads or writes; None: `flops` was timed with all that is read and written.
        generation: which instructions it has, and so how fast a kernel of attention is: a key of `shares.ATTENTION`.
    """

    name: str
    flops: float
    link_bytes_per_s: float
    network_bytes_per_s: float = 6e9
    latency_s: float = 3e-5
    layer_s: float = 3e-3  # see `shares`: fitted together with the shares there
    host_bytes_per_s: float = 12e9  # one way to page-locked memory: half of PCIe 4.0 x16, for ranks share a switch
    ring_overlap: float = 0.5  # assumed: half of the time a kernel leaves the links free, or the copies slow it down
    attention_flops: float | None = None
    attention_tokens: float = 0.0
    card_bytes: float | None = None
    card_bytes_per_s: float | None = None
    generation: str = ""


def _card(name: str, generation: str, tflops: float, link_gb: float, gib: float, gb_per_s: float) -> Device:
    """Make an entry of the table: its columns are TFLOP/s, GB/s of a link, GiB of memory, GB/s of memory."""
    return Device(
        name, tflops * 1e12, link_gb * 1e9, card_bytes=gib * GIB, card_bytes_per_s=gb_per_s * 1e9, generation=generation
    )


# Peak dense bf16 (fp16 for V100 and T4) operations a second, with sums in fp32, and memory bandwidth, from the data
# sheet, product page or architecture paper of each product (NVIDIA's and AMD's); where one gives only the figure with
# sparsity, half of that. A MI250X or MI250 is two devices, and so half of the product here.
# Memory: what the driver reports where that is known, which error correction makes less than the product's name says.
# Links: a fifth of the two-way figure of NVLink or Infinity Fabric, which is what FlexSP measured on A100 (600 GB/s ->
# 100-120 GB/s, arXiv:2412.01523, released solver); 12 GB/s where there is only PCIe, or a bridge between two cards.
KNOWN_DEVICES = (
    _card("GB300", "Blackwell", 2500, 360, 268, 8000),
    _card("B300", "Blackwell", 2250, 360, 268, 8000),
    _card("GB200", "Blackwell", 2500, 360, 184, 8000),
    _card("B200", "Blackwell", 2250, 360, 179, 8000),
    _card("RTX PRO 6000 Blackwell Server", "RTX Blackwell", 503.8, 12, 95.6, 1597),
    _card("RTX PRO 6000 Blackwell Max Q", "RTX Blackwell", 438.9, 12, 95.6, 1792),
    _card("RTX PRO 6000 Blackwell", "RTX Blackwell", 503.8, 12, 95.6, 1792),
    _card("RTX 5090", "RTX Blackwell", 209.5, 12, 31.8, 1792),
    _card("GH200 144G HBM3e", "Hopper", 989, 180, 140, 4900),
    _card("GH200", "Hopper", 989, 180, 95, 4000),
    _card("H200 NVL", "Hopper", 835, 12, 140, 4800),
    _card("H200", "Hopper", 989, 180, 140, 4800),
    _card("H100 PCIe", "Hopper", 756, 12, 79.6, 2000),
    _card("H100 NVL", "Hopper", 835, 12, 93.6, 3900),
    _card("H100", "Hopper", 989, 180, 79.6, 3350),
    _card("H800", "Hopper", 989, 80, 79.6, 3350),
    _card("H20", "Hopper", 148, 180, 95.6, 4000),
    _card("A100 PCIe 40GB", "Ampere", 312, 12, 39.4, 1555),
    _card("A100 PCIe", "Ampere", 312, 12, 79.2, 1935),
    _card("A100 40GB", "Ampere", 312, 110, 39.4, 1555),
    _card("A100", "Ampere", 312, 110, 79.2, 2039),
    _card("A800", "Ampere", 312, 80, 79.2, 2039),
    _card("A40", "Ampere", 149.7, 12, 44.6, 696),
    _card("A30", "Ampere", 165, 12, 23.6, 933),
    _card("A10G", "Ampere", 70, 12, 22.2, 600),
    _card("A10", "Ampere", 125, 12, 22.1, 600),
    _card("RTX A6000", "Ampere", 154.8, 12, 47.5, 768),
    _card("RTX A5000", "Ampere", 111.1, 12, 23.6, 768),
    _card("RTX 3090", "Ampere", 71, 12, 23.7, 936),
    _card("L40S", "Ada", 362, 12, 44.5, 864),
    _card("L40", "Ada", 181, 12, 44.5, 864),
    _card("L20", "Ada", 119.5, 12, 44.5, 864),
    _card("L4", "Ada", 121, 12, 22.1, 300),
    _card("RTX 6000 Ada", "Ada", 364, 12, 47.5, 960),
    _card("RTX 4090", "Ada", 165, 12, 23.6, 1008),
    _card("V100 32GB", "Volta", 125, 50, 31.7, 900),
    _card("V100", "Volta", 125, 50, 15.8, 900),
    _card("T4", "Turing", 65, 8, 14.6, 320),
    _card("MI355X", "CDNA", 2516, 215, 288, 8000),
    _card("MI350X", "CDNA", 2307, 215, 288, 8000),
    _card("MI325X", "CDNA", 1307, 180, 256, 6000),
    _card("MI300X", "CDNA", 1307, 180, 192, 5300),
    _card("MI250X", "CDNA", 191.5, 50, 64, 1600),
    _card("MI250", "CDNA", 181, 50, 64, 1600),
    _card("MI210", "CDNA", 181, 12, 64, 1600),
)


def known_device(name: str) -> Device | None:
    """Return the table's entry for a GPU by its driver's name, such as "NVIDIA A100-SXM4-80GB"; None if it has none.

    Every word of an entry is a word of the name; the entry with the most words is meant.
    """
    words = _words(name)
    return max((d for d in KNOWN_DEVICES if _words(d.name) <= words), key=lambda d: len(_words(d.name)), default=None)


def device_named(name: str) -> Device:
    """Return the table's entry for a GPU by a name that a person typed: "H100", "a100-40gb", "RTX4090".

    Raises:
        ConfigError: the table has none, with those that are near.
    """
    by_letters = {_letters(device.name): device for device in KNOWN_DEVICES}
    if (found := by_letters.get(_letters(name)) or known_device(name)) is not None:
        return found
    near = difflib.get_close_matches(_letters(name), by_letters, n=4, cutoff=0.4)
    names = [by_letters[letters].name for letters in near] or [device.name for device in KNOWN_DEVICES]
    raise ConfigError(
        f"No GPU is known as {name!r:.60}: {'did you mean ' if near else 'there are '}{', '.join(names)}? For another "
        "one, estimate the nearest, and change in its JSON file what is yours."
    )


def _words(name: str) -> set[str]:
    """Return the words and numbers of a name."""
    return set(re.findall("[a-z0-9]+", name.lower()))


def _letters(name: str) -> str:
    """Return the letters and figures of a name, so that "RTX4090" is "RTX 4090"."""
    return "".join(re.findall("[a-z0-9]+", name.lower()))


TIMED_S = 0.2
"""Seconds that a CPU is timed, on each rank. What that is off by, refits mend."""


def cpu_device(shape: ModelShape, dtype: torch.dtype) -> Device:
    """Return the CPU that this process runs on, timed on all ranks at once, as training will run.

    The exchange is gloo over loopback: about 1 GB/s and 2 ms, assumed; so is that attention is as fast as products, but
    for the softmax, which takes a quarter more.
    """
    flops = cpu_flops(shape, dtype)
    return Device("CPU", flops, 1e9, 1e9, latency_s=2e-3, layer_s=2e-3, ring_overlap=0.0, attention_flops=0.78 * flops)


def cpu_flops(shape: ModelShape, dtype: torch.dtype) -> float:
    """Time matrix products of the model's own sizes; return their operations a second."""
    tokens, products = 512, 0
    own = torch.Generator().manual_seed(0)  # torch's decides the order of rows
    x = torch.randn(tokens, shape.hidden, generator=own).to(dtype)
    up = torch.randn(shape.hidden, shape.intermediate, generator=own).to(dtype)
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < TIMED_S:
        torch.nn.functional.silu(x @ up)
        products += 1
    return products * 2 * tokens * shape.hidden * shape.intermediate / elapsed
