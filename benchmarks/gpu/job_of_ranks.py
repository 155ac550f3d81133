"""One rank of a job that `measure_jobs.py` has started: it trains case after case, and writes what came of each.

`python benchmarks/gpu/job_of_ranks.py DEVICE FOLDER CASE ...`, with RANK, WORLD_SIZE and the like in the environment.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shapes import mix_lengths, samples
from short_runs import arguments
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_hetero import Group, HeteroConfig, HeteroTrainer, MicroBatch, Plan
from hf_hetero.plan import METHODS

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 4096}
GLOBAL_BATCH, NUM_STEPS = 8, 4
FSDP = ("fp32-fsdp2", "bf16-fsdp2", "bf16-fsdp2-offload")
SAVING = "fp32-saved-beside-and-resumed"
REPEATED = "memory ends on rank 1"
FAULTS = {
    REPEATED: "both go on, with another plan",
    "rank 1 is killed": "rank 0 ends in words",
    "rank 1 stands still": "rank 0 ends in words, within its limit",
}
LIMIT_S, STACKS_S = 15, 50
PATIENCE_S, LATER_S = 5, 12
"""After so long torch's monitor ends a process that it takes for lost (eight minutes, by itself); seen by then."""


@dataclass(frozen=True)
class Source:
    """Plans of one method: all ranks together, or groups of several sizes by turns."""

    num_ranks: int
    method: str | None
    activations: str | None

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Two micro-batches, so that gradients add up."""
        everyone = tuple(range(self.num_ranks))
        halves = [tuple(range(0, len(lengths), 2)), tuple(range(1, len(lengths), 2))]
        micro_batches: list[MicroBatch] = []
        for number, rows in enumerate(halves):
            if self.method is None and number:  # one sample on a rank of its own at a time
                groups = [
                    Group((rank,), rows[rank :: self.num_ranks], activations=self.activations) for rank in everyone
                ]
            else:
                method = self.method or "gather"
                blocks = 2 if method == "ulysses_ring" else None
                groups = [Group(everyone, rows, method, blocks, self.activations)]
            micro_batches.append(MicroBatch(tuple(groups)))
        return Plan(self.num_ranks, tuple(micro_batches), seconds=1.0, lower_bound_s=1.0)

    static = plan

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """They are as they should be."""
        return plan

    def close(self) -> None:
        """Nothing is open."""


def model_of(device: torch.device) -> Any:
    """A small model whose heads four ranks can share; the same everywhere."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.use_cache = False
    return Qwen3ForCausalLM(config).to(device)


def train(case: str, device: torch.device, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Some steps of plain gradient descent, and how far weights have moved."""
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    dtype, _, method = case.partition("-")
    planned = None if method not in METHODS else method
    source = Source(world, "gather" if "saved" in method else planned, "offload" if "offload" in method else None)

    class Scripted(HeteroTrainer):
        def _plan_source(self) -> Any:
            return source

    model = model_of(device)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    most = 1500 if device.type == "cuda" else 60
    data = samples(mix_lengths("github", GLOBAL_BATCH * NUM_STEPS, most), SIZES["vocab_size"])
    changes: dict[str, Any] = {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    changes["bf16"] = dtype == "bf16" and device.type == "cuda"
    if "fsdp2" in method:
        changes |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    hetero = HeteroConfig(group_timeout_s=LIMIT_S, save_in_background="saved" in method)
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as own:
        # the folder of rank 0 is everyone's
        folder: list[Any] = [own]
        if world > 1 and not dist.is_initialized():
            arguments(own, device, 1, 1)  # makes the process group
            _ = arguments(own, device, 1, 1).device
        if world > 1:
            dist.broadcast_object_list(folder, device=device)
        if "saved" in method:
            changes |= {"save_strategy": "steps", "save_steps": 2}

        def trainer(**more: Any) -> Any:
            args = arguments(folder[0], device, GLOBAL_BATCH // world, 1, **{**changes, **more})
            return Scripted(model=model, args=args, train_dataset=data, hetero=hetero, callbacks=list(callbacks))

        running = trainer()
        running.train()
        if "saved" in method:  # once more from the middle: it has to end at the same weights
            model = model_of(device)
            running = trainer()
            running.train(resume_from_checkpoint=str(Path(folder[0]) / "checkpoint-2"))
        wrapper = type(running.model_wrapped).__name__
        moved = {name.removeprefix("module."): whole(p) for name, p in running.model.named_parameters()}
        if world > 1:
            dist.barrier()
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    row = torch.cat([(moved[name] - before[name]).flatten().float().cpu() for name in before])
    # torch says FSDPQwen3... of what FSDP2 shards
    said = {"loss": losses[-1], "wrapper": wrapper, "seconds": round(time.monotonic() - start_s, 1)}
    return {**said, "moved": row}


def whole(p: Any) -> torch.Tensor:
    """All of a weight, wherever its parts are."""
    found = p.full_tensor() if hasattr(p, "full_tensor") else p
    return found.detach()


class Fault(TrainerCallback):
    """What goes wrong inside the model in the second step of rank 1."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device
        self._hook: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Lie in wait."""
        if os.environ["RANK"] == "1" and state.global_step == 1:
            layers = [module for module in model.modules() if type(module).__name__ == "Qwen3DecoderLayer"]
            self._hook = layers[1].register_forward_hook(self._fail)

    def _fail(self, module: Any, inputs: Any, output: Any) -> None:
        self._hook.remove()
        if "memory" in self._name:
            torch.empty(1 << 50, dtype=torch.uint8, device=self._device)
        if "killed" in self._name:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def fail(name: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """How this rank ends where something goes wrong; weights are written where it goes on."""
    start_s = time.monotonic()
    faulthandler.dump_traceback_later(STACKS_S)  # where it stands then
    try:
        said = train("bf16-ring", device, [Fault(name, device)])
        took_s = time.monotonic() - start_s
        if os.environ["RANK"] == "0":
            torch.save(said["moved"], folder / f"{name}.pt")
        time.sleep(LATER_S)
        return {
            "ended": f"trained, last loss {said['loss']:.6f}, after {took_s:.0f} s, and was there {LATER_S} s later"
        }
    except BaseException as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"ended": f"{text}, after {time.monotonic() - start_s:.0f} s"}


def main() -> None:
    """All cases; what is found of each is written at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("cases", nargs="+", help="a dtype and a method, as fp32-gather, or the name of a fault")
    options = parser.parse_args()
    device, folder, cases = options.device, options.folder, options.cases
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    rank, found = os.environ["RANK"], {}
    for case in cases:
        if case in FAULTS:
            found[case] = fail(case, place, folder)
        else:
            forget_accelerate()
            try:
                found[case] = train(case, place)
                moved = found[case].pop("moved")
                if rank == "0":
                    torch.save(moved, folder / f"{case}.pt")
            except Exception as error:
                import traceback

                traceback.print_exc()
                found[case] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        new = folder / f".{rank}.new"
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(folder / f"{rank}.json")
    if any(case in FAULTS for case in cases):
        sys.stdout.flush()
        os._exit(0)  # what is left of the group may wait for ranks that have gone
    if dist.is_initialized():
        dist.destroy_process_group()


def forget_accelerate() -> None:
    """The next case may shard weights where the last one did not: accelerate decides once, for all."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]


if __name__ == "__main__":
    main()
