"""HeteroTrainer: a transformers Trainer whose steps are planned.

Trainer's loop counts batches: so many an epoch, so many a step (`gradient_accumulation_steps`). It keeps its own
loader, which says how many there are and which samples a step draws. What it then trains on comes from a planned step
beside it: the micro-batches of the plan, dealt out over the batches of the step.

The methods of `Trainer` that are overridden, by the class they are in, and why:

    preparation.PreparedTrainer
        __init__                        refuse what is not exact
    resumption.ResumableTrainer
        get_train_dataloader            Trainer's; when training starts, also prepare the planned steps
        _init_training_state            in which epoch a stream was left
        train, _save_checkpoint, save_model     checkpoints are known to be whole, and bring cost model and place in the
                                        data; runs end in words
    evaluating.EvaluatingTrainer
        get_eval_dataloader, get_test_dataloader, evaluation_loop     evaluation is planned, too
        evaluate, predict               groups end with them
    trainer.HeteroTrainerMixin
        get_batch_samples               the next planned step, confirmed by all ranks before it starts
        training_step                   the loop over micro-batches
        _maybe_log_save_evaluate        how long ranks may wait for each other
        log                             add the callbacks' numbers
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import TrainingArguments

from hf_hetero import sharding
from hf_hetero.agreement import gather
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import BadSample, UnsupportedModel
from hf_hetero.evaluating import EvaluatingTrainer
from hf_hetero.groups import limit_of, named
from hf_hetero.loss import IGNORE_INDEX
from hf_hetero.plan import StepReport
from hf_hetero.step import RankMicroBatch, StepBatch, StepPart
from hf_hetero.timing import StepClock

logger = logging.getLogger(__name__)


class HeteroTrainerMixin(EvaluatingTrainer):
    """Put it before any Trainer: `class HeteroSFTTrainer(HeteroTrainerMixin, SFTTrainer)`.

    Args:
        model, args, and all others: as for the Trainer below it. `args` is not changed.
        hetero: settings; every default is right for most.

    Raises:
        UnsupportedModel: the model or an option under which plans would change the learning.
        ConfigError: a setting or a cost model that cannot be what was meant.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, *others, hetero=hetero, **kwargs)
        self._clock: StepClock | None = None
        self._step_s = 0.0
        self._has_learned, self._num_targets = False, 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `ResumableTrainer.train`; what watches the model is taken off again."""
        with self._running():
            try:
                return super().train(*args, **kwargs)
            finally:
                if self._clock is not None:
                    self._clock.close()
                self._clock = None
                if self._machine is not None:
                    self._machine.groups.relax()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The next planned step as so many batches, and its target tokens over all ranks.

        Args:
            epoch_iterator: of Trainer's own loader. It is not read: a new one says that a new epoch begins.
            num_batches: of the step; fewer where a stream ends.
            device: of the count.

        Raises:
            HeteroError: a bad sample, or another plan, on any rank; raised on all.
        """
        assert self._data is not None
        batch, num_targets = self._confirmed(self._data.steps_of(epoch_iterator))
        if batch is None:
            return [], None
        if not num_targets and not self._has_learned:
            raise BadSample(
                f"Step {self.state.global_step + 1} has no target token: each label of its "
                f"{len(batch.share.step.rows)} samples is {IGNORE_INDEX}, so there is nothing to learn. Look at how "
                "labels are made."
            )
        self._has_learned, self._num_targets = True, num_targets
        rows, at_once = len(set(batch.share.step.rows)), self._train_batch_size * self.args.world_size
        parts = batch.parts(min(num_batches, -(-rows // at_once)))
        return [*parts], torch.tensor(max(num_targets, 1), device=device)

    # ------------------------------------------------------------------------------------------------- step

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of some micro-batches of a step; gradients are synchronised by its last one.

        Returns:
            This rank's part of the step's loss, times the number of ranks.
        """
        if not isinstance(inputs, StepPart):
            raise UnsupportedModel(
                f"{type(self).__name__}.training_step handed on a batch of its own ({type(inputs).__name__}), which no "
                "plan knows. Hand on the batch it is given; change tensors in data_collator or _prepare_inputs."
            )
        clock = self._clock or self._start_clock(model)
        self.groups.hurry()  # what takes its time once, before the first step, is over
        start = time.perf_counter()
        total = torch.zeros((), device=self.args.device)
        last = len(inputs.batch.micro_batches) - 1
        where = f"step {self.state.global_step + 1}"
        with named("The exchange of gradients", where, limit=limit_of):
            for index, micro_batch in zip(inputs.numbers, inputs.micro_batches, strict=True):
                total += self._micro_batch_loss(model, micro_batch, index, index == last, num_items_in_batch, clock)
        self._step_s += time.perf_counter() - start
        if inputs.numbers.stop > last:
            busy_s, peak_bytes = clock.read(), clock.peak_bytes()
            self._report(inputs.batch, self._step_s, busy_s, peak_bytes)
            self._step_s = 0.0
        return total

    def _micro_batch_loss(
        self,
        model: torch.nn.Module,
        micro_batch: RankMicroBatch,
        index: int,
        is_last: bool,
        num_items_in_batch: torch.Tensor | int | None,
        clock: StepClock,
    ) -> torch.Tensor:
        assert self._fitted is not None
        context = self._context(micro_batch, index)
        lazy = nullcontext() if self._fitted.head is None else self._fitted.head.lazy()
        saving = self._activations.following(micro_batch.group.activations, context.store)
        synchronising = sharding.synchronising(self, model, self._sharding.syncs_each or is_last)
        counting = self._fitted.experts.micro_batch(context.num_tokens)
        with lazy, saving, counting, synchronising, clock.micro_batch():
            loss = super().training_step(model, {**micro_batch.inputs, "hetero": context}, num_items_in_batch)
        if not context.reached:
            raise UnsupportedModel(
                f"{type(self._fitted.model).__name__} never called its attention through transformers' interface, so "
                "samples cannot be shared among ranks. Use plain Trainer."
            )
        return loss

    def _start_clock(self, model: torch.nn.Module) -> StepClock:
        """For the first step: by now accelerate has wrapped the model."""
        sharding.check_wrapper(model, self.args)
        self.groups.include(sharding.groups_of(model))
        # transformers' own count of memory needs the peak of the run
        self._clock = StepClock(self.model, self.args.device, self.args.skip_memory_metrics)  # pyright: ignore[reportArgumentType]
        self._step_s = 0.0
        return self._clock

    def _report(self, batch: StepBatch, seconds: float, busy_s: list[float], peak_bytes: int) -> None:
        assert self.cost_model is not None
        assert self._fitted is not None
        experts = self._fitted.experts
        number = len(busy_s)
        counts = [m.num_targets for m in batch.micro_batches] if self._means else []
        control = self.groups.control
        rows = gather([peak_bytes, *(round(1e9 * s) for s in busy_s), *counts], control)
        self._means.add("train", [sum(row[1 + number + m] for row in rows) for m in range(len(counts))])
        report = StepReport(
            step=self.state.global_step + 1,
            plan=batch.share.step.plan,
            lengths=batch.share.step.lengths,
            num_targets=self._num_targets,
            seconds=seconds,
            busy_s=tuple(tuple(row[1 + m] / 1e9 for row in rows) for m in range(number)),
            wait_s=self._fetch_s,
            plan_wait_s=batch.share.step.wait_s,
            peak_bytes=max(row[0] for row in rows),
            is_lockstep=self._sharding.is_sharded,
            expert_load=experts.of_all(gather(experts.take(), control)) if experts else (),
        )
        for callback in self._step_callbacks():
            callback.on_step_report(self.args, self.state, report)
            if (cost := callback.recalibrated(self.cost_model)) is not None:
                self.cost_model = cost

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; ranks may wait long for one that saves or evaluates."""
        takes_long = self.control.should_save or self.control.should_evaluate
        with self.groups.relaxed() if takes_long else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    # ------------------------------------------------------------------------------------------- accounting

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs also carry what the step callbacks counted."""
        assert self.model is not None
        self._means.weigh("train" if self.model.training else "eval")
        if "loss" in logs:
            for callback in self._step_callbacks():
                logs.update(callback.metrics())
        super().log(logs, start_time)
        if start_time is not None:  # from the loop of training, on all ranks; a script may log on one
            self._decision.join(self.control)


class HeteroTrainer(HeteroTrainerMixin):
    """`transformers.Trainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`."""
