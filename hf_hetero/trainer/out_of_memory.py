"""Memory that runs out in a step ends no run: all ranks leave the step, plan it anew for less, and repeat it.

    a rank's memory runs out     it sounds the alarm (`ranks.breaking`), and drops what it had computed
    the others                   get errors where they wait for it, or find out at the end of their part
    all of them                  meet, on the host; what was broken off is made anew; gradients, buffers, random numbers
                                 and counts are as before the step; the cost model holds less; rank 0 plans the same
                                 samples by it; each rank reads its share of them, and the step begins again

No weight has changed by then, because the optimizer steps after the last part, on all ranks or on none.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import Trainer

from hf_hetero.costs.out_of_memory import fits, room_left, with_room
from hf_hetero.data.training_steps import TrainingData
from hf_hetero.errors import ConfigError, HeteroError, InfeasibleBatch
from hf_hetero.estimate.memory import allocator_advice
from hf_hetero.model.rewind import Before
from hf_hetero.ranks import sharding
from hf_hetero.ranks.agreement import gather, gather_objects
from hf_hetero.ranks.last_words import forget_errors, tell
from hf_hetero.ranks.sharding import Exchange
from hf_hetero.step import Step, StepBatch, StepPart
from hf_hetero.trainer.run import BetweenRuns, ConfirmedStep, PlannedRun
from hf_hetero.trainer.stopping import is_out_of_memory

logger = logging.getLogger(__name__)

MOST_REPEATS = 20
"""After so many a step is given up; by then ranks would hold an eighth of what they did."""
Compute = Callable[[StepBatch, range, Callable[[int], None]], torch.Tensor]
"""Micro-batches of a step, and what is told the number of each before it begins -> this rank's part of the loss."""


class Account(NamedTuple):
    """An `Account` is how a part of a step went on one rank, in whole numbers, for the other ranks.

    Args:
        ran_out: its memory ran out.
        micro_batch: in which micro-batch.
        tokens: that it held there.
        room_bytes: for activations, with which to go on.
    """

    ran_out: int = 0
    micro_batch: int = 0
    tokens: int = 0
    room_bytes: int = 0


@dataclass(slots=True)
class Repeats:
    """`Repeats` is what is known of the step underway, should it have to be repeated.

    Args:
        step: the step, by its plan of now.
        before: as things were before it.
        loss: of the parts that were computed and handed to Trainer.
        number: how often it was repeated.
        micro_batch: that is computed now.
        exchanges: of the wrapper.
    """

    step: ConfirmedStep | None = None
    before: Before | None = None
    loss: torch.Tensor | float = 0.0
    number: int = 0
    micro_batch: int = 0
    exchanges: list[Exchange] = field(default_factory=list[Exchange])


