"""A pair ten times longer than one rank holds is trained by four ranks, all under the same enforced limit."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import largest_difference, run_ranks
from transformers import TrainerCallback
from words import say, tokenizer

from hf_hetero import CostModel, HeteroConfig, HeteroDPOTrainer, InfeasibleBatch
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.costs import ActivationPolicy
from hf_hetero.plan import StepReport

trl = pytest.importorskip("trl")
from preference_pairs import config, model_of  # noqa: E402

DEEP = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
DEEP |= {"num_key_value_heads": 4, "max_position_embeddings": 65536}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's `mallopt`: free bytes from which a heap shrinks, bytes from which memory is the kernel's own, heaps."""
MAPPED_BYTES, SPARE_BYTES = 1 << 15, 8 << 20
"""What is larger has memory of its own; how much room there is for all that is smaller."""
LIMIT_BYTES = 44 << 20
"""What a rank may allocate beyond what it had after a step of short pairs."""
TOO_LONG = 480
"""Tokens of a pair that a rank does not hold under this limit, if it keeps all that backward needs; of 200 it does."""


def map_tensors() -> Any:
    """Let a tensor that is freed go back to the kernel, which counts: none waits in a heap with others around it."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, MAPPED_BYTES), (M_TRIM_THRESHOLD, 1 << 30), (M_ARENA_MAX, 1)):
        assert libc.mallopt(option, value)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return libc


def room_for_the_small() -> list[bytes]:
    """Have free room in the heaps of C and of Python, for who cannot have what is no tensor may abort the process.

    Python's lasts as long as what is returned.
    """
    libc = map_tensors()
    blocks = [libc.malloc(MAPPED_BYTES // 2) for _ in range(2 * SPARE_BYTES // MAPPED_BYTES)]
    for block in blocks:
        libc.free(block)
    objects = [bytes(400) for _ in range(SPARE_BYTES // 400)]
    return objects[::500]


class Limit(TrainerCallback):
    """After the first step, lets this process have so many bytes of data more, and no others: the kernel sees to it."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.trainer, self.room = limit_bytes, None, list[bytes]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            trainer: Any = self.trainer
            every = tuple(range(trainer.args.world_size))
            if len(every) > 1:  # the stacks of its threads, 8 MiB each, are no activations
                dist.all_reduce(torch.zeros(1), group=trainer._run.groups.get(every))
            self.room = room_for_the_small()
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (held + self.limit_bytes, hard))


def lift() -> None:
    """Let this process have what it had before."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class Reports(StepReportCallback):
    def __init__(self) -> None:
        self.found: list[StepReport] = []

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.found.append(report)


def cost_file(folder: str) -> str:
    """Which ranks hold so many tokens, and five times as many when they recompute."""
    policy = ActivationPolicy(0.2, 1.4e-9, 1.4e-6)
    made = CostModel(
        1e-9, 1e-6, 1e-3, 10.0, {2: 1e9, 4: 1e9}, 1.0, 0.0, TOO_LONG, activation_policies={"recompute": policy}
    )
    path = Path(folder) / "cost.json"
    path.parent.mkdir(exist_ok=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        made.save(path)
    if dist.is_initialized():
        dist.barrier()
    return str(path)


def train(folder: str, tokens: int, limit_bytes: int | None, planned: bool) -> dict[str, Any]:
    """A step of four short pairs, then one that has a pair of so many tokens; what was learned, and how it was held."""
    import datasets

    map_tensors()
    half = tokens // 2
    long = {"prompt": say(half - 60, 3), "chosen": " " + say(60, 1), "rejected": " " + say(60, 2)}
    short = {"prompt": say(5, 1), "chosen": " " + say(4, 2), "rejected": " " + say(3, 3)}
    reports, limit = Reports(), Limit(limit_bytes or 0)
    hetero = (
        HeteroConfig(cost_model=cost_file(folder), keep_exchanged=False)
        if planned
        else HeteroConfig(activation_policies=[])
    )
    trainer = HeteroDPOTrainer(
        model_of(0, True, **DEEP),
        args=config(folder, max_steps=2, train_sampling_strategy="sequential"),
        train_dataset=datasets.Dataset.from_list([short] * 4 + [long] + [short] * 3),
        processing_class=tokenizer(),
        callbacks=[reports, *([limit] if limit_bytes is not None else [])],
        hetero=hetero,
    )
    limit.trainer = trainer
    try:
        trainer.train()
    finally:  # what says how it went needs memory, too
        lift()
    last = reports.found[-1]
    longest = (
        next(group for group in last.plan.groups if any(last.lengths[s] > 500 for s in group.samples))
        if tokens > 1000
        else None
    )
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "longest": sum(last.lengths[:2]),
        "group": longest and (longest.degree, longest.activations),
        "repeats": last.repeats,
    }


def on_one_rank(folder: str, tokens: int) -> dict[str, Any]:
    return train(folder, tokens, LIMIT_BYTES, False)


@pytest.mark.slow
def test_ten_times_a_rank(tmp_path: Any) -> None:
    """One rank holds a pair of 200 tokens, and none of 480; four hold one of ten times as many, recomputing layers."""
    [held] = run_ranks(on_one_rank, 1, str(tmp_path / "held"), 200)
    assert held["repeats"] == 0
    [failed] = run_ranks(on_one_rank, 1, str(tmp_path / "longer"), TOO_LONG, expect_errors=True)
    assert isinstance(failed, InfeasibleBatch)
    assert "memory held since it ran out" in str(failed)
    found = run_ranks(train, 4, str(tmp_path / "planned"), 10 * TOO_LONG, LIMIT_BYTES, True)
    expected = train(str(tmp_path / "free"), 10 * TOO_LONG, None, False)
    for rank in found:
        assert rank["longest"] >= 10 * TOO_LONG
        assert rank["group"] == (4, "recompute")
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-4
