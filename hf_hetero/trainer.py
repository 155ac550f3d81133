"""HeteroTrainer: a transformers Trainer whose steps are planned.

One item of the DataLoader is one optimizer step: transformers fixes the number of batches of a step, a plan does not.
So transformers sees an accumulation of 1, and `training_step` runs as many micro-batches as the plan has.

The methods of `Trainer` that are overridden, and why:

    __init__                        set the model's attention, make the groups, refuse what is not exact
    train, _save_checkpoint         checkpoints are known to be whole, and bring cost model and place in the data
    get_total_train_batch_size      the user's gradient_accumulation_steps still counts
    get_train_dataloader            items are planned steps
    get_batch_samples               all ranks confirm the step before it starts
    training_step                   the loop over micro-batches
    get_eval_dataloader, get_test_dataloader, evaluation_loop     evaluation is planned, too
    floating_point_ops, _track_num_input_tokens     an item is a step, not a dict of tensors
    log                             add the callbacks' numbers
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_hetero import checkpoint, evaluation, exactness, lm_head, sharding
from hf_hetero.agreement import broadcast, confirm_step, gather
from hf_hetero.attention import interface, kernels
from hf_hetero.attention.context import AttentionContext
from hf_hetero.callbacks import PlanMetricsCallback, StepReportCallback
from hf_hetero.checkpoint import Run, Saving, StopWhenAsked
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.cost_model import CostModel
from hf_hetero.errors import HeteroError, UnsupportedModel
from hf_hetero.groups import GroupPool, named
from hf_hetero.lengths import PACKED_COLUMN
from hf_hetero.lm_head import LeanHead
from hf_hetero.loader import TrainingData, streamed_data, training_data
from hf_hetero.loss import token_loss
from hf_hetero.machine import Machine, keep_cost_model, set_up
from hf_hetero.plan import StepReport
from hf_hetero.plan_ahead import PlanSource
from hf_hetero.planning import Planners, planning_of
from hf_hetero.predictions import Evaluation
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.stream import is_stream
from hf_hetero.timing import StepClock

logger = logging.getLogger(__name__)


class HeteroTrainerMixin(Trainer):
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
        exactness.check_trainer_class(type(self))
        self.hetero = hetero or HeteroConfig()
        self._accumulation = 1
        if args is not None:
            exactness.check_arguments(args)
            self._accumulation = args.gradient_accumulation_steps
            args = copy.copy(args)
            args.gradient_accumulation_steps = 1
        super().__init__(model, args, *others, **kwargs)
        if (theirs := self.pop_callback(JITCheckpointCallback)) is not None:
            theirs.on_train_end(self.args, self.state, self.control)  # gives SIGTERM back
        exactness.check_arguments(self.args)
        exactness.check_num_ranks(self.hetero.num_ranks, self.args.world_size)
        exactness.check_model(self)

        self._packer = self._make_packer()
        self._kernel = self._set_attention()
        self._machine: Machine | None = None
        self._sharding = sharding.Sharding()
        self.cost_model: CostModel | None = None
        self._data: TrainingData | None = None
        self._clock: StepClock | None = None
        self._resumed_from: str | None = None
        self._run_before: Run | None = None
        self._fetch_s = 0.0
        if not any(isinstance(callback, PlanMetricsCallback) for callback in self._step_callbacks()):
            self.add_callback(PlanMetricsCallback())
        self._stop = StopWhenAsked()
        self.add_callback(self._stop)

    # ------------------------------------------------------------------------------------------------ set up

    def _make_packer(self) -> PackedCollator:
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator):
            return collator
        if collator is default_data_collator or type(collator) is DataCollatorWithPadding:
            pad = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = PackedCollator(pad_token_id=pad if pad is not None else 0)
            return self.data_collator
        # theirs keeps serving evaluation; in training it makes the labels of one sample at a time
        return PackedCollator(example_collator=collator)

    def _set_attention(self) -> kernels.Kernel:
        base: Any = exactness.base_model(self.model)
        kernel = kernels.choose_kernel(
            self.args.device.type,
            self._compute_dtype(),
            kernels.features_of(base.config),
            base.config._attn_implementation,
        )
        interface.register()
        base.set_attn_implementation(interface.ATTENTION_NAME)
        if base.loss_function is ForCausalLMLoss:
            base.loss_function = token_loss
        self._head = self._set_head(base)
        logger.info("Attention %r with kernel %r.", interface.ATTENTION_NAME, kernel.name)
        return kernel

    def _set_head(self, base: Any) -> LeanHead | None:
        """Its output embedding, if it can do without whole logits."""
        if not self.hetero.chunked_loss or self.args.use_liger_kernel or self.args.torch_compile:
            return None  # Liger brings a loss of its own; a compiler sees through no lazy tensor
        head = lm_head.install(base)
        if isinstance(head, LeanHead):
            return head
        logger.warning("Whole logits are computed for the loss: %s.", head)
        return None

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        return exactness.base_model(self.model).dtype

    def _set_up_planning(self) -> Machine:
        """Made when training first starts, kept for later runs."""
        if self._machine is None:
            assert isinstance(self.model, torch.nn.Module)
            self._sharding = sharding.sharding_of(self, self.hetero.sync_each_micro_batch)
            self._machine = set_up(
                self.model, self.args, self.hetero, self._compute_dtype(), self._sharding, self._resumed_from
            )
            self.cost_model = self._machine.cost_model
        return self._machine

    @property
    def groups(self) -> GroupPool:
        """Process groups of the run."""
        return self._set_up_planning().groups

    # -------------------------------------------------------------------------------------- resuming and saving

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, from a checkpoint that is whole; it also brings its cost model and how far data was read.

        Raises:
            ConfigError: no such checkpoint, or its data were others; raised on every rank.
        """
        self._resumed_from, self._run_before = None, None
        if resume_from_checkpoint:
            resume_from_checkpoint = self._resumed_from = self._find_checkpoint(resume_from_checkpoint)
        try:
            # the wrapper's own collectives, and Trainer's
            names = named("Training", lambda: f"step {self.state.global_step + 1}", only_lost_peers=True)
            with names, self._stop.listening(self.args.enable_jit_checkpoint):
                return super().train(resume_from_checkpoint, *others, **kwargs)
        finally:
            if self._data is not None:
                self._data.close()

    def _find_checkpoint(self, asked: str | bool) -> str:
        # its cost model decides which groups there are, so they cannot carry this yet
        messengers = GroupPool((), self.hetero.group_timeout_s, self.args.ddp_timeout)
        output_dir = Path(self.args.output_dir or ".")
        folder, self._run_before, passed_over = broadcast(
            lambda: checkpoint.chosen(asked, output_dir), messengers.control
        )
        messengers.close()
        if passed_over and self.args.process_index == 0:
            logger.warning("Resuming from %s. Passed over: %s", folder, " ".join(passed_over))
        return str(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, but known to be whole, or removed."""
        assert self._data is not None
        assert self.cost_model is not None
        cost, step = self.cost_model, self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        stream = self._data.stream.position(step) if self._data.stream is not None else None

        def save() -> None:
            super(HeteroTrainerMixin, self)._save_checkpoint(model, trial)
            if self.args.should_save:
                keep_cost_model(folder, cost, self.args.world_size)

        saving = Saving(self.args, self.groups.control, may_wait=self._sharding.is_sharded)
        run = Run(self.args.world_size, self._data.order, stream)
        saving.write(save, folder, run, best=lambda: self.state.best_model_checkpoint)

    # -------------------------------------------------------------------------------------------------- data

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples of a step: per device x accumulation x ranks, as without plans."""
        return super().get_total_train_batch_size(args) * self._accumulation

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Items are planned steps. Not prepared by accelerate, which would deal them out among the ranks.

        Raises:
            BadSample: the dataset has no tokens, or an empty sample.
        """
        if self.train_dataset is None:
            raise HeteroError("Training needs a train_dataset.")
        if self._data is not None:
            self._data.close()
        planning = planning_of(self.hetero, self._plan_source(), self.groups.control)
        before = self._run_before if not self.args.ignore_data_skip else None
        common: dict[str, Any] = {
            "collate": self._packer,
            "args": self.args,
            "batch_size": self.get_total_train_batch_size(self.args),
            "planning": planning,
            "global_step": lambda: self.state.global_step,
        }
        if is_stream(self.train_dataset):
            kept = before.stream if before is not None else None
            self._data = streamed_data(self.train_dataset, self._columns_kept(), kept=kept, **common)
        else:
            columns = partial(self._remove_unused_columns, description="training")
            self._data = training_data(self.train_dataset, columns, **common)
        checkpoint.check_order(self._data.order, before.order if before is not None else {})
        return self._data.loader

    def _columns_kept(self) -> list[str] | None:
        """Columns of a stream that are used; None: all."""
        if not self.args.remove_unused_columns:
            return None
        self._set_signature_columns_if_needed()
        return [*(self._signature_columns or []), PACKED_COLUMN]

    def _plan_source(self) -> PlanSource:
        return self._planners().for_training(reproducible=self.args.full_determinism)

    def _planners(self) -> Planners:
        methods = [m for m in self.hetero.methods if self._kernel.has_lse or not m.endswith("ring")]
        return Planners(self.hetero, self.args.world_size, self._cost_model_of_now, methods or ["ulysses"])

    def _cost_model_of_now(self) -> CostModel:
        assert self.cost_model is not None
        return self.cost_model

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
        total, self._stop.is_agreed = confirm_step(
            self.state.global_step + 1, digest, targets, error, self.groups.control, self._stop.is_asked
        )
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
            with lazy, sharding.synchronising(self, model, is_synced), clock.micro_batch():
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

    def _context(self, micro_batch: RankMicroBatch, index: int) -> AttentionContext:
        group = micro_batch.group
        rank = self.args.process_index if self.args.world_size > 1 else 0
        inner = micro_batch.layout.inner
        first = rank - rank % inner
        return AttentionContext(
            micro_batch.layout,
            group.ranks,
            rank,
            self.groups.get(group.ranks),
            group.method,
            self._kernel,
            self.args.device,
            step=self.state.global_step + 1,
            micro_batch=index,
            inner_group=self.groups.get(tuple(range(first, first + inner))),
            keeps=self.hetero.keep_exchanged and self._sharding.checkpointing and torch.is_grad_enabled(),
        )

    def _report(self, batch: StepBatch, seconds: float, busy_s: list[float], num_targets: Any) -> None:
        assert self.cost_model is not None
        peak = torch.cuda.max_memory_allocated(self.args.device) if self.args.device.type == "cuda" else 0
        mine = [peak, *(round(1e9 * s) for s in busy_s)]
        rows = gather(mine, self.groups.control)
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
        )
        for callback in self._step_callbacks():
            callback.on_step_report(self.args, self.state, report)
            if (cost := callback.recalibrated(self.cost_model)) is not None:
                self.cost_model = cost

    def _step_callbacks(self) -> list[StepReportCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, StepReportCallback)]

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


class HeteroTrainer(HeteroTrainerMixin):
    """`transformers.Trainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`."""
