"""Memory runs out in a step, on any rank, anywhere in it: the run goes on, and learns what it would have learned.

What stands in for a device whose memory ends is a layer of the model that raises torch's own error when its rank holds
more than so many tokens: as real memory, it does so again for as long as a plan asks for as much.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from helpers import (
    LENGTHS,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
)
from torch.utils.data import IterableDataset

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, InfeasibleBatch
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.plan import StepReport
from hf_hetero.trainer import out_of_memory
from hf_hetero.trainer.checkpoints.kept_cost_model import kept_cost_model

NUM_STEPS = 4
BATCH = 12
WIDE = {"intermediate_size": 2048}
"""Weights of a layer take more than a bucket of gradients."""
STEPS = trainer_order(len(LENGTHS), BATCH, 7, NUM_STEPS)
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


class RunsOut(torch.autograd.Function):
    """Memory runs out in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limit_memory(model: Any, rank: int, tokens: int, where: str, layer: int = 1) -> None:
    """Let a layer of this rank hold so many tokens, and no more.

    Args:
        model: of transformers.
        rank: whose memory it is; -1: no rank's.
        tokens: that fit.
        where: forward | backward | host, which is a forward pass on a CPU.
        layer: which one.
    """
    if rank != (dist.get_rank() if dist.is_initialized() else 0):
        return

    def full(module: Any, inputs: Any, output: Any) -> Any:
        if not module.training or output.shape[1] <= tokens:
            return output
        if where == "backward":
            return RunsOut.apply(output)
        if where == "host":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.layers[layer].register_forward_hook(full)


@dataclass
class Reports(StepReportCallback):
    """Keeps the report of each step."""

    found: list[StepReport] = field(default_factory=list)

    def on_step_report(self, args: Any, state: Any, report: StepReport) -> None:
        self.found.append(report)


