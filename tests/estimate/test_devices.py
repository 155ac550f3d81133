"""A GPU is found by what its driver calls it, or by what people type; a CPU is timed."""

from __future__ import annotations

import pytest
import torch
from estimate.test_operations import shape

from hf_hetero.errors import ConfigError
from hf_hetero.estimate.devices import GIB, KNOWN_DEVICES, cpu_flops, device_named, known_device
from hf_hetero.estimate.memory import free_memory_bytes

DRIVER_NAMES = {
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H20": "H20",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "Tesla V100-SXM2-32GB": "V100 32GB",
    "Tesla T4": "T4",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI325X": "MI325X",
    "AMD Instinct MI355X": "MI355X",
    "AMD Instinct MI250X": "MI250X",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA GH200 144G HBM3e": "GH200 144G HBM3e",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB300": "GB300",
    "NVIDIA L20": "L20",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000 Blackwell Server",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX PRO 6000 Blackwell Max Q",
    "NVIDIA RTX PRO 4000 Blackwell": None,
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "Tesla V100-SXM2-16GB": "V100",
    "NVIDIA RTX A1000": None,
    "NVIDIA A16": None,
    "NVIDIA RTX 4000 Ada Generation": None,
    "Quadro RTX 6000": None,
}


@pytest.mark.parametrize("name", DRIVER_NAMES)
def test_a_device_is_found_by_whole_words(name: str) -> None:
    """A name that begins like another one is another device; one that the table lacks is not taken for one it has."""
    found = known_device(name)
    assert (found and found.name) == DRIVER_NAMES[name]


TYPED = {
    "H100": "H100",
    "h100": "H100",
    "RTX4090": "RTX 4090",
    "a100-40gb": "A100 40GB",
    "A100-SXM4-80GB": "A100",
    "l40": "L40",
    "RTX PRO 6000 Blackwell": "RTX PRO 6000 Blackwell",
}


@pytest.mark.parametrize("name", TYPED)
def test_a_device_is_found_by_what_people_type(name: str) -> None:
    """Case, spaces and hyphens do not matter; a driver's name does as well."""
    assert device_named(name).name == TYPED[name]


def test_an_unknown_device_is_refused_with_near_ones() -> None:
    """What has a like name is named; where nothing is near, all are."""
    with pytest.raises(ConfigError, match=r"'H1000'.*did you mean H100.*change in its JSON"):
        device_named("H1000")
    with pytest.raises(ConfigError, match=r"there are GB300, .*MI210"):
        device_named("???")


def test_the_table_holds_what_a_data_sheet_may_say() -> None:
    """Each name once; memory, its bandwidth, links and operations in the range that cards have, in these units."""
    names = [device.name for device in KNOWN_DEVICES]
    assert len(set(names)) == len(names)
    for device in KNOWN_DEVICES:
        assert device.card_bytes is not None
        assert device.card_bytes_per_s is not None
        assert 14 * GIB < device.card_bytes < 300 * GIB
        assert 3e11 <= device.card_bytes_per_s <= 8e12
        assert 6e13 < device.flops <= 2.52e15
        assert 8e9 <= device.link_bytes_per_s <= 360e9
        assert device.generation


def test_this_machine() -> None:
    """The CPU's speed and free memory are measured, and plausible."""
    assert 1e8 < cpu_flops(shape(), torch.float32) < 1e14
    assert 2**20 < free_memory_bytes(torch.device("cpu"), 2) < 2**45
