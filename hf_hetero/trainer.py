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
    trainer.HeteroTrainerMixin
        get_batch_samples               the next planned step, confirmed by all ranks before it starts
        training_step                   the loop over micro-batches
        _maybe_log_save_evaluate        how long ranks may wait for each other
        get_eval_dataloader, get_test_dataloader, evaluation_loop     evaluation is planned, too
        evaluate, predict               groups end with them
        log                             add the callbacks' numbers
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_hetero import evaluation, overrides, sharding
from hf_hetero.agreement import broadcast, confirm_rows, confirm_step, gather
from hf_hetero.config import HeteroConfig
from hf_hetero.epochs import KeptCounts
from hf_hetero.errors import BadSample, UnsupportedModel
from hf_hetero.groups import limit_of, named
from hf_hetero.logged_means import LoggedMeans
from hf_hetero.loss import IGNORE_INDEX
from hf_hetero.plan import StepReport
from hf_hetero.planning import planning_of
from hf_hetero.predictions import Evaluation
from hf_hetero.resumption import ResumableTrainer
from hf_hetero.step import RankMicroBatch, StepBatch, StepPart
from hf_hetero.stream import is_stream
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
        self._fetch_s = self._step_s = 0.0
        self._has_learned, self._num_targets = False, 0
        self._counts = KeptCounts()
        self._means = LoggedMeans(self)
        self._evaluated: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; several datasets share the groups."""
        with self._running():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`."""
        with self._running():
            return super().predict(*args, **kwargs)

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

    def _confirmed(self, steps: Iterator[StepBatch]) -> tuple[StepBatch | None, int]:
        """The next step once all ranks hold it, and its target tokens over all of them; None: there is none."""
        error: Exception | None = None
        step: StepBatch | None = None
        start = time.perf_counter()
        try:
            step = next(steps, None)
        except Exception as raised:  # told to the other ranks first, then raised on all of them
            error = raised
        self._fetch_s = time.perf_counter() - start
        if step is None and error is None:
            return None, 0
        digest, targets = (step.share.step.digest(), step.num_targets) if step is not None else (0, 0)
        number, control = self.state.global_step + 1, self.groups.control
        total = confirm_step(number, digest, targets, error, control)
        assert step is not None
        confirm_rows(number, step.share.step.shared_rows(), step.fingerprints, control)
        return step, total

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
        self.groups.hurry()  # what takes its time once, before the first step, is over
        clock = self._clock or self._start_clock(model)
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

    # ------------------------------------------------------------------------------------------- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Trainer's own loader, whose batches can be read; `evaluation_loop` plans its dataset where it can be."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast("Any", self.eval_dataset)[dataset]
        watched = evaluation.watched(dataset)
        loader = super().get_eval_dataloader(eval_dataset if watched is dataset else watched)
        return self._noted(loader, dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Trainer's own loader, whose batches can be read; `evaluation_loop` plans its dataset where it can be."""
        return self._noted(super().get_test_dataloader(evaluation.watched(test_dataset)), test_dataset)

    def _noted(self, loader: DataLoader[Any], dataset: Any) -> DataLoader[Any]:
        self._evaluated[loader] = dataset
        return loader

    def _is_planned(self, dataset: Any) -> bool:
        """Whether an evaluation is; else it is Trainer's own."""
        if not self.hetero.plan_evaluation or dataset is None:
            return False
        for name, owner in overrides.own(self, overrides.EVALUATION).items():
            logger.info("Evaluation is not planned: %s.%s is its own.", owner, name)
            return False
        if self.label_names != ["labels"] or evaluation.gives_attentions(self.model):
            logger.info("Evaluation is not planned: other labels, or attention weights, are asked for.")
            return False
        can_be_planned = partial(evaluation.can_be_planned, dataset, self.args)
        return broadcast(can_be_planned, self.groups.control) if is_stream(dataset) else can_be_planned()

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
        dataset = self._evaluated.get(dataloader)
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        is_new = self._fit()
        try:
            if not self._is_planned(dataset):
                evaluation.refuse_packed_rows(dataset)
                if is_new:
                    self._give_back()
                elif not loss_only:
                    evaluation.refuse_attentions(self.model)
                return super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            self.callback_handler.eval_dataloader = cast("Any", dataloader)
            found = self._evaluate_planned(dataset, loss_only, description == "Prediction", ignore_keys)
            output = found.output(metric_key_prefix)
            if hasattr(self, "model_preparation_time"):  # as in stock, where evaluation comes before training
                metrics = cast("dict[str, Any]", output.metrics)
                metrics[f"{metric_key_prefix}_model_preparation_time"] = self.model_preparation_time
            return output
        finally:
            if is_new:
                self._give_back()

    def _evaluate_planned(
        self, dataset: Any, loss_only: bool, is_prediction: bool, ignore_keys: list[str] | None
    ) -> Evaluation:
        packer = self._packer(needs_labels=False)
        found = Evaluation(
            self.args,
            self.preprocess_logits_for_metrics,
            self.compute_metrics,
            not loss_only,
            self._set_up_planning().groups.control,
            has_labels=is_stream(dataset) or evaluation.has_labels(dataset, packer),
            keeps_batches=is_prediction,
        )
        model = evaluation.prepared_model(self)
        planning = planning_of(self.hetero, self._planners().for_evaluation(), found.control, packer.limits)
        if is_stream(dataset):
            packer = replace(packer, needs_labels=True)  # a stream does not show its first row
            loader = evaluation.streamed_evaluation_loader(dataset, self._columns_kept(), packer, self.args, planning)
        else:
            columns = partial(self._remove_unused_columns, description="evaluation")
            names = self._columns_kept()
            loader = evaluation.evaluation_loader(
                dataset, columns, packer, self.args, planning, names, counts=self._counts
            )
        left_out = {"loss", *(ignore_keys if ignore_keys is not None else evaluation.ignored_outputs(self.model))}

        def forward(micro_batch: RankMicroBatch, index: int, num_targets: int) -> tuple[float, Any]:
            inputs = self._prepare_inputs({**micro_batch.inputs, "hetero": self._context(micro_batch, index)})
            with torch.no_grad(), self.compute_loss_context_manager():
                if not found.has_labels:
                    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
                    return 0.0, evaluation.outputs_of(model(**inputs), left_out)
                total = torch.tensor(max(num_targets, 1), device=self.args.device)
                result: Any = self.compute_loss(model, inputs, not loss_only, total)  # pyright: ignore
            loss, outputs = (result, None) if loss_only else result
            # compute_loss allows for an average over ranks
            return loss.item() / self.args.world_size, None if outputs is None else evaluation.outputs_of(
                outputs, left_out
            )

        def done() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        try:
            found.run(loader, self._confirmed, forward, done)
        except BadSample:  # rows may have changed since they were counted
            self._counts.forget(dataset)
            raise
        if found.has_labels:
            self._means.add("eval", found.micro_batch_targets)
        return found

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
