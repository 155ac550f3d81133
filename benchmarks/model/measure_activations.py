"""Peak memory and time of a step, by what groups do to hold more: `python benchmarks/model/measure_activations.py`.

Each runs in a process of its own, one thread, forward and backward of a model of 4 layers of 1024, MLPs of 4096, in
fp32, with a chunked loss, and chunks of 32 MiB in MLPs. Memory is what tensors take that the step makes. Offloading is
left out: on a CPU the host's memory is the device's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hf_hetero.model import lm_head
from hf_hetero.model.activations import Activations
from hf_hetero.model.chunked_mlp import ChunkedMLP
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.loss import token_loss

KINDS = {  # what groups do, and whether MLPs go in chunks
    "kept": (None, False),
    "recompute": ("recompute", False),
    "recompute, MLPs in chunks": ("recompute", True),
}
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 1024}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1 << 15}


def measured(kind: str, tokens: int) -> dict[str, float]:
    """One step of so many tokens in this process: bytes, seconds, the loss and the norm of the gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDTHS, **HEADS, attn_implementation="sdpa")).train()
    model.loss_function = token_loss
    policy, in_chunks = KINDS[kind]
    activations = Activations(model, recomputes=False, in_chunks=in_chunks, compiled=False)
    ChunkedMLP.chunk_bytes = 1 << 25  # as small beside a layer as 256 MiB are where a rank holds ten times the tokens
    head = lm_head.install(model)
    assert isinstance(head, LeanHead)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids, start = torch.randint(0, 1024, (1, tokens)), time.perf_counter()
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiled, activations.following(policy, None), head.lazy():
        loss = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=tokens).loss
        loss.backward()
    seconds = time.perf_counter() - start
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"bytes": peak_bytes(profiled), "seconds": seconds, "loss": loss.item(), "gradient": float(norm)}


def peak_bytes(profiled: Any) -> int:
    """Most bytes that tensors made meanwhile took at once."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def compare(tokens: int) -> dict[str, dict[str, float]]:
    """All kinds, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        command = [sys.executable, __file__, str(tokens), "--kind", kind]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found[kind] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print one line a kind; under `--kind`, that one's numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int, nargs="?", default=8192)
    parser.add_argument("--kind", choices=KINDS, help="measure this one here, and print it as JSON")
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(measured(options.kind, options.tokens)))
        return
    found = compare(options.tokens)
    for kind, row in found.items():
        share = row["bytes"] / found["kept"]["bytes"]
        print(
            f"{kind:26} {row['bytes'] / 2**30:6.2f} GiB  {share:5.2f}  {row['seconds']:6.1f} s   loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
