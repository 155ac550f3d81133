"""Training goes by planned steps: what `train` has open, its data, forward and backward of a step, its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from hf_hetero.attention.context import AttentionContext
from hf_hetero.checks import overrides
from hf_hetero.checks.undisturbed import undisturbed
from hf_hetero.collators.batches import check_batches
from hf_hetero.data.loader import LOOKED_AT, sampler_of, training_data
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.streams.loaders import streamed_data
from hf_hetero.data.streams.stream import is_stream
from hf_hetero.data.training_steps import TrainingData, check_order
from hf_hetero.errors import BadSample, UnsupportedModel
from hf_hetero.model.loss import IGNORE_INDEX, SumsBySource
from hf_hetero.model.timing import StepClock
from hf_hetero.ranks import sharding
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.ranks.by_source import SourcesOfAll, Tally
from hf_hetero.ranks.gradients import synchronising
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.naming import named
from hf_hetero.step import RankMicroBatch, StepBatch, StepPart
from hf_hetero.trainer import routers
from hf_hetero.trainer.checkpoints.resuming import Resumed
from hf_hetero.trainer.checkpoints.safekeeping import claim
from hf_hetero.trainer.checkpoints.saving import Saving
from hf_hetero.trainer.checkpoints.writing import Writing
from hf_hetero.trainer.fitting import check_reached
from hf_hetero.trainer.out_of_memory import Attempt, Repeats, adopt_exchanges
from hf_hetero.trainer.packing import columns_kept
from hf_hetero.trainer.run import BetweenRuns, ConfirmedStep, PlannedRun, begin_step

ForwardBackward = Callable[[dict[str, Any]], torch.Tensor]
"""Inputs of the model -> this rank's part of the loss, once its gradients are there."""
PATIENCE_S = 40.0
"""How long a run that is ending may keep its folder: torchrun gives ranks 30 s to end before it kills them."""


@dataclass(slots=True)
class Observed:
    """An `Observed` is what was observed of the step underway, on this rank, beside its times.

    Args:
        sent_bytes: that were sent to other ranks inside layers.
        by_source: of each micro-batch with tokens, the sources it has, and their sums on the device.
    """

    sent_bytes: int = 0
    by_source: list[tuple[list[str], SumsBySource]] = field(default_factory=list[tuple[list[str], SumsBySource]])

    def tallies(self) -> dict[str, Tally]:
        """Return the loss of each source, and its targets; this waits for the device."""
        found: dict[str, Tally] = {}
        for names, sums in self.by_source:
            for name, loss, count in zip(names, *sums.sums.tolist(), strict=True):
                before = found.get(name, (0.0, 0))
                found[name] = before[0] + loss, before[1] + int(count)
        return found


@dataclass(slots=True)
class Training:
    """`Training` is what one call of `train` has open beside its run, and the step underway.

    Args:
        opened: closes it all when `train` ends, however it does.
        resumed: the checkpoint that training goes on from; None: it starts anew.
        data: the planned steps, from the moment Trainer asks for its loader.
        accumulation: batches of a step when its data were opened.
        clock: times micro-batches, from the first step on.
        saving: how a checkpoint is written, while the loop does it.
        writing: the checkpoint that is written beside it.
        is_saved_by_loop: it is the loop that asks for a checkpoint, and not a script or a search.
        may_write_beside: whether checkpoints can be written beside the loop; None: nobody has looked.
        step: which all ranks hold; its micro-batches are being trained on.
        began_s: when its first part began, by `time.perf_counter`; None: it has not.
        repeats: what is known of it, should memory run out.
        seen: of it, so far.
        sources: of rows, as all ranks know them.
        has_said_sources: that their losses are not known.
    """

    opened: ExitStack
    resumed: Resumed | None = None
    data: TrainingData | None = None
    accumulation: int | None = None
    clock: StepClock | None = None
    saving: Saving | None = None
    writing: Writing | None = None
    is_saved_by_loop: bool = False
    may_write_beside: bool | None = None
    step: ConfirmedStep | None = None
    began_s: float | None = None
    repeats: Repeats = field(default_factory=Repeats)
    seen: Observed = field(default_factory=Observed)
    sources: SourcesOfAll = field(default_factory=SourcesOfAll)
    has_said_sources: bool = False

    @property
    def checkpoint(self) -> str | None:
        """Return the folder of the checkpoint that training goes on from; None: it starts anew."""
        return None if self.resumed is None else str(self.resumed.folder)

    def let_writing_end(self) -> None:
        """Wait for the checkpoint that is being written, where training ends with an error."""
        if self.writing is not None:
            self.writing.end()

    @property
    def resumes_by_itself(self) -> bool:
        """Return whether training goes on from a checkpoint that nobody asked for by name."""
        return self.resumed is not None and self.resumed.is_own


