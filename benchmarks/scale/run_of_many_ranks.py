"""A run of many ranks, all of it but the model: what a rank does in a step beside forward and backward.

Sampler, loader, plan-ahead, agreement, report and callbacks are the package's own. The seconds of a micro-batch, which
a model would take, are those of the cost model, with a noise of each rank's own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerState

from hf_hetero.callbacks import CalibrationCallback, PlanMetricsCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.collators.limits import Limits
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.data.loader import training_data
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.planning import Planners, planning_of
from hf_hetero.model.logged_means import LoggedMeans
from hf_hetero.plan import METHODS
from hf_hetero.ranks.agreement import gather
from hf_hetero.trainer.out_of_memory import Account
from hf_hetero.trainer.reporting import report
from hf_hetero.trainer.run import BetweenRuns, ConfirmedStep, PlannedRun
from hf_hetero.trainer.training import Training

Around = Callable[[int, int], Any]
"""Rank, number of the step -> a context that the step of the rank stands in."""


@dataclass(frozen=True)
class Setup:
    """A `Setup` is what a run is made of.

    Args:
        dataset: map-style, the same for all ranks.
        cost: by which steps are planned.
        num_ranks: of the run.
        batch_size: samples of a step, over all ranks.
        num_steps: that are run.
        source: of plans; None: processes of their own, as in training.
        around: what each step of a rank stands in.
    """

    dataset: Any
    cost: CostModel
    num_ranks: int
    batch_size: int
    num_steps: int
    source: PlanSource | None = None
    around: Around = lambda rank, step: nullcontext()


@dataclass
class Seen:
    """`Seen` is what one rank saw of the run.

    Args:
        started_s: until the first step could be asked for: lengths, order, first plans not included.
        step_s, step_cpu_s: of each step, by the clock, and of this thread's processor.
        planning_s, waited_s: of each plan, where it was made; that rank 0 waited for it.
        num_groups: of each step's plan, over all its micro-batches.
        digests: of each step.
        tokens: that this rank held, of each step.
    """

    started_s: float = 0.0
    step_s: list[float] = field(default_factory=list[float])
    step_cpu_s: list[float] = field(default_factory=list[float])
    planning_s: list[float] = field(default_factory=list[float])
    waited_s: list[float] = field(default_factory=list[float])
    num_groups: list[int] = field(default_factory=list[int])
    digests: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])


class _Clock:
    """Stands in for the clock of forward and backward: what the cost model charges, give or take a tenth."""

    def __init__(self, rank: int) -> None:
        self._random = random.Random(rank)
        self.seconds: list[float] = []

    def read(self) -> list[float]:
        return [s * self._random.uniform(0.9, 1.1) for s in self.seconds]

    def peak_bytes(self) -> int:
        return 40 << 30

    def unused_bytes(self) -> int:
        return 1 << 30


def settings(num_ranks: int, rank: int) -> Any:
    """Return what a loader asks `TrainingArguments` for, which themselves would look for ranks in processes."""
    return SimpleNamespace(
        world_size=num_ranks,
        process_index=rank,
        device=torch.device("cpu"),
        gradient_accumulation_steps=1,
        train_sampling_strategy="random",
        accelerator_config=SimpleNamespace(use_seedable_sampler=True),
        data_seed=0,
        ignore_data_skip=False,
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        dataloader_persistent_workers=False,
        dataloader_multiprocessing_context=None,
        dataloader_prefetch_factor=None,
        dataloader_in_order=True,
        report_to=[],
        output_dir=None,
    )


def rank_of_a_run(setup: Setup, rank: int) -> Seen:
    """Do what a rank does in a run, the model left out. Called on all ranks; a single one has no group."""
    control = dist.group.WORLD if setup.num_ranks > 1 else None
    args, hetero, cost = settings(setup.num_ranks, rank), HeteroConfig(), setup.cost
    packer = PackedCollator(needs_labels=True, columns=frozenset({"input_ids"}))
    between = BetweenRuns(LoggedMeans(None), cost_model=cost)
    planners = Planners(hetero, setup.num_ranks, between.cost_model_of_now, METHODS)
    fitted: Any = SimpleNamespace(
        experts=None,
        state_layers=None,
        sharding=SimpleNamespace(is_sharded=False),
        flops=None,
        router_loss=SimpleNamespace(value=None),
    )
    groups: Any = SimpleNamespace(control=control, check=lambda: None)  # no device of theirs can fail
    run = PlannedRun(args, hetero, fitted, groups, packer, planners)  # type: ignore[arg-type]
    source = setup.source or planners.for_training(reproducible=True)
    state, seen, start = TrainerState(is_world_process_zero=rank == 0), Seen(), time.perf_counter()
    data = training_data(
        setup.dataset,
        lambda table: table,
        packer,
        args,
        setup.batch_size,
        planning_of(hetero, source, control, Limits()),
        lambda: state.global_step,
        names=["input_ids"],
    )
    seen.started_s = time.perf_counter() - start
    callbacks = [PlanMetricsCallback(), CalibrationCallback()]
    trainer: Any = SimpleNamespace(state=state, args=args, callback_handler=SimpleNamespace(callbacks=callbacks))
    with ExitStack() as opened:
        opened.callback(data.close)
        clock: Any = _Clock(rank)
        training = Training(opened, data=data, clock=clock)
        epoch = object()
        for number in range(1, setup.num_steps + 1):
            with setup.around(rank, number), _timed(seen):
                step = run.confirmed(data.steps_of(epoch), number)
                gather(Account(), control)  # how the step went, on each rank
                _report(trainer, run, training, between, step)
                callbacks[0].metrics()
            _look(seen, step)
            state.global_step = number
    return seen


def _report(trainer: Any, run: PlannedRun, training: Training, between: BetweenRuns, step: ConfirmedStep) -> None:
    """Report a step as `Trainer` does after its backward pass."""
    assert step.batch is not None
    share, cost = step.batch.share, between.cost_model_of_now()
    clock: Any = training.clock
    clock.seconds = [cost.group_seconds(group, share.step.lengths) for group in share.groups]
    training.step, training.began_s = step, time.perf_counter() - sum(clock.seconds)
    report(trainer, run, training, between)


@contextmanager
def _timed(seen: Seen) -> Any:
    start, cpu_start = time.perf_counter(), time.thread_time()
    yield
    seen.step_s.append(time.perf_counter() - start)
    seen.step_cpu_s.append(time.thread_time() - cpu_start)


def _look(seen: Seen, step: ConfirmedStep) -> None:
    assert step.batch is not None
    planned = step.batch.share.step
    seen.planning_s.append(planned.plan.planning_s)
    seen.waited_s.append(planned.wait_s)
    seen.num_groups.append(sum(1 for _ in planned.plan.groups))
    seen.digests.append(planned.digest())
    seen.tokens.append(sum(micro_batch.num_tokens for micro_batch in step.batch.micro_batches))


class RowsOfLengths:
    """`RowsOfLengths` is a table whose rows have so many tokens, which are made as they are read.

    Args:
        lengths: tokens of each row.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        """Return the rows."""
        return len(self._lengths)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row."""
        return {"input_ids": torch.full((int(self._lengths[row]),), row % 1000, dtype=torch.int64)}