class Streamed(IterableDataset[Any]):
    """Rows that can only be read one after the other, in the order of `STEPS`."""

    def __iter__(self) -> Any:
        rows = samples(LENGTHS)
        return iter([rows[row] for step in STEPS for row in step])


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train with a memory that ends; what it learned, its reports, and the capacity at its end."""
    case = dict(case)

    world = dist.get_world_size() if dist.is_initialized() else 1
    model = model_of(case.pop("model", {}))
    limit_memory(
        model,
        case.pop("rank"),
        case.pop("tokens", 66 if world == 1 else 35),
        case.pop("where", "forward"),
        case.pop("layer", 1),
    )
    if case.pop("fsdp2", False):
        shard_on_cpu()
        case |= FSDP
    if replicas := case.pop("replicas", 0):
        case["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=world // replicas)
    reports, kept, also = Reports(), list[Any](), case.pop("also", [])

    class Trainer(HeteroTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            kept.append(self)
            for callback in also:
                callback.trainer = self
            return super().train(*args, **kwargs)

    accumulation = case.get("gradient_accumulation_steps", 1)
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH // world // accumulation, **case}
    hetero = HeteroConfig(**{"max_tokens_per_rank": 90, "group_timeout_s": 100.0, **options.pop("hetero", {})})
    lengths = options.pop("lengths", LENGTHS)
    data: Any = Streamed() if options.pop("stream", False) else samples(lengths)
    found = trained(model, data, Trainer, hetero, callbacks=[reports, *also], **options)
    return {**found, "reports": reports.found, "capacity": kept[0].cost_model.capacity_tokens}


def model_of(changes: dict[str, Any]) -> Any:
    return tiny_model(dtype=torch.float64, **{"num_hidden_layers": 3, **changes})


def check_learned(found: Sequence[dict[str, Any]], changes: dict[str, Any] = {}) -> None:  # noqa: B006
    """Each rank has the weights and the losses of plain training, and has seen each sample of each step once."""
    expected = reference_steps(model_of(changes), samples(LENGTHS), STEPS)
    for rank in found:
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-12
        losses = [entry["loss"] for entry in rank["logs"] if "loss" in entry]
        assert losses == pytest.approx(expected["losses"][: len(losses)], rel=1e-6)
        assert len(rank["reports"]) == NUM_STEPS
        for report, rows in zip(rank["reports"], STEPS, strict=True):
            assert sorted(report.lengths) == sorted(LENGTHS[row] for row in rows)
            assert report.plan.num_samples == len(rows)
        assert rank["capacity"] < 90
        assert any(report.repeats for report in rank["reports"])
        assert rank["capacity"] == found[0]["capacity"]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, backward": (1, {"where": "backward"}),
    "forward": (2, {"rank": 1}),
    "backward": (2, {"rank": 1, "where": "backward"}),
    "first layer, of the host": (2, {"layer": 0, "where": "host"}),
    "last layer's backward": (2, {"layer": 2, "where": "backward"}),
    "four ranks": (4, {"rank": 2, "where": "backward", "tokens": 20}),
    "accumulated": (2, {"rank": 1, "gradient_accumulation_steps": 3}),
    "workers": (2, {"rank": 1, "dataloader_num_workers": 2}),
    "stream": (2, {"rank": 1, "stream": True}),
    "stream, workers": (2, {"rank": 0, "stream": True, "dataloader_num_workers": 1}),
    "FSDP2, forward": (2, {"rank": 1, "fsdp2": True}),
    "FSDP2, backward": (2, {"rank": 1, "fsdp2": True, "where": "backward"}),
    "FSDP2, synchronised once": (
        2,
        {"rank": 0, "fsdp2": True, "where": "backward", "hetero": {"sync_each_micro_batch": False}},
    ),
    "HSDP, backward": (4, {"rank": 2, "fsdp2": True, "replicas": 2, "where": "backward", "tokens": 20}),
}


def of_ranks(num_ranks: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(run, num_ranks, case) if num_ranks > 1 else [run(case)]


@pytest.mark.parametrize("name", often(CASES, "one process", "backward", "stream, workers", "FSDP2, backward"))
def test_goes_on(name: str) -> None:
    """Weights, losses and samples are those of plain training, whoever ran out of memory, where, and how often."""
    num_ranks, case = CASES[name]
    check_learned(of_ranks(num_ranks, {"rank": 0, **case}))


class RunsOutOnce(StepReportCallback):
    """Memory runs out once on a rank, in the backward pass of a step's last micro-batch, after most of its gradients.

    By then the exchange of gradients has begun.
    """

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.trainer: Any = None
        self.num_seen = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 != self.step or args.process_index != self.rank:
            return

        num_micro_batches = len(self.trainer._training.step.batch.micro_batches)

        def note(_: torch.Tensor) -> None:
            self.num_seen += 1
            if self.num_seen == num_micro_batches:
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        handle = model.model.layers[0].mlp.down_proj.weight.register_post_accumulate_grad_hook(note)


def run_once(failing: int) -> dict[str, Any]:
    """Several micro-batches a step, and several buckets of gradients."""
    callback = RunsOutOnce(failing, 2)
    hetero = {"max_tokens_per_rank": 60}
    found = run({"rank": -1, "hetero": hetero, "also": [callback], "ddp_bucket_cap_mb": 1, "model": WIDE})
    return {**found, "seen": callback.num_seen}


@pytest.mark.parametrize("failing", often([0, 1], 1))
def test_the_exchange_of_gradients_has_begun(failing: int) -> None:
    """Some gradients of the step are exchanged already when a rank's memory runs out: they are forgotten, by all."""
    found = run_ranks(run_once, 2, failing)
    check_learned(found, WIDE)
    for rank in found:
        assert [report.repeats for report in rank["reports"]] == [0, 1, 0, 0]
    assert found[failing]["seen"] > 1
    assert found[1 - failing]["seen"] == 0