# ------------------------------------------------------------------------------------------------------------ the data


def _claim_folder(trainer: Trainer, run: PlannedRun, training: Training) -> None:
    """Notice another run in the output folder; those of a search have their own."""
    args = trainer.args

    def claim_on_rank_0() -> None:
        # ranks that a launcher replaces by these may still be ending
        patience_s = PATIENCE_S if run.hetero.auto_resume else 0.0
        mine = claim(Path(args.output_dir or "."), args.save_strategy != SaveStrategy.NO, patience_s)
        if mine is not None:
            training.opened.callback(mine.close)

    broadcast(claim_on_rank_0 if trainer.hp_search_backend is None else lambda: None, run.control)


def open_data(
    trainer: Trainer, run: PlannedRun, training: Training, source: PlanSource, loader: DataLoader[Any]
) -> None:
    """Open the planned steps of a run, whose folder is this run's alone.

    Args:
        trainer: with the dataset.
        run, training: the run.
        source: of plans.
        loader: Trainer's own; its sampler gives the order of rows.

    Raises:
        BadSample: the dataset has no tokens, or an empty sample; raised on every rank.
        ConfigError: the checkpoint's data were others, or another run has the folder; raised on every rank.
    """
    overrides.check_loading(trainer)
    training.opened.callback(run.groups.relax)
    _claim_folder(trainer, run, training)
    packer, args = run.labelled_packer, trainer.args
    before = training.resumed.run if training.resumed is not None and not args.ignore_data_skip else None
    common: dict[str, Any] = {
        "collate": packer,
        "args": args,
        "batch_size": trainer.get_total_train_batch_size(args),
        "planning": run.planning(source),
        "global_step": lambda: trainer.state.global_step,
        "names": columns_kept(trainer),
    }
    dataset: Any = trainer.train_dataset
    if is_stream(dataset):
        data = streamed_data(dataset, kept=before.stream if before is not None else None, **common)
    else:
        packer.check_padding(dataset[row] for row in range(min(len(dataset), LOOKED_AT)))
        with undisturbed():
            check_batches(packer, map(dataset.__getitem__, range(len(dataset))))
        columns = partial(trainer._remove_unused_columns, description="training")  # pyright: ignore[reportPrivateUsage]
        data = training_data(dataset, columns, sampler=sampler_of(loader), **common)
    training.opened.callback(data.close)  # before it may be refused: it plans ahead already
    check_order(data.order, before.order if before is not None else {}, training.resumes_by_itself)
    training.data, training.accumulation = data, args.gradient_accumulation_steps


# ------------------------------------------------------------------------------------------------------------ the step


def check_targets(step: ConfirmedStep, number: int) -> None:
    """Refuse to begin with a step from which nothing is learned.

    Raises:
        BadSample: no label of the step is a target.
    """
    assert step.batch is not None
    if not step.num_targets:
        raise BadSample(
            f"Step {number} has no target token: each label of its {len(step.batch.share.step.rows)} samples is "
            f"{IGNORE_INDEX}, so there is nothing to learn. Look at how labels are made."
        )


def step_part(inputs: Any, trainer_name: str) -> StepPart:
    """Return what `training_step` is handed, if it is what `get_batch_samples` gave.

    Raises:
        UnsupportedModel: a subclass hands on a batch of its own.
    """
    if not isinstance(inputs, StepPart):
        raise UnsupportedModel(
            f"{trainer_name}.training_step handed on a batch of its own ({type(inputs).__name__}), which no plan "
            "knows. Hand on the batch it is given; change tensors in data_collator or _prepare_inputs."
        )
    return inputs


