"""Peak memory and time of the loss, whole and in chunks: `python benchmarks/model/measure_lm_head.py`.

Each runs in a process of its own, one thread, forward and backward of head and loss in fp32. Memory is the highest
resident set less that before the loss (weights and hidden states).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_hetero.model.lm_head import LazyLogits
from hf_hetero.model.loss import token_loss

KINDS = ("whole", "chunked")


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(kind: str, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
    """Head and loss in this process: bytes, seconds, the loss and the norm of the head's gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    states = torch.randn(1, tokens, hidden, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    head.weight.grad = torch.zeros_like(head.weight)
    before, start = resident("VmRSS"), time.perf_counter()
    logits: Any = head(states) if kind == "whole" else LazyLogits.of(states, head.weight, None, ())
    loss = token_loss(logits, None, vocabulary, num_items_in_batch=tokens, shift_labels=labels)
    del logits
    loss.backward()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    return {"bytes": peak, "seconds": seconds, "loss": loss.item(), "gradient": float(head.weight.grad.norm())}


def compare(tokens: int, vocabulary: int, hidden: int) -> dict[str, dict[str, float]]:
    """Both, each in a process of its own."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, str(tokens), str(vocabulary), str(hidden), "--kind", kind]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found[kind] = json.loads(ran.stdout)
    return found


def main() -> None:
    """Print one line a kind, and the share of memory; under `--kind`, that one's numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("tokens", 8192), ("vocabulary", 131072), ("hidden", 512)):
        parser.add_argument(name, type=int, nargs="?", default=size)
    parser.add_argument("--kind", choices=KINDS, help="measure this one here, and print it as JSON")
    options = parser.parse_args()
    sizes = (options.tokens, options.vocabulary, options.hidden)
    if options.kind is not None:
        print(json.dumps(measured(options.kind, *sizes)))
        return
    found = compare(*sizes)
    for kind, row in found.items():
        print(f"{kind:8} {row['bytes'] / 2**30:6.2f} GiB {row['seconds']:7.1f} s   loss {row['loss']:.6f}")
    print(f"share    {found['chunked']['bytes'] / found['whole']['bytes']:6.2f}")


if __name__ == "__main__":
    main()