@dataclass(frozen=True, slots=True)
class Attempt:
    """An `Attempt` is what it takes to compute a part of a step, and to repeat the step if memory runs out.

    Args:
        trainer, run, between, data: the run.
        model: in its wrapper.
        compute: runs micro-batches.
        forget: drops what was measured of the step.
        repeats: of the step underway.
    """

    trainer: Trainer
    run: PlannedRun
    between: BetweenRuns
    data: TrainingData
    model: torch.nn.Module
    compute: Compute
    forget: Callable[[], None]
    repeats: Repeats = field(default_factory=Repeats)

    @property
    def number(self) -> int:
        """Return the number of the step."""
        return self.trainer.state.global_step + 1

    def part(self, step: ConfirmedStep, part: StepPart) -> torch.Tensor:
        """Return this rank's part of the loss of some micro-batches; a collective of all ranks.

        Where memory runs out, the whole step is repeated at once, with a plan for less; the loss is then what makes up
        the step's, together with that of the parts before, and nothing is left to do in the parts that follow.

        Args:
            step: that all ranks hold.
            part: of it.

        Raises:
            InfeasibleBatch: the step cannot be planned for what memory seems to hold; raised on every rank.
            HeteroError: it was repeated too often; raised on every rank.
        """
        repeats = self.repeats
        if repeats.step is not step:
            before = Before.now(self.trainer, self.model, self.trainer.args.device)
            repeats.step, repeats.before, repeats.loss, repeats.number = step, before, 0.0, 0
        elif repeats.number:
            return torch.zeros((), device=self.trainer.args.device)
        loss, accounts = self._tried(part.batch, part.numbers)
        if loss is not None:
            repeats.loss = repeats.loss + loss.detach()
            return loss
        while loss is None:
            self._lower(accounts)
            batch = self._begin_anew()
            loss, accounts = self._tried(batch, range(len(batch.micro_batches)))
        return loss - repeats.loss

    def _tried(self, batch: StepBatch, numbers: range) -> tuple[torch.Tensor | None, list[Account]]:
        """Compute some micro-batches, unless memory runs out on any rank; return how it went on each of them."""
        loss, account = self._computed(batch, numbers)
        accounts = [Account(*row) for row in gather(account, self.run.control)]
        return (None if any(a.ran_out for a in accounts) else loss), accounts

    def _computed(self, batch: StepBatch, numbers: range) -> tuple[torch.Tensor | None, Account]:
        """Compute some micro-batches on this rank. None: its memory, or another's, has run out."""
        alarm, account = self.run.groups.alarm, Account()
        try:
            if alarm is None:
                return self.compute(batch, numbers, self._note), account
            with alarm.heard():
                return self.compute(batch, numbers, self._note), account
        except Exception as error:
            assert self.repeats.before is not None
            if not is_out_of_memory(error):
                if alarm is None or not alarm.follow():
                    self.run.groups.check()  # the error may be of what was broken off then
                    raise
            elif self.repeats.before.has_gradients or not sharding.can_begin_anew(self.model):
                raise
            else:
                account = self._account(batch)
                tell(error)  # where others look who miss this rank in an exchange
                if alarm is not None:
                    alarm.sound()
                logger.warning("Step %d: %s", self.number, str(error).partition("\n")[0])
            _let_go(error)
        return None, account

    def _note(self, index: int) -> None:
        self.repeats.micro_batch = index

    def _account(self, batch: StepBatch) -> Account:
        """Say what this rank held when its memory ran out."""
        micro_batch = batch.micro_batches[self.repeats.micro_batch]
        cost, step = self.between.cost_model_of_now(), batch.share.step
        held, planned = micro_batch.num_tokens, step.planned_lengths
        if step.as_text:  # images took room, too: as much as plans say
            samples = [(micro_batch.group.samples[span.sample], span.num_tokens) for span in micro_batch.spans]
            held = round(sum(planned[sample] * tokens / step.lengths[sample] for sample, tokens in samples))
        room = room_left(cost, step.plan, micro_batch.group, held, planned, max(step.lengths))
        return Account(1, self.repeats.micro_batch, micro_batch.num_tokens, room)

    def _lower(self, accounts: list[Account]) -> None:
        """Have plans hold less from now on, the same on all ranks, and say so.

        Raises:
            InfeasibleBatch, HeteroError: as `part`.
        """
        cost, repeats = self.between.cost_model_of_now(), self.repeats
        room, rank = min((a.room_bytes, rank) for rank, a in enumerate(accounts) if a.ran_out)
        where = f"Step {self.number}, micro-batch {accounts[rank].micro_batch}: rank {rank} ran out of memory"
        held = f"{where} with {accounts[rank].tokens:,} tokens"
        if repeats.number == MOST_REPEATS:
            raise _known_to_all(HeteroError(f"{held}, after {MOST_REPEATS} repeats of the step. {REMEDY}"))
        try:
            self.between.cost_model = with_room(cost, room)
        except ConfigError as error:
            raise _known_to_all(InfeasibleBatch(f"{held}, and cannot hold fewer. {REMEDY}")) from error
        repeats.number += 1
        if self.trainer.args.process_index == 0:
            logger.warning(
                "%s. A rank now holds %s tokens at most, %s before; the step is planned anew and repeated, and so are "
                "all after it. To start with that: HeteroConfig.max_tokens_per_rank. %s",
                held,
                f"{self.between.cost_model.capacity_tokens:,}",
                f"{cost.capacity_tokens:,}",
                allocator_advice(self.trainer.args.device),
            )

    def _begin_anew(self) -> StepBatch:
        """Make everything as it was before the step, and return this rank's share of it by a new plan."""
        repeats, run = self.repeats, self.run
        assert repeats.step is not None
        assert repeats.step.batch is not None
        assert repeats.before is not None
        run.groups.mend()
        sharding.leave_step(self.model)
        move_exchanges(self.repeats.exchanges, self.model, run)
        repeats.before.restore()
        if run.fitted.experts:
            run.fitted.experts.take()
        self.forget()
        step, repeats.step = repeats.step.batch.share.step, None
        _free(self.trainer.args.device)
        forget_errors()
        repeats.step = _again(self.data, run, step, self.number)
        assert repeats.step.batch is not None
        repeats.before.restore_random_numbers()  # reading may have drawn some
        run.groups.hurry()
        return repeats.step.batch


