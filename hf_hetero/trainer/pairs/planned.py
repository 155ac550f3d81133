"""What all trainers of preference pairs have: pairs are packed, planned and counted as such."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from hf_hetero.checks import overrides
from hf_hetero.collators import PackedCollator, PairCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import UnsupportedModel
from hf_hetero.samples.pairs import PairRows
from hf_hetero.trainer.pairs.plans import PlannersOfPairs
from hf_hetero.trainer.trainer import HeteroTrainerMixin


class PlannedPairs(HeteroTrainerMixin):
    """`PlannedPairs` goes before a trainer of TRL whose rows are pairs.

    Attributes:
        _pairs: makes packed rows of its dataset's.
        _views: datasets as packed rows.
    """

    _pairs: PairRows
    _views: WeakKeyDictionary[Any, Any]

    def _begin_with(self, pairs: PairRows) -> None:
        """Read pairs as packed rows from now on."""
        self._pairs, self._views = pairs, WeakKeyDictionary()
        self.train_dataset = self._view(self.train_dataset)

    def _view(self, dataset: Any) -> Any:
        """Return a dataset's pairs as packed rows; the same view each time, so that its tokens are counted once."""
        if dataset not in self._views:
            self._views[dataset] = self._pairs.of(dataset, self.hetero.length_column)
        return self._views[dataset]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        added = ["input_ids", "labels", PairRows.column]
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *added]))

    def _make_packer(self) -> PackedCollator:
        collator: Any = self.data_collator
        return PairCollator(pad_token_id=collator.pad_token_id, makes_labels=False)

    def _planners(self) -> PlannersOfPairs:
        planners = super()._planners()
        return PlannersOfPairs(planners.hetero, planners.num_ranks, planners.cost_model, planners.methods)


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
    return reasons


def refuse(name: str, reasons: list[str]) -> None:
    """Refuse what a plan could change, if there is a reason to.

    Raises:
        UnsupportedModel: with every reason.
    """
    if reasons:
        raise UnsupportedModel(f"{name} cannot train exactly under changing plans: {' '.join(reasons)}")
