"""What is on this machine, and do the GPU tests pass: `python benchmarks/gpu/measure_machine.py --device cpu`.

Kernels that are found, the speed of products and copies that all other numbers stand on, then `pytest -m gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import torch
from stage import Stage, begin, seconds

from hf_hetero.attention.kernels import choose_kernel, trial
from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.attention.kernels.cuda import torch_varlen
from hf_hetero.attention.kernels.flash import flash_kernels
from hf_hetero.estimate.devices import known_device

ROOT = Path(__file__).parents[2]


def look(stage: Stage) -> None:
    """Names and sizes."""
    device = stage.device
    stage.fact("cores", os.cpu_count())
    stage.fact("host memory (GiB)", round(psutil.virtual_memory().total / 2**30, 1))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        stage.fact("GPU memory (GiB)", round(properties.total_memory / 2**30, 1))
        stage.fact("compute capability", f"{properties.major}.{properties.minor}")
        stage.fact("CUDA of torch", torch.version.cuda)
        with suppress(OSError, subprocess.TimeoutExpired):
            asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
            stage.fact("driver, power limit, highest clock", said)
        known = known_device(torch.cuda.get_device_name(device))
        stage.fact("known as", known.name if known else "no entry of KNOWN_DEVICES")
    for offer in (*flash_kernels(), torch_varlen()):
        if not isinstance(offer, Kernel):
            stage.note(offer)  # installed, and why it cannot be called
        elif device.type != "cuda":
            stage.fact(f"kernel {offer.name}", "there")
        else:
            stage.fact(f"kernel {offer.name}", trial.failure(offer, device, torch.bfloat16, frozenset()) or "does it")
    for dtype in (torch.bfloat16, torch.float32):
        with stage.alone(f"Choosing a kernel for {dtype}"):
            stage.fact(f"kernel for {str(dtype).removeprefix('torch.')}", choose_kernel(device.type, dtype).name)
    stage.fact("schema of the flash operator", str(torch.ops.aten._flash_attention_forward.default._schema))


def speeds(stage: Stage) -> None:
    """Products, and copies on the device, to the host and back."""
    device, size = stage.device, stage.pick(8192, 256)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product_s = seconds(device, lambda: a @ a, stage.pick(10, 2))
    stage.fact("bf16 products (TFLOP/s)", round(2 * size**3 / product_s / 1e12, 3))
    num_bytes = stage.pick(1 << 30, 1 << 22)
    x = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copied_s = seconds(device, partial(y.copy_, x))
    stage.fact("copies on the device (GB/s read and written)", round(2e-9 * num_bytes / copied_s, 1))
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for name, target, source in (("to", host, x), ("from", x, host)):
        taken = seconds(device, partial(target.copy_, source, non_blocking=True))
        stage.fact(f"copies {name} the host (GB/s)", round(1e-9 * num_bytes / taken, 1))


def gpu_tests(stage: Stage) -> None:
    """The tests that need a GPU; elsewhere they are skipped."""
    # no warning is an error here: another release than the tested one may have one more
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-W", "default", "-rfE", "--tb=short"]
    limit_s = max(10.0, stage.left_s - 5)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        stage.fact("pytest -m gpu", f"not through within {limit_s:.0f} s: {said[-300:]}")
        return
    lines = done.stdout.strip().splitlines()
    stage.fact("pytest -m gpu", f"exit code {done.returncode}: {lines[-1] if lines else done.stderr[-300:]}")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            stage.note(line[:300])
    if done.returncode not in (0, 5):
        print(done.stdout[-20_000:], done.stderr[-2000:])


def main() -> None:
    """Look, and write as it comes."""
    stage = begin(__doc__)
    with stage.alone("Looking around"):
        look(stage)
    with stage.alone("Measuring speeds"):
        speeds(stage)
    gpu_tests(stage)
    stage.done()


if __name__ == "__main__":
    main()