REMEDY = "Use more ranks, sharded weights (FSDP2), activation_policies=['recompute', 'offload'], or shorter samples."


def next_step(
    run: PlannedRun, between: BetweenRuns, data: TrainingData | None, epoch: object, number: int
) -> ConfirmedStep:
    """Return the next step of an epoch, once all ranks hold it, by a plan for which there is room. A collective.

    Plans are made ahead, and batches read ahead: those that are on their way when memory runs out hold too much.

    Raises:
        HeteroError: a bad sample, or another plan, on any rank; raised on all.
    """
    assert data is not None
    step, cost = run.confirmed(data.steps_of(epoch), number), between.cost_model_of_now()
    if not cost.ran_out or step.batch is None:
        return step
    planned = step.batch.share.step
    return step if fits(cost, planned.plan, planned.planned_lengths) else _again(data, run, planned, number)


def _again(data: TrainingData, run: PlannedRun, step: Step, number: int) -> ConfirmedStep:
    """Return a step by a plan of now, once all ranks hold it."""
    try:
        return run.confirmed(data.planned_again(step), number)
    except InfeasibleBatch as error:
        told = InfeasibleBatch(f"Step {number} has no room in what memory held since it ran out. {error} {REMEDY}")
        raise _known_to_all(told) from error


def adopt_exchanges(model: torch.nn.Module, run: PlannedRun) -> list[Exchange]:
    """Let a wrapper exchange over groups that can be broken off. A collective; return what can be put back."""
    if run.control is None:
        return []
    exchanges = sharding.exchanges_of(model)
    # every rank makes every group: under HSDP each knows its own only
    mine = [exchange.ranks for exchange in exchanges]
    # what routers chose is told to all, as embeddings are, and replicas have no group of all ranks
    if run.fitted.router_loss or run.fitted.sharding.replicas > 1:
        mine.append(tuple(range(run.args.world_size)))
    asked = gather_objects(mine, run.control)
    run.groups.carry(sorted({ranks for one in asked for ranks in one}))
    move_exchanges(exchanges, model, run)
    return exchanges


def move_exchanges(exchanges: Sequence[Exchange], model: torch.nn.Module, run: PlannedRun) -> None:
    """Let a wrapper exchange over the pool's groups of now."""
    for exchange in exchanges:
        exchange.set(run.groups.carried[exchange.ranks])
    # of the groups that are carried, this rank is in some only
    carried = [group for ranks, group in run.groups.carried.items() if run.args.process_index in ranks]
    run.groups.include([*sharding.groups_of(model), *carried])


def _known_to_all(error: HeteroError) -> HeteroError:
    error.is_known_to_all = True
    return error


def _let_go(error: BaseException | None) -> None:
    """Take from the frames that an error came through what they held: inputs, activations, graphs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__cause__ or error.__context__


def _free(device: torch.device) -> None:
    """Give memory back that nothing needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