def train_part(
    trainer: Trainer,
    run: PlannedRun,
    training: Training,
    between: BetweenRuns,
    model: torch.nn.Module,
    part: StepPart,
    forward_backward: ForwardBackward,
) -> torch.Tensor:
    """Run forward and backward of some micro-batches of a step, whose last one synchronises gradients.

    All ranks take part in each micro-batch, so all have as many, and come to the exchange of gradients together.

    Returns:
        This rank's part of the step's loss, times the number of ranks.
    """
    clock = training.clock or _start_clock(trainer, run, training, model)
    run.groups.hurry()  # what takes its time once, before the first step, is over
    if training.began_s is None:
        training.began_s = time.perf_counter()
    number = trainer.state.global_step + 1

    def compute(batch: StepBatch, numbers: range, note: Callable[[int], None]) -> torch.Tensor:
        total = torch.zeros((), device=trainer.args.device)
        last = len(batch.micro_batches) - 1
        if numbers and not numbers.start:
            begin_step(trainer, model, batch, note)
        router_loss = run.fitted.router_loss if numbers else None
        with named("The exchange of gradients", f"step {number}", limit=limit_of):
            if router_loss and numbers.start == 0:
                routers.begin(trainer, run, model, batch, number, note)
            for index in numbers:
                note(index)
                micro_batch = batch.micro_batches[index]
                context = run.context(micro_batch, index, number)
                _watch_sources(context, micro_batch, training)
                syncs = synchronising(trainer, model, run.fitted.sharding, is_last=index == last)
                adding = router_loss.adding(model, context.num_tokens) if router_loss else nullcontext()
                with run.fitted.as_planned(micro_batch, context), adding, syncs, clock.micro_batch():
                    total += forward_backward({**micro_batch.inputs, "hetero": context})
                check_reached(run.fitted, context)
                training.seen.sent_bytes += context.sent.num_bytes
            if router_loss and numbers.stop == last + 1:
                router_loss.end()
        return total

    def forget() -> None:
        clock.forget()
        training.seen = Observed()

    assert training.step is not None
    assert training.data is not None
    attempt = Attempt(trainer, run, between, training.data, model, compute, forget, training.repeats)
    loss = attempt.part(training.step, part)
    training.step = training.repeats.step
    return loss


def _start_clock(trainer: Trainer, run: PlannedRun, training: Training, model: torch.nn.Module) -> StepClock:
    """Start the clock, and adopt the wrapper's groups, in the first step: by now accelerate has wrapped the model."""
    sharding.check_wrapper(model, trainer.args)
    sharding.forget_gradients(model)  # of a step that an error broke off, in a run before
    training.repeats.exchanges = adopt_exchanges(model, run)
    for exchange in training.repeats.exchanges:
        training.opened.callback(exchange.put_back)
    # transformers' own count of memory needs the peak of the run
    clock = StepClock(trainer.model, trainer.args.device, trainer.args.skip_memory_metrics)  # pyright: ignore[reportArgumentType]
    training.opened.callback(clock.close)
    training.clock = clock
    return clock


def _watch_sources(context: AttentionContext, micro_batch: RankMicroBatch, training: Training) -> None:
    """Have the loss of each source of a micro-batch added up, where rows say what they are from."""
    if not micro_batch.sources:
        return
    slots = sorted(set(names := [training.sources.named(source) for source in micro_batch.sources]))
    # a token that stands in at the end has no target, and so no source
    of_tokens = torch.zeros(micro_batch.inputs["input_ids"].shape[1], dtype=torch.long)
    of_spans = torch.tensor([slots.index(name) for name in names])
    lengths = torch.tensor([span.num_tokens for span in micro_batch.spans])
    of_tokens[: micro_batch.num_tokens] = of_spans.repeat_interleave(lengths)
    context.by_source = SumsBySource(of_tokens.to(context.device), len(slots))
    training.seen.by_source.append((slots, context.by_source))
