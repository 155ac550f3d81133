"""What is reached of a card's data sheet depends on the kernel of attention, and on the type computed in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_hetero.estimate.devices import KNOWN_DEVICES, device_named
from hf_hetero.estimate.shares import (
    ASSUMED,
    ATTENTION,
    DENSE,
    attention_share,
    cuda_device,
    kernel_generation,
    reached,
)

KERNELS = {
    "fa2": "fa2",
    "torch_varlen": "fa2",
    "flash_attention_2": "fa2",
    "kernels-community/flash-attn2": "fa2",
    "fa3": "fa3",
    "flash_attention_3": "fa3",
    "kernels-community/flash-attn3": "fa3",
    "kernels-community/vllm-flash-attn3": "fa3",
    "fa4": "fa4",
    "flash_attention_4": "fa4",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_known_by_its_names(kernel: str) -> None:
    """Names of this package's kernels, of transformers and of the hub; torch's own is of the second generation."""
    assert kernel_generation(kernel) == KERNELS[kernel]


def test_a_kernel_is_as_fast_as_the_card_lets_it_be() -> None:
    """The third generation is for Hopper; where nothing is known of a kernel, one share is assumed."""
    hopper, blackwell, amd = (device_named(name) for name in ("H100", "B200", "MI300X"))
    assert attention_share(hopper, "fa3") > attention_share(hopper, "torch_varlen") > attention_share(blackwell, "fa2")
    assert attention_share(amd, "fa2") == attention_share(device_named("T4"), "fa2") == ASSUMED
    generations = {device.generation for device in KNOWN_DEVICES}
    for shares in ATTENTION.values():
        assert set(shares) <= generations
        assert all(0 < share < 1 for share in shares.values())


def test_what_is_reached() -> None:
    """Products and attention at their shares of the peak; links and memory as they are; fp32 without tensor cores."""
    card = device_named("H100")
    found = reached(card, "fa3")
    assert found.flops == DENSE * card.flops
    assert found.attention_flops == ATTENTION["fa3"]["Hopper"] * card.flops
    changed = {name: getattr(found, name) for name in ("flops", "attention_flops", "attention_tokens")}
    assert replace(card, **changed) == found
    assert torch.get_float32_matmul_precision() == "highest"
    assert reached(card, "fa3", torch.float32).flops == found.flops / 16


def test_a_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up by its driver's name, and keeps that; an unknown one counts as an A100 without NVLink."""
    for name, card in (("NVIDIA H200", "H200"), ("NVIDIA Nobody Knows", "A100 PCIe")):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        found = cuda_device(torch.device("cuda"), torch.bfloat16, "fa2")
        assert found == replace(reached(device_named(card), "fa2"), name=name)
