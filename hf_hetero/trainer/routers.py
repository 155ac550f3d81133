"""The loss of routers takes a step as a whole: its tokens are looked at before it, and counted over all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from hf_hetero.model.experts.router_loss import RoutedStep
from hf_hetero.ranks.agreement import gather_objects
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.naming import named
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.trainer.run import PlannedRun

AUX_LOSS = "aux_loss"
"""What TRL's trainers, which log this loss, call it."""


def begin(
    trainer: Trainer,
    run: PlannedRun,
    model: torch.nn.Module,
    batch: StepBatch,
    number: int,
    note: Callable[[int], None],
) -> None:
    """Begin a step, and look at those of its micro-batches that have to be looked at before it.

    Args:
        trainer, run: the run.
        model: in its wrapper.
        batch: of this rank.
        number: of the step, for messages.
        note: is told the number of each micro-batch before it is looked at.
    """
    routers, num_micro_batches = run.fitted.router_loss, len(batch.micro_batches)
    num_tokens = sum(batch.share.step.lengths)

    def total(sums: torch.Tensor) -> torch.Tensor:
        return _of_all(sums, run, f"step {number}")

    looks = routers.begin(RoutedStep(num_tokens, num_micro_batches, trainer.args.world_size, total))
    # TRL's trainers divide this loss by it, because they are called once for each; here that is each micro-batch
    trainer.current_gradient_accumulation_steps = num_micro_batches
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    # random numbers are drawn in training as if nobody had looked
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for index in range(1, num_micro_batches) if looks else ():
            note(index)
            _look(trainer, run, model, batch.micro_batches[index], index, number)


def _look(
    trainer: Trainer, run: PlannedRun, model: torch.nn.Module, micro_batch: RankMicroBatch, index: int, number: int
) -> None:
    """Run a micro-batch forward, to see what is routed where."""
    fitted, context = run.fitted, run.context(micro_batch, index, number)
    inputs = {name: x for name, x in micro_batch.inputs.items() if name not in ("labels", "shift_labels")}
    if "logits_to_keep" in inspect.signature(fitted.model.forward).parameters:  # of no use here, and large
        inputs = {**inputs, "logits_to_keep": 1}
    prepared: Any = trainer._prepare_inputs({**inputs, "hetero": context})  # pyright: ignore
    seeing = fitted.router_loss.looked_at(context.num_tokens)
    with trainer.compute_loss_context_manager(), fitted.as_looked_at(micro_batch, context), seeing:
        model(**prepared, use_cache=False)


def _of_all(sums: torch.Tensor, run: PlannedRun, where: str) -> torch.Tensor:
    """Return a tensor's sum over all ranks, which are in a step. It can be broken off, as all that is waited for there.

    Raises:
        CollectiveFailed: another rank has gone, or is late.
    """
    sums = sums.clone()
    if run.control is not None:
        group = run.groups.carried[tuple(range(run.args.world_size))]
        with named("The exchange of what routers chose", where, limit=lambda: limit_of(group)):
            dist.all_reduce(sums, group=group)
    return sums


@contextmanager
def evaluated(run: PlannedRun, model: torch.nn.Module, num_tokens: int) -> Iterator[None]:
    """Return a context in which a micro-batch is evaluated, its routers' loss left for `evaluation_loss`."""
    routers = run.fitted.router_loss
    if not routers:
        yield
        return
    with routers.left_out(model, num_tokens):
        yield


def evaluation_loss(trainer: Trainer, run: PlannedRun, num_micro_batches: int) -> float:
    """Return this rank's part of what the routers of an evaluation's step add to its loss. A collective of all ranks.

    What a trainer of TRL has logged of its micro-batches becomes what it is of the step.
    """
    routers = run.fitted.router_loss
    if not routers:
        return 0.0

    def total(sums: torch.Tensor) -> torch.Tensor:
        return torch.tensor(gather_objects(sums.tolist(), run.control), dtype=torch.float64).sum(0)

    value = routers.take(total)
    logged: Sequence[float] = getattr(trainer, "_metrics", {}).get("eval", {}).get(AUX_LOSS, ())
    if isinstance(logged, list) and len(logged) >= num_micro_batches:
        logged[-num_micro_batches:] = [value] * num_micro_batches
    return routers.coefficient * value / trainer.args.world_size
