"""HeteroEmbeddingTrainer learns embeddings: of each anchor, its own text is to be the nearest of all of a step's.

The loss of a step is no sum over its samples, so no micro-batch can compute its part of it alone. Where a step has more
than one, each is first computed without a gradient; all ranks then have all embeddings, the loss, and its derivatives
by them. These are the factors with which each micro-batch, computed again, adds its gradients (GradCache,
arXiv:2101.06983): exactly those of one batch that is the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_hetero.attention.context import AttentionContext
from hf_hetero.collators import PackedCollator
from hf_hetero.collators.texts import TextsCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import BadSample, ConfigError, UnsupportedModel
from hf_hetero.model.classes.labelled import NOTHING
from hf_hetero.model.rewind import RandomNumbers
from hf_hetero.ranks.made_together import made_together
from hf_hetero.samples.texts import TextRows
from hf_hetero.step import StepBatch
from hf_hetero.trainer.embeddings.pooling import POOLINGS, over_ranks, pooled
from hf_hetero.trainer.embeddings.ranking import ranking_loss
from hf_hetero.trainer.trainer import HeteroTrainer

NOT_INPUTS = ("labels", "shift_labels")


@dataclass(slots=True)
class AllOfStep:
    """`AllOfStep` is what is known of a step's embeddings before its micro-batches are learned from.

    Args:
        batch: of this rank.
        loss: of the step; None: it has one micro-batch, which computes the loss itself.
        factors: derivatives of the loss by the embeddings, shape (num_texts, width); None where nothing is learned.
        random_numbers: as they were before each micro-batch was computed, so that dropout leaves out the same.
    """

    batch: StepBatch
    loss: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    random_numbers: Sequence[RandomNumbers] = ()


class HeteroEmbeddingTrainer(HeteroTrainer):
    """`HeteroEmbeddingTrainer` is `HeteroTrainer` for models without a head, and rows of texts that belong together.

    Args:
        model, args, hetero, and all others: as for `HeteroTrainer`. `train_dataset` has rows of texts, or of their
            tokens: an `anchor` (or `query`), a `positive` (or `passage`), and columns that begin with `negative`.
        pooling: "last": an embedding is the last hidden state of a text's last token; "first": of its first; "mean":
            the mean over its tokens.
        scale: factor of cosine similarities.
        columns: of the texts, where they are called otherwise: anchor, positive, negatives.

    Raises:
        UnsupportedModel: a model with a head, or what cannot be shared out.
        ConfigError: a pooling that there is not, or a setting that would tear texts apart.
    """

    labelled = (NOTHING,)

    @made_together
    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        pooling: str = "last",
        scale: float = 20.0,
        columns: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}.")
        super().__init__(model, args, *others, hetero=hetero, **kwargs)
        if self.hetero.longer_samples == "split":
            raise ConfigError("HeteroConfig.longer_samples='split' would make several texts of one; use 'truncate'.")
        if self.hetero.weight_column is not None:
            raise ConfigError(f"HeteroConfig.weight_column={self.hetero.weight_column!r} is of tokens; leave it out.")
        self.pooling, self.scale = pooling, scale
        self.label_names = ["labels"]  # by which an evaluation has a loss
        words: Any = self.processing_class
        self._rows = TextRows(tuple(columns), None if words is None else lambda text: words(text)["input_ids"])
        self._views: dict[int, tuple[Any, Any]] = {}
        self._all_of_step: AllOfStep | None = None
        if self.train_dataset is not None:
            self.train_dataset = self._view(self.train_dataset)

    def _view(self, dataset: Any) -> Any:
        """Return a dataset's texts as packed rows; the same view each time, so that its tokens are counted once."""
        if id(dataset) not in self._views:
            self._views[id(dataset)] = dataset, self._rows.of(dataset)  # the dataset, too, so that its id stays its own
        return self._views[id(dataset)][1]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), "input_ids", "labels"]))

    def _make_packer(self) -> PackedCollator:
        pad = getattr(self.processing_class, "pad_token_id", None)
        return TextsCollator(pad_token_id=pad if pad is not None else 0)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's own loader, whose batches are not read: `evaluation_loop` plans its texts."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = cast("Any", self.eval_dataset)[dataset]
        return super().get_eval_dataloader(self._view(dataset))

    def evaluation_loop(self, dataloader: DataLoader[Any], description: str, *others: Any, **kwargs: Any) -> Any:
        """Evaluate by planned steps: the loss of each is among its own texts, and the mean over all anchors is told.

        Raises:
            UnsupportedModel: predictions are asked for, or an evaluation without plans.
        """
        if description == "Prediction" or not self.hetero.plan_evaluation:
            raise UnsupportedModel(
                "HeteroEmbeddingTrainer evaluates the loss, by planned steps only (HeteroConfig.plan_evaluation). For "
                "embeddings, call the model."
            )
        kwargs["prediction_loss_only"] = True
        return super().evaluation_loop(dataloader, description, **kwargs)

    def begin_step(self, model: torch.nn.Module, batch: StepBatch, note: Callable[[int], None]) -> None:
        """Have all embeddings of a step on all ranks, and what the loss asks of each. A collective of all ranks.

        Args:
            model: that is trained, in its wrapper.
            batch: of this rank.
            note: is told which micro-batch is being computed.

        Raises:
            BadSample: rows of unlike numbers of texts.
        """
        is_learning, num_micro_batches = torch.is_grad_enabled(), len(batch.micro_batches)
        if is_learning and num_micro_batches == 1:
            self._all_of_step = AllOfStep(batch)
            return
        total: torch.Tensor | None = None
        before: list[RandomNumbers] = []
        run, number = self._run, self.state.global_step + 1
        with torch.no_grad():
            for index, micro_batch in enumerate(batch.micro_batches):
                note(index)
                before.append(RandomNumbers.now(self.args.device))
                context = run.context(micro_batch, index, number)
                inputs: Any = self._prepare_inputs({**micro_batch.inputs, "hetero": context})
                with self.compute_loss_context_manager(), run.fitted.state_layers.planned(context):
                    part = self._embeddings(model, inputs, batch)
                total = part if total is None else total + part
            assert total is not None
            embeddings = self._gathered(total, number)
        with torch.enable_grad():
            loss = self._loss(embeddings.requires_grad_(), batch)
            factors = torch.autograd.grad(loss, embeddings)[0] if is_learning else None
        self._all_of_step = AllOfStep(batch, loss.detach(), factors, before)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute this rank's part of a step's loss, times the number of ranks.

        Args:
            model: that is trained, in its wrapper.
            inputs: of a planned micro-batch.
            return_outputs: give outputs, too, of which there are none.
            num_items_in_batch: texts of the step; the loss is a mean over anchors already.
        """
        step, context = self._all_of_step, inputs.get("hetero")
        if step is None or context is None:
            raise UnsupportedModel("The loss of embeddings is of a planned step; a batch alone has none.")
        share = 1 / len(step.batch.micro_batches)
        if step.loss is not None and step.factors is None:
            loss = share * step.loss
            return (loss, {}) if return_outputs else loss
        if step.random_numbers:
            step.random_numbers[context.micro_batch].bring_again()
        embeddings = self._embeddings(model, inputs, step.batch)
        if step.factors is None:
            total = value = self._loss(self._gathered(embeddings, context.step), step.batch)
        else:
            assert step.loss is not None
            total, value = (embeddings * step.factors).sum(), share * step.loss
        # the wrapper averages gradients over ranks, each of which has the whole value
        loss = self.accelerator.num_processes * (total - total.detach()) + value.detach()
        return (loss, {}) if return_outputs else loss

    def _embeddings(self, model: torch.nn.Module, inputs: dict[str, Any], batch: StepBatch) -> torch.Tensor:
        """Return what a micro-batch of this rank contributes to the embeddings of a step. Shape (num_texts, width)."""
        context: AttentionContext = inputs["hetero"]
        hidden = model(**{name: values for name, values in inputs.items() if name not in NOT_INPUTS}).last_hidden_state
        micro_batch = batch.micro_batches[context.micro_batch]
        return pooled(hidden, micro_batch.spans, micro_batch.group.samples, batch.share.step.lengths, self.pooling)

    def _gathered(self, parts: torch.Tensor, number: int) -> torch.Tensor:
        """Return all embeddings, of this rank's parts. A collective of all ranks."""
        # the group of a wrapper's exchanges can be broken off, should memory run out on another rank
        group = self._run.groups.carried.get(tuple(range(self.args.world_size)))
        return over_ranks(parts, group, f"step {number}")

    def _loss(self, embeddings: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        rows = batch.share.step.rows
        num_rows = len(set(rows))
        num_columns = len(rows) // num_rows
        counts = {row: rows.count(row) for row in set(rows)}
        if unlike := [row for row in rows if counts[row] != counts[rows[0]]]:
            raise BadSample(
                f"Row {unlike[0]} has {counts[unlike[0]]} texts, and row {rows[0]} has {counts[rows[0]]}. Give each "
                "row as many."
            )
        return ranking_loss(embeddings.view(num_rows, num_columns, -1), self.scale)
