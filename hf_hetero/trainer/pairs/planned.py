"""What all trainers of preferences have: their rows are packed, planned and counted as pairs, their loss divided once.

A subclass has the loss of a group, `group_loss`; what is around it is the same for all, and stands here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader

from hf_hetero.attention.context import AttentionContext
from hf_hetero.checks import overrides
from hf_hetero.collators import PackedCollator, PairCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.data.planning import Planners
from hf_hetero.errors import UnsupportedModel
from hf_hetero.model.classes.labelled import NEXT
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.samples.pairs import PairRows
from hf_hetero.trainer.pairs.means import Means
from hf_hetero.trainer.pairs.plans import PlannersOfPairs
from hf_hetero.trainer.pairs.sums import EXACT, counted_once
from hf_hetero.trainer.trainer import HeteroTrainerMixin


class PlannedPairs(HeteroTrainerMixin):
    """`PlannedPairs` goes before a trainer of TRL whose rows are pairs.

    Attributes:
        _pairs: makes packed rows of its dataset's.
        _views: datasets as packed rows.
        learns_pairs: says so to what does not go with it.
        _means: what is logged, until it is.
        _packs, _plans: what packs such rows, and plans them.
        counts_chosen: whether a loss is a mean over the tokens of chosen samples.
        _per_chosen_token: pairs of the step for each such token, if that is counted.
    """

    labelled = (NEXT,)
    learns_pairs = True
    loss_is_scaled_for_ga = True  # by the pairs of the whole step
    counts_chosen: bool = False
    _per_chosen_token: torch.Tensor | float = 0.0
    _pairs: PairRows
    _views: WeakKeyDictionary[Any, Any]
    _means: Means
    _packs: type[PackedCollator]
    _plans: type[Planners]

    def _begin_with(
        self,
        pairs: PairRows,
        means: Means,
        packs: type[PackedCollator] = PairCollator,
        plans: type[Planners] = PlannersOfPairs,
    ) -> None:
        """Read pairs as packed rows from now on, and count for the logs."""
        self._pairs, self._means, self._views = pairs, means, WeakKeyDictionary()
        self._packs, self._plans = packs, plans
        self.train_dataset = self._view(self.train_dataset)

    def _view(self, dataset: Any) -> Any:
        """Return a dataset's pairs as packed rows; the same view each time, so that its tokens are counted once."""
        if dataset not in self._views:
            self._views[dataset] = self._pairs.of(dataset, self.hetero.length_column)
        return self._views[dataset]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        added = ["input_ids", "labels", *self._pairs.columns] if hasattr(self, "_pairs") else []
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *added]))

    def _make_packer(self) -> PackedCollator:
        collator: Any = self.data_collator
        return self._packs(pad_token_id=collator.pad_token_id, makes_labels=False)

    def _planners(self) -> Planners:
        planners = super()._planners()
        return self._plans(planners.hetero, planners.num_ranks, planners.cost_model, planners.methods)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's own loader, whose batches can be read; `evaluation_loop` plans its pairs if it can."""
        loader = super().get_eval_dataloader(eval_dataset)
        dataset = self._between_runs.evaluated[loader]
        if dataset is not None and self._plans_evaluation():
            self._between_runs.evaluated[loader] = self._view(dataset)
        return loader

    def _plans_evaluation(self) -> bool:
        """Return whether an evaluation needs nothing that TRL computes of its own batches."""
        return self.compute_metrics is None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the next planned step as so many batches, and its pairs over all ranks."""
        batches, num_pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.counts_chosen:
            own = sum(_num_chosen_targets(m) for part in batches for m in part.micro_batches)
            total: Any = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
            self._per_chosen_token = num_pairs / total.clamp(min=1).to(EXACT)
        return batches, num_pairs

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute this rank's part of the loss of a step, times the number of ranks.

        Args:
            model: that is trained, in its wrapper.
            inputs: of a planned micro-batch; a batch of TRL's has TRL's loss.
            return_outputs: give outputs, too: TRL's batches only.
            num_items_in_batch: pairs of the step.
        """
        context: AttentionContext | None = inputs.get("hetero")
        if context is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        columns = {name: inputs.pop(name)[0] for name in self._pairs.columns if name in inputs}
        loss = self.group_loss(model, inputs, context, columns)
        return counted_once(context, loss) * self.accelerator.num_processes / num_items_in_batch

    def group_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the sum of the losses of this rank's group, which all its ranks have alike.

        Args:
            model: that is trained, in its wrapper.
            inputs: of the model.
            context: of the micro-batch.
            columns: of `_pairs`, one number for each of this rank's tokens; none on a rank without tokens.
        """
        raise NotImplementedError

    def _watch(self, context: AttentionContext, row: torch.Tensor) -> None:
        """Add to what is logged the row of a group, which all its ranks have alike. A collective of all ranks."""
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        rows: Any = self.accelerator.gather(self._means.once(row, context.group_rank == 0)[None])
        num_tokens = self._means.add(mode, rows)
        counted: Any = self
        if hasattr(self, "_total_train_tokens"):
            counted._total_train_tokens += num_tokens if mode == "train" else 0
            self._kept(mode)["num_tokens"] = [counted._total_train_tokens]

    def _kept(self, mode: str) -> dict[str, list[float]]:
        """Return where TRL keeps what it will log."""
        kept: Any = self
        return kept._metrics[mode]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does: means over the pairs, or the tokens, since the last log."""
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        for name, value in self._means.take(mode).items():
            self._kept(mode)[name] = [value]
        super().log(logs, start_time)


