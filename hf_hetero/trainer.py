"""HeteroTrainer: a transformers Trainer whose steps are planned.

One item of the DataLoader is one optimizer step: transformers fixes the number of batches of a step, a plan does not.
So transformers sees an accumulation of 1, and `training_step` runs as many micro-batches as the plan has.

The methods of `Trainer` that are overridden, by the class they are in, and why:

    preparation.PreparedTrainer
        __init__                        set the model's attention and head, refuse what is not exact
    resumption.ResumableTrainer
        get_total_train_batch_size      the user's gradient_accumulation_steps still counts
        get_train_dataloader            items are planned steps
        train, _save_checkpoint, save_model     checkpoints are known to be whole, and bring cost model and place in the
                                        data; runs end in words
    trainer.HeteroTrainerMixin
        get_batch_samples               all ranks confirm the step before it starts
        training_step                   the loop over micro-batches
        get_eval_dataloader, get_test_dataloader, evaluation_loop     evaluation is planned, too
        floating_point_ops, _track_num_input_tokens     an item is a step, not a dict of tensors
        log                             add the callbacks' numbers
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_hetero import evaluation, exactness, sharding
from hf_hetero.agreement import confirm_rows, confirm_step, gather
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import UnsupportedModel
from hf_hetero.plan import StepReport
from hf_hetero.planning import planning_of
from hf_hetero.predictions import Evaluation
from hf_hetero.resumption import ResumableTrainer
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.timing import StepClock

logger = logging.getLogger(__name__)


class HeteroTrainerMixin(ResumableTrainer):
    """Put it before any Trainer: `class HeteroSFTTrainer(HeteroTrainerMixin, SFTTrainer)`.

    Args:
        model, args, and all others: as for the Trainer below it. `args` is copied, not changed.
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
        self._fetch_s = 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepBatch], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """One step, confirmed by all ranks, and its target tokens over all of them.

        Raises:
            HeteroError: a bad sample, or another plan, on any rank; raised on all.
        """
        error: Exception | None = None
        step: StepBatch | None = None
        start = time.perf_counter()
        try:
            step = next(epoch_iterator, None)
        except Exception as raised:  # told to the other ranks first, then raised on all of them
            error = raised
        self._fetch_s = time.perf_counter() - start
        if step is None and error is None:
            return [], None
        digest, targets = (step.share.step.digest(), step.num_targets) if step is not None else (0, 0)
        number, control = self.state.global_step + 1, self.groups.control
        total = confirm_step(number, digest, targets, error, control)
        assert step is not None
        confirm_rows(number, step.share.step.shared_rows(), step.fingerprints, control)
        return [step], torch.tensor(max(total, 1), device=device)

    # ------------------------------------------------------------------------------------------------- step

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of all micro-batches of a step; gradients are synchronised by the last one.

        Returns:
            This rank's part of the step's loss, times the number of ranks.
        """
        step: StepBatch = inputs
        clock = self._clock or self._start_clock(model)
        start = time.perf_counter()
        total = torch.zeros((), device=self.args.device)
        for index, micro_batch in enumerate(step.micro_batches):
            context = self._context(micro_batch, index)
            is_synced = self._sharding.syncs_each or index == len(step.micro_batches) - 1
            lazy = nullcontext() if self._head is None else self._head.lazy()
            saving = self._activations.following(micro_batch.group.activations, context.store)
            with lazy, saving, sharding.synchronising(self, model, is_synced), clock.micro_batch():
                loss = super().training_step(model, {**micro_batch.inputs, "hetero": context}, num_items_in_batch)
            total += loss
            if not context.reached:
                raise UnsupportedModel(
                    f"{type(exactness.base_model(self.model)).__name__} never called its attention through "  # pyright: ignore
                    "transformers' interface, so samples cannot be shared among ranks. Use plain Trainer."
                )
        busy_s = clock.read()
        self._report(step, time.perf_counter() - start, busy_s, num_items_in_batch)
        return total

    def _start_clock(self, model: torch.nn.Module) -> StepClock:
        """For the first step: by now accelerate has wrapped the model."""
        sharding.check_wrapper(model, self.args)
        self._clock = StepClock(self.model, self.args.device)  # pyright: ignore[reportArgumentType]
        return self._clock

    def _report(self, batch: StepBatch, seconds: float, busy_s: list[float], num_targets: Any) -> None:
        assert self.cost_model is not None
        peak = torch.cuda.max_memory_allocated(self.args.device) if self.args.device.type == "cuda" else 0
        mine = [peak, *(round(1e9 * s) for s in busy_s)]
        control = self.groups.control
        rows = gather(mine, control)
        report = StepReport(
            step=self.state.global_step + 1,
            plan=batch.share.step.plan,
            lengths=batch.share.step.lengths,
            num_targets=int(num_targets),
            seconds=seconds,
            busy_s=tuple(tuple(row[1 + m] / 1e9 for row in rows) for m in range(len(busy_s))),
            wait_s=self._fetch_s,
            plan_wait_s=batch.share.step.wait_s,
            peak_bytes=max(row[0] for row in rows),
            is_lockstep=self._sharding.is_sharded,
            expert_load=self._experts.of_all(gather(self._experts.take(), control)) if self._experts else (),
        )
        for callback in self._step_callbacks():
            callback.on_step_report(self.args, self.state, report)
            if (cost := callback.recalibrated(self.cost_model)) is not None:
                self.cost_model = cost

    # ------------------------------------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Items are planned steps, where the dataset can be planned; else stock."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast("Any", self.eval_dataset)[dataset]
        return self._evaluation_loader(dataset) or super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Items are planned steps, where the dataset can be planned; else stock."""
        return self._evaluation_loader(test_dataset) or super().get_test_dataloader(test_dataset)

    def _evaluation_loader(self, dataset: Any) -> evaluation.EvaluationLoader | None:
        if not self.hetero.plan_evaluation or dataset is None or not evaluation.can_be_planned(dataset, self.args):
            return None
        planning = planning_of(self.hetero, self._planners().for_evaluation(), self.groups.control)
        columns = partial(self._remove_unused_columns, description="evaluation")
        return evaluation.evaluation_loader(dataset, columns, self._packer, self.args, planning)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Loss by tokens, and outputs in the dataset's order, from planned steps; other loaders go the stock way.

        Raises:
            HeteroError: a bad sample, on every rank; or `preprocess_logits_for_metrics` does not keep a value a token.
        """
        if not isinstance(dataloader, evaluation.EvaluationLoader):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        found = Evaluation(
            self.args, self.preprocess_logits_for_metrics, self.compute_metrics, not loss_only, self.groups.control
        )
        model = evaluation.prepared_model(self)
        self.callback_handler.eval_dataloader = cast("Any", dataloader)

        def confirmed(steps: Iterator[StepBatch]) -> tuple[StepBatch, torch.Tensor]:
            [batch], num_targets = self.get_batch_samples(steps, 1, self.args.device)
            return batch, cast("torch.Tensor", num_targets)

        def forward(micro_batch: RankMicroBatch, index: int, num_targets: torch.Tensor) -> tuple[float, Any]:
            inputs = self._prepare_inputs({**micro_batch.inputs, "hetero": self._context(micro_batch, index)})
            with torch.no_grad(), self.compute_loss_context_manager():
                result: Any = self.compute_loss(model, inputs, not loss_only, num_targets)  # pyright: ignore
            loss, outputs = (result, None) if loss_only else result
            return loss.item() / self.args.world_size, outputs  # compute_loss allows for an average over ranks

        def done() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        found.run(dataloader, confirmed, forward, done)
        return found.output(metric_key_prefix)

    # ------------------------------------------------------------------------------------------- accounting

    def floating_point_ops(self, inputs: Any) -> int:
        """Operations of this rank's part of a step."""
        if not isinstance(inputs, StepBatch):
            return super().floating_point_ops(inputs)
        return sum(super(HeteroTrainerMixin, self).floating_point_ops(m.inputs) for m in inputs.micro_batches)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if not isinstance(inputs, StepBatch):
            super()._track_num_input_tokens(inputs)
        elif self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += sum(inputs.share.step.lengths)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training logs also carry what the step callbacks counted."""
        if "loss" in logs:
            for callback in self._step_callbacks():
                logs.update(callback.metrics())
        super().log(logs, start_time)
        if start_time is not None:  # from the loop of training, on all ranks; a script may log on one
            self._decision.join(self.control)


class HeteroTrainer(HeteroTrainerMixin):
    """`transformers.Trainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`."""
