"""Evaluation and prediction from planned steps: the Trainer methods for it, and when evaluation is Trainer's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader

from hf_hetero import evaluation, overrides
from hf_hetero.agreement import broadcast, confirm_rows, confirm_step
from hf_hetero.epochs import KeptCounts
from hf_hetero.errors import BadSample
from hf_hetero.logged_means import LoggedMeans
from hf_hetero.planning import planning_of
from hf_hetero.predictions import Evaluation
from hf_hetero.resumption import ResumableTrainer
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.stream import is_stream
from hf_hetero.workers import end_with_this_process, named_loss

logger = logging.getLogger(__name__)


class EvaluatingTrainer(ResumableTrainer):
    """A Trainer that evaluates by planned steps where it can. It trains as `ResumableTrainer` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fetch_s = 0.0
        self._counts = KeptCounts()
        self._means = LoggedMeans(self)
        self._evaluated: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; several datasets share the groups."""
        with self._running():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`."""
        with self._running():
            return super().predict(*args, **kwargs)

    def _confirmed(self, steps: Iterator[StepBatch]) -> tuple[StepBatch | None, int]:
        """The next step once all ranks hold it, and its target tokens over all of them; None: there is none."""
        error: Exception | None = None
        step: StepBatch | None = None
        start = time.perf_counter()
        try:
            step = next(steps, None)
        except Exception as raised:  # told to the other ranks first, then raised on all of them
            error = named_loss(raised) if self.args.dataloader_num_workers else raised
        self._fetch_s = time.perf_counter() - start
        if step is None and error is None:
            return None, 0
        digest, targets = (step.share.step.digest(), step.num_targets) if step is not None else (0, 0)
        number, control = self.state.global_step + 1, self.groups.control
        total = confirm_step(number, digest, targets, error, control)
        assert step is not None
        confirm_rows(number, step.share.step.shared_rows(), step.fingerprints, control)
        return step, total

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
        end_with_this_process(loader)
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
