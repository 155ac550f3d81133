"""Peak memory and time of the loss, whole and in chunks: `python tests/measure_lm_head.py [TOKENS VOCABULARY HIDDEN]`.

Each runs in a process of its own, one thread, forward and backward of head and loss in fp32. Memory is the highest
resident set less that before the loss (weights and hidden states).
"""

from __future__ import annotations

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


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(kind: str, tokens: int, vocabulary: int, hidden: int) -> dict[str, float]:
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
    for kind in ("whole", "chunked"):
        command = [sys.executable, __file__, kind, str(tokens), str(vocabulary), str(hidden)]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found[kind] = json.loads(ran.stdout)
    return found


def main() -> None:
    if len(sys.argv) == 5:
        print(json.dumps(measured(sys.argv[1], *map(int, sys.argv[2:]))))
        return
    sizes = [int(size) for size in sys.argv[1:]] or [8192, 131072, 512]
    found = compare(*sizes)
    for kind, row in found.items():
        print(f"{kind:8} {row['bytes'] / 2**30:6.2f} GiB {row['seconds']:7.1f} s   loss {row['loss']:.6f}")
    print(f"share    {found['chunked']['bytes'] / found['whole']['bytes']:6.2f}")


if __name__ == "__main__":
    main()