def test_what_ran_out_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of weights and losses fails if gradients of the step that was left stay where they were."""
    monkeypatch.setattr("hf_hetero.model.rewind.Before.restore", lambda self: None)
    with pytest.raises(AssertionError):
        check_learned([run({"rank": 0, "where": "backward", "layer": 0, "tokens": 66})])


def test_resumed(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint holds what memory held before, whatever the settings say, and never less."""
    folder = str(tmp_path)
    stopped = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2, "rank": 1}
    check_learned(run_ranks(run, 2, stopped))
    # how often memory had run out by then, and so what is known of it, depends on plans, and these on the CPU's speed
    kept = kept_cost_model(f"{folder}/checkpoint-2", num_ranks=2)
    assert kept is not None
    assert kept.cost_model.capacity_tokens < 90
    again = run_ranks(run, 2, {**stopped, "resume": f"{folder}/checkpoint-2", "tokens": 1000})
    expected = reference_steps(model_of({}), samples(LENGTHS), STEPS)
    for rank in again:
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-12
        assert rank["capacity"] == kept.cost_model.capacity_tokens
        assert [report.repeats for report in rank["reports"]] == [0, 0]


def no_room(tokens: int) -> str:
    try:
        run({"rank": 1, "tokens": tokens})
    except InfeasibleBatch as error:
        return str(error)
    return "trained"


def test_no_plan_is_left() -> None:
    """Where the longest sample has no room on all ranks together, each of them says so, with what could be done."""
    for said in run_ranks(no_room, 2, 20):
        assert "has no room in what memory held since it ran out" in said
        assert "64 tokens" in said
        assert "more ranks" in said


def test_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was repeated too often ends the run in words; so does memory that holds no token."""
    with monkeypatch.context() as patch:
        patch.setattr(out_of_memory, "MOST_REPEATS", 2)
        with pytest.raises(HeteroError, match=r"Step 1, .*: rank 0 ran out of memory with .*, after 2 repeats"):
            run({"rank": 0, "tokens": 0, "lengths": [10] * len(LENGTHS)})  # fewer than are left after two repeats
    with pytest.raises(InfeasibleBatch, match=r"has no room in what memory held|cannot hold fewer"):
        run({"rank": 0, "tokens": 0})


def test_gradients_of_before_are_not_repeated() -> None:
    """A step that adds to gradients which are there already cannot begin again: torch's error stands, in words."""
    model = tiny_model(dtype=torch.float64)
    limit_memory(model, 0, 10, "forward")

    class Adds(StepReportCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)

    with pytest.raises(torch.OutOfMemoryError, match="Step 1: this rank ran out of memory"):
        trained(model, samples(LENGTHS), HeteroTrainer, HeteroConfig(), callbacks=[Adds()])


LIMITED = """
import resource, sys, tempfile
import torch
sys.path.insert(0, sys.argv[1])
from helpers import arguments, samples, tiny_model
from hf_hetero import HeteroConfig, HeteroTrainer

torch.set_num_threads(1)
size = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=8, head_dim=32, max_position_embeddings=8192)
model = tiny_model(vocab_size=97, num_hidden_layers=6, **size)
lengths = [1500] * 24
with tempfile.TemporaryDirectory() as folder:
    args = arguments(folder, 1, global_batch=12, max_steps=2)
    hetero = HeteroConfig(max_tokens_per_rank=18_000, solver="fast", activation_policies=[])
    trainer = HeteroTrainer(model=model, args=args, train_dataset=samples(lengths), hetero=hetero)

    class Limit(type(trainer.callback_handler.callbacks[0])):
        def on_step_begin(self, *_, **__):
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), resource.RLIM_INFINITY))

    trainer.add_callback(Limit)
    trainer.train()
    print("CAPACITY", trainer.cost_model.capacity_tokens, trainer.state.global_step)
"""


@pytest.mark.slow
def test_real_memory() -> None:
    """A process whose address space ends gets the error of torch's own allocator, and trains on with fewer tokens."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tests], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [(capacity, steps)] = re.findall(r"CAPACITY (\d+) (\d+)", done.stdout)
    assert int(steps) == 2
    assert int(capacity) < 18_000, "memory did not run out"
    assert "can't allocate memory" in done.stderr or "not enough memory" in done.stderr