def _num_chosen_targets(micro_batch: Any) -> int:
    """Count this rank's targets in chosen samples."""
    targets, place, count = micro_batch.inputs["shift_labels"][0], 0, 0
    for span in micro_batch.spans:
        if span.sample % 2 == 0:
            count += int((targets[place : place + span.num_tokens] != IGNORE_INDEX).sum())
        place += span.num_tokens
    return count


def setting_problems(hetero: HeteroConfig) -> list[str]:
    """Return, in words, which settings of planning no trainer of pairs can follow."""
    reasons: list[str] = []
    if hetero.weight_column is not None:
        reasons.append(f"HeteroConfig.weight_column={hetero.weight_column!r} is of tokens, and the loss is of pairs.")
    if hetero.source_column is not None:
        reasons.append(f"HeteroConfig.source_column={hetero.source_column!r} is of tokens, and the loss is of pairs.")
    if hetero.max_sample_tokens is not None and hetero.longer_samples == "split":
        reasons.append("HeteroConfig.longer_samples='split' would make more than two sequences of a pair; use 'error'.")
    return reasons


def trainer_problems(trainer: Any, collator: type) -> list[str]:
    """Return, in words, why the pairs of a trainer cannot be planned.

    Args:
        trainer: once it is made.
        collator: the one of TRL whose batches are understood.
    """
    reasons: list[str] = []
    if type(trainer.data_collator) is not collator:
        name = type(trainer.data_collator).__name__
        reasons.append(f"Pairs are packed, which the data_collator {name} does not do; leave it out.")
    for name, owner in overrides.own(trainer, overrides.LOSS).items():
        reasons.append(f"{owner}.{name} is its own, and planned pairs have this trainer's; remove it.")
    if getattr(trainer, "aux_loss_enabled", False):
        has_factor = hasattr(trainer.args, "router_aux_loss_coef")
        remedy = (
            f"{type(trainer.args).__name__}(router_aux_loss_coef=0.0)" if has_factor else "output_router_logits=False"
        )
        reasons.append(f"The auxiliary loss of routers is of a batch; set {remedy}.")
    return reasons


def refuse(name: str, reasons: list[str]) -> None:
    """Refuse what a plan could change, if there is a reason to.

    Raises:
        UnsupportedModel: with every reason.
    """
    if reasons:
        raise UnsupportedModel(f"{name} cannot train exactly under changing plans: {' '.join(reasons)}")
