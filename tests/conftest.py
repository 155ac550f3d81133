"""Settings of all tests: no hub, one thread, and the GPU tests only where there is one."""

from __future__ import annotations

import gc
import os

import hypothesis
import pytest
import torch

from hf_hetero.estimate import devices

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
gc.disable()  # while tests are imported and collected, which makes many objects and hardly any garbage
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no trainer of a test needs to look at it each time that it collects garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def a_steady_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of a test goes by how busy the machine was while it was timed; `helpers.run_ranks` does as much."""
    from helpers import CPU_FLOPS  # not above: it imports what reads the environment

    monkeypatch.setattr(devices, "cpu_flops", lambda *_: CPU_FLOPS)
