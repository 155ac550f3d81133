"""How long a checkpoint stops the loop of training: `python benchmarks/trainer/measure_saving.py`.

Two gloo ranks under DDP with AdamW, one thread each, on this machine's CPU: the quickstart's model, and one of 300 MB.
In one run, every other checkpoint is written at once, the rest beside training, so that whatever else the machine does
hits both. The first of each is not counted. Medians, of rank 0, and the longest.

A thread that writes also takes something from the steps beside it: the processor, the interpreter's lock, the disk. So
steps while a checkpoint is being written stand beside steps without one. `--kind` shards the weights, as FSDP2 does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers import run_ranks, shard_on_cpu
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_hetero import HeteroConfig, HeteroTrainer

MODELS: dict[str, dict[str, int]] = {
    "quickstart": {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1},
    "300 MB": {"vocab_size": 12000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8},
}
LENGTH = 48
"""Tokens of a sample: what a step takes does not matter here, as long as it is longer than nothing."""


class Timed(HeteroTrainer):
    """Writes every other checkpoint at once, and notes how long each stops the loop, and how long steps take."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stops: list[tuple[bool, float]] = []
        self.steps: list[tuple[bool, float]] = []
        self.saved_s, self.ended = 0.0, time.perf_counter()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        assert self._training is not None
        self.steps.append((self._training.writing is not None, now - self.ended))
        is_due, self.saved_s = self.control.should_save, 0.0
        if is_due:
            self._announce(waits=True)  # the one before is given the time that it takes
            now = time.perf_counter()
            self.hetero.save_in_background = len(self.stops) % 2 == 1
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_due:
            self.stops.append((self.hetero.save_in_background, time.perf_counter() - now))
        self.ended = time.perf_counter()


def run(name: str, kind: str, saves: int, steps_between: int, parent: str | None) -> dict[str, Any]:
    """Train on a rank; seconds of stops and steps, and bytes of a checkpoint."""
    torch.manual_seed(0)
    world = dist.get_world_size()
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-4, "report_to": [], "disable_tqdm": True}
    options |= {"use_cpu": True, "dataloader_pin_memory": False, "logging_strategy": "no", "save_total_limit": 1}
    if kind != "DDP":
        shard_on_cpu()
        plugin = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind}
        options |= {"fsdp": True, "fsdp_config": plugin}
    rows = [{"input_ids": torch.randint(3, 4000, (LENGTH,)).tolist()} for _ in range(64)]
    for row in rows:
        row["labels"] = row["input_ids"]
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        folders: list[Any] = [folder]
        dist.broadcast_object_list(folders)
        args = TrainingArguments(
            folders[0],
            per_device_train_batch_size=4,
            max_steps=saves * steps_between,
            save_strategy="steps",
            save_steps=steps_between,
            **options,
        )
        sizes = {**MODELS[name], "num_attention_heads": 4, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes))  # pyright: ignore
        hetero = HeteroConfig(max_tokens_per_rank=LENGTH * 4 * world, calibrate=False, solver="fast")
        trainer = Timed(model=model, args=args, train_dataset=rows, hetero=hetero)
        trainer.train()
        dist.barrier()
        files = [path for path in Path(folders[0]).glob("checkpoint-*/**/*") if path.is_file()]
        found = {"stops": trainer.stops[2:], "steps": trainer.steps[1:], "bytes": sum(p.stat().st_size for p in files)}
        dist.barrier()
        return found


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    at_once, beside = ([s for later, s in found["stops"] if later == is_later] for is_later in (False, True))
    usual, busy = ([s for later, s in found["steps"] if later == is_later] for is_later in (False, True))
    stops = [f"{median(x):.3f} ({max(x):.3f})" for x in (at_once, beside)]
    steps = [f"{median(x):.3f}" if x else "-" for x in (usual, busy)]
    share = f"{median(beside) / median(at_once):.1%}"
    return f"| {name} | {found['bytes'] / 1e6:,.0f} | {' | '.join(stops)} | {share} | {' | '.join(steps)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], action="append", help="default: each")
    parser.add_argument("--kind", choices=["DDP", "FULL_STATE_DICT", "SHARDED_STATE_DICT"], default="DDP")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=12, help="checkpoints, half of them written at once")
    parser.add_argument("--steps-between", type=int, default=10)
    parser.add_argument("--folder", help="where checkpoints are written: the disk that is measured; default: /tmp")
    asked = parser.parse_args()
    if asked.saves < 4 or asked.saves % 2:
        parser.error("--saves must be even, and at least 4: the first of each is not counted")
    print("| model | MB | stops, at once (s) | beside training (s) | share | step (s) | step beside a writing (s) |")
    print("|---|---|---|---|---|---|---|")
    for name in asked.model or MODELS:
        args = name, asked.kind, asked.saves, asked.steps_between, asked.folder
        print(line(name, run_ranks(run, asked.ranks, *args, timeout_s=3600)[0]), flush=True)


if __name__ == "__main__":
    main()
