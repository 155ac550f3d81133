"""HeteroTrainer is a transformers Trainer whose steps are planned.

Trainer's loop counts batches: so many an epoch, so many a step (`gradient_accumulation_steps`). It keeps its own
loader, which says how many there are and which samples a step draws. What it then trains on comes from a planned step
beside it: the micro-batches of the plan, dealt out over the batches of the step.

`HeteroTrainerMixin` is the methods of `Trainer` that are overridden, and the run that they hold (README.md: in order).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_hetero.checks import exactness, overrides
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.planning import Planners
from hf_hetero.errors import HeteroError
from hf_hetero.model.logged_means import LoggedMeans
from hf_hetero.ranks import sharding
from hf_hetero.ranks.made_together import confirm_weights, made_together
from hf_hetero.trainer import reporting, training
from hf_hetero.trainer.checkpoints.restoring import RestoresWeights
from hf_hetero.trainer.checkpoints.resuming import to_resume
from hf_hetero.trainer.checkpoints.saves import SavesWhole
from hf_hetero.trainer.classes.planned import LearnsClasses
from hf_hetero.trainer.evaluation import evaluation
from hf_hetero.trainer.fitting import Fitted, accept, compute_dtype
from hf_hetero.trainer.loop_counts import CountsByStep, check_global_batch
from hf_hetero.trainer.out_of_memory import next_step
from hf_hetero.trainer.packing import collator_of, packer_of
from hf_hetero.trainer.run import BetweenRuns, PlannedRun
from hf_hetero.trainer.stopping import OneDecision, StopWhenAsked, ending_in_words, evaluating_in_words


class HeteroTrainerMixin(SavesWhole, RestoresWeights, CountsByStep, LearnsClasses):
    """`HeteroTrainerMixin` goes before any Trainer: `class HeteroSFTTrainer(HeteroTrainerMixin, SFTTrainer)`.

    Args:
        model, args, and all others: as for the Trainer below it. `args` is not changed.
        hetero: settings; every default is right for most.

    Raises:
        UnsupportedModel: the model or an option under which plans would change the learning.
        ConfigError: a setting or a cost model that cannot be what was meant.

    Attributes:
        hetero: the settings.
        _between_runs: what stays from one run to the next.
        _planned_run, _training: the run of now, and what `train` has open beside it; None otherwise.
        _stop, _decision: callbacks that decide how a run ends.
    """

    @made_together
    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        overrides.check(type(self))
        self.hetero = hetero or HeteroConfig()
        self._planned_run: PlannedRun | None = None
        self._training: training.Training | None = None
        if args is not None:  # before Trainer does what they say
            exactness.check_arguments(args)
        super().__init__(model, args, *others, **kwargs)
        exactness.check_arguments(self.args)  # which a subclass may have made of them
        exactness.check_num_ranks(self.hetero.num_ranks, self.args.world_size)
        check_global_batch(self.hetero.global_batch_size, self.args)
        exactness.check_model(self)
        self.data_collator = collator_of(self)
        self._between_runs = BetweenRuns(LoggedMeans(self))
        self._between_runs.try_untested(self, self.hetero)
        accept(self, self._between_runs.manner)
        reporting.add_callbacks(self)
        if (theirs := self.pop_callback(JITCheckpointCallback)) is not None:
            theirs.on_train_end(self.args, self.state, self.control)  # gives SIGTERM back
        self._stop = StopWhenAsked()
        self.add_callback(self._stop)
        self._decision = OneDecision(lambda: self._run.control if self.is_in_train and self._training else None)

    _compute_dtype = compute_dtype

    @property
    def cost_model(self) -> CostModel | None:
        """Return what plans are made by; callbacks may refit it. None before the first planned step."""
        return self._between_runs.cost_model

    @contextmanager
    def _fitted(self) -> Iterator[Fitted]:
        """Give the model fitted for planned steps: as it is while training, or for an evaluation of its own."""
        if self._planned_run is not None:
            yield self._planned_run.fitted
            return
        fitted = self._between_runs.fit(self, self.hetero)
        try:
            yield fitted
        finally:
            self._planned_run = None
            fitted.close()

    def _run_on(self, fitted: Fitted) -> PlannedRun:
        """Return the run of now, or else one on this model. A collective of all ranks where groups are closed."""
        if self._planned_run is None:
            packer, checkpoint = self._make_packer(), self._training.checkpoint if self._training is not None else None
            self._planned_run = self._between_runs.run_on(fitted, self, self.hetero, packer, checkpoint)
        return self._planned_run

    def _make_packer(self) -> PackedCollator:
        """Make what packs rows as the trainer's collator of now makes them. A subclass may know other collators."""
        return packer_of(self.data_collator, self.processing_class)

    def _planners(self) -> Planners:
        """Return what plans evaluations. A subclass may plan otherwise."""
        return self._run.planners

    def _plan_source(self) -> PlanSource:
        """Return where plans of training come from. A subclass may plan otherwise."""
        return self._planners().for_training(reproducible=self.args.full_determinism)

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`, from a checkpoint that is whole, with its cost model, at its place in the data.

        What a run has opened, and set on the model, is closed and taken off again, however it ends.

        Raises:
            ConfigError: no such checkpoint, or its data were others; raised on every rank.
        """
        self.pop_callback(OneDecision)
        self.add_callback(self._decision)  # after all that were added meanwhile, whose wishes it joins
        with self._between_runs.running(), ExitStack() as opened:
            opened.callback(setattr, self, "_training", None)
            opened.callback(reporting.close_bars, self)
            self._training = training.Training(opened)
            opened.callback(self._training.let_writing_end)
            resumed = to_resume(self, self.hetero, resume_from_checkpoint, self._between_runs.has_learned)
            if resumed is not None:
                self._training.resumed, resume_from_checkpoint = resumed, str(resumed.folder)
            sharding.forget_evaluation(self)
            words = ending_in_words(lambda: self.state.global_step + 1)
            with words, sharding.saying_why_not_again(), self._stop.listening(self.args.enable_jit_checkpoint):
                return super().train(resume_from_checkpoint, *others, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's own loader, which says how long an epoch is and in which order; its batches can be read.

        While training, steps are drawn from a loader beside it, whose items are planned (`get_batch_samples`).

        Raises:
            BadSample: the dataset has no tokens, or an empty sample.
        """
        if self.train_dataset is None:
            raise HeteroError("Training needs a train_dataset.")
        loader = super().get_train_dataloader()
        if self._training is not None and self._training.data is None:
            run = self._run_on(self._training.opened.enter_context(self._fitted()))
            confirm_weights(cast("torch.nn.Module", self.model), run.control)
            reporting.begin_calibrating(self, self.hetero, self._between_runs, self._training.resumed)
            training.open_data(self, run, self._training, self._plan_source(), loader)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the next planned step as so many batches, and its target tokens over all ranks.

        Args:
            epoch_iterator: of Trainer's own loader. It is not read: a new one says that a new epoch begins.
            num_batches: of the step; fewer where a stream ends.
            device: of the count.

        Raises:
            HeteroError: a bad sample, or another plan, on any rank; raised on all.
        """
        number = self.state.global_step + 1
        run, between, data = self._run, self._between_runs, self._open.data
        self._open.step = step = next_step(run, between, data, epoch_iterator, number)
        if step.batch is None:
            return [], None
        if not self._between_runs.has_learned:
            training.check_targets(step, number)
        self._between_runs.has_learned = True
        # without targets the loss is 0, not nan
        return self._parts_of(step.batch, num_batches), torch.tensor(max(step.num_targets, 1), device=device)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward of some micro-batches of a step, whose last one synchronises gradients.

        Returns:
            This rank's part of the step's loss, times the number of ranks.
        """
        part = training.step_part(inputs, type(self).__name__)

        def forward_backward(inputs: dict[str, Any]) -> torch.Tensor:
            return super(HeteroTrainerMixin, self).training_step(model, inputs, num_items_in_batch)

        loss = training.train_part(self, self._run, self._open, self._between_runs, model, part, forward_backward)
        if part.is_last:
            reporting.report(self, self._run, self._open, self._between_runs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; training logs also carry what the step callbacks counted."""
        assert self.model is not None
        self._between_runs.means.weigh("train" if self.model.training else "eval")
        if "loss" in logs:
            for callback in reporting.step_callbacks(self):
                logs.update(callback.metrics())
        super().log(logs, start_time)
        if start_time is not None:  # from the loop of training, on all ranks; a script may log on one
            self._decision.join(self.control)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does; several datasets share the groups.

        Raises:
            CollectiveFailed: a rank that was waited for has gone, or is late.
        """
        with self._between_runs.running(), evaluating_in_words():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `Trainer.predict` does.

        Raises:
            CollectiveFailed: as `evaluate`.
        """
        with self._between_runs.running(), evaluating_in_words():
            return super().predict(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's own loader, whose batches can be read; `evaluation_loop` plans its dataset if it can."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast("Any", self.eval_dataset)[dataset]
        seen = evaluation.watched(dataset)
        loader = super().get_eval_dataloader(eval_dataset if seen is dataset else seen)
        return self._between_runs.noted(loader, dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return Trainer's own loader, whose batches can be read; `evaluation_loop` plans its dataset if it can."""
        return self._between_runs.noted(super().get_test_dataloader(evaluation.watched(test_dataset)), test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate by planned steps, loss by tokens, outputs in the dataset's order; other loaders go the stock way.

        Raises:
            HeteroError: a bad sample, on every rank; or `preprocess_logits_for_metrics` does not keep a value a token.
        """
        dataset, is_within = self._between_runs.evaluated.get(dataloader), self._planned_run is not None
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        with self._fitted() as fitted:
            if evaluation.is_planned(self, self.hetero, dataset, lambda: self._run_on(fitted).control):
                self.callback_handler.eval_dataloader = cast("Any", dataloader)
                request = evaluation.Request(dataset, loss_only, description == "Prediction", ignore_keys)
                run, source = self._run_on(fitted), self._planners().for_evaluation()
                return evaluation.evaluate(self, run, self._between_runs, request, source, metric_key_prefix)
            evaluation.refuse_packed_rows(dataset)
            if not is_within:  # Trainer evaluates the model as the user made it
                self._planned_run = None
                fitted.close()
            elif not loss_only:
                evaluation.refuse_attentions(self.model)
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )


class HeteroTrainer(HeteroTrainerMixin):
    """`HeteroTrainer` is `transformers.Trainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`."""
