"""Memory runs out in a step, on any rank, anywhere in it: the run goes on, and learns what it would have learned.

What stands in for a device whose memory ends is a layer of the model that raises torch's own error when its rank holds
more than so many tokens: as real memory, it does so again for as long as a plan asks for as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    LENGTHS,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
)
from torch.utils.data import IterableDataset

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import StepReportCallback
from hf_hetero.plan import StepReport

NUM_STEPS = 4
BATCH = 12
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
        where: forward | backward.
        layer: which one.
    """
    if rank != (dist.get_rank() if dist.is_initialized() else 0):
        return

    def full(module: Any, inputs: Any, output: Any) -> Any:
        if not module.training or output.shape[1] <= tokens:
            return output
        if where == "backward":
            return RunsOut.apply(output)
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
    model = tiny_model(dtype=torch.float64, num_hidden_layers=3)
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
    reports, kept = Reports(), list[Any]()

    class Trainer(HeteroTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            kept.append(self)
            return super().train(*args, **kwargs)

    accumulation = case.get("gradient_accumulation_steps", 1)
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH // world // accumulation, **case}
    hetero = HeteroConfig(**{"max_tokens_per_rank": 90, "group_timeout_s": 100.0, **options.pop("hetero", {})})
    data: Any = Streamed() if options.pop("stream", False) else samples(LENGTHS)
    found = trained(model, data, Trainer, hetero, callbacks=[reports], **options)
    return {**found, "reports": reports.found, "capacity": kept[0].cost_model.capacity_tokens}


def check_learned(found: Sequence[dict[str, Any]], repeats: bool = True) -> None:
    """Each rank has the weights and the losses of plain training, and has seen each sample of each step once."""
    expected = reference_steps(tiny_model(dtype=torch.float64, num_hidden_layers=3), samples(LENGTHS), STEPS)
    for rank in found:
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-12
        losses = [entry["loss"] for entry in rank["logs"] if "loss" in entry]
        assert losses == pytest.approx(expected["losses"][: len(losses)], rel=1e-6)
        assert len(rank["reports"]) == NUM_STEPS
        for report, rows in zip(rank["reports"], STEPS, strict=True):
            assert sorted(report.lengths) == sorted(LENGTHS[row] for row in rows)
            assert report.plan.num_samples == len(rows)
        assert (rank["capacity"] < 90) == repeats
        assert rank["capacity"] == found[0]["capacity"]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, backward": (1, {"where": "backward"}),
    "forward": (2, {"rank": 1}),
    "backward": (2, {"rank": 1, "where": "backward"}),
    "first layer": (2, {"layer": 0}),
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
}


def of_ranks(num_ranks: int, case: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(run, num_ranks, case) if num_ranks > 1 else [run(case)]


@pytest.mark.parametrize("name", CASES)
def test_goes_on(name: str) -> None:
    """Weights, losses and samples are those of plain training, whoever ran out of memory, where, and how often."""
    num_ranks, case = CASES[name]
    check_learned(of_ranks(num_ranks, {"rank": 0, **case}))
