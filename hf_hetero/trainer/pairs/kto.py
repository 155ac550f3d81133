"""HeteroKTOTrainer is TRL's KTOTrainer with planned steps. It needs the extra `trl`.

A completion is learned for itself, as wanted or not; but how much depends on how far the model has moved from its
reference on mismatched completions, on average (KTO, arXiv:2402.01306). That average is over the whole step, on all
ranks, as TRL's is without gradient accumulation: the first micro-batches of a step have its mismatched completions,
forward only, and all others know the average by then. With accumulation TRL has another average in each of its batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from hf_hetero.attention.context import AttentionContext
from hf_hetero.collators.unpaired import COMPARED, UnpairedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.data.planning import Planners
from hf_hetero.ranks.made_together import made_together
from hf_hetero.samples.unpaired import UnpairedRows
from hf_hetero.trainer.pairs.losses import Desirability
from hf_hetero.trainer.pairs.means import UnpairedMeans
from hf_hetero.trainer.pairs.planned import refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.plans import PlannersOfUnpaired
from hf_hetero.trainer.pairs.reference import ASKED, PairsWithReference
from hf_hetero.trainer.pairs.sums import EXACT, at_starts, by_sample, over_group


class Distance(NamedTuple):
    """A `Distance` is how far a model has moved from its reference on the mismatched completions of a step, so far.

    Args:
        sums: of their log ratios, and how many they are; shape (2,), the same on all ranks.
        num_micro_batches: that they came in.
    """

    sums: torch.Tensor
    num_micro_batches: int = 0

    @classmethod
    def unknown(cls, device: torch.device) -> Distance:
        """Return that of a step which begins."""
        return cls(torch.zeros(2, dtype=EXACT, device=device))

    def plus(self, sums: torch.Tensor) -> Distance:
        """Return it with another micro-batch."""
        return Distance(self.sums + sums, self.num_micro_batches + 1)

    def mean(self) -> torch.Tensor:
        """Return the mean, or 0 if it is below, as a distance is not; shape ()."""
        return (self.sums[0] / self.sums[1].clamp(min=1)).clamp(min=0)


class _ModelThenArguments(KTOTrainer):
    """`_ModelThenArguments` takes its arguments in the order of `Trainer`, by which the mixin hands them on."""

    def __init__(self, model: Any, args: Any = None, *others: Any, ref_model: Any = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, *others, **kwargs)


class HeteroKTOTrainer(PairsWithReference, _ModelThenArguments):
    """`HeteroKTOTrainer` is `trl.KTOTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    TRL makes the mismatched completions, by turning those of each `per_device_train_batch_size` rows by one. Evaluation
    is planned, too, unless `compute_metrics` asks for what TRL computes of its own batches.

    Raises:
        UnsupportedModel: what cannot be shared out.
    """

    @made_together
    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        refuse(type(self).__name__, setting_problems(hetero or HeteroConfig()))
        super().__init__(model, args, *others, hetero=hetero, ref_model=ref_model, **kwargs)
        refuse(type(self).__name__, trainer_problems(self, DataCollatorForUnpairedPreference))
        settings: Any = self.args
        self._desirability = Desirability(self.beta, self.desirable_weight, self.undesirable_weight)
        self._distance = Distance.unknown(self.args.device)
        planners = PlannersOfUnpaired if self.calculate_KL else Planners
        self._begin_with(UnpairedRows(settings.max_length), UnpairedMeans(), UnpairedCollator, planners)

    def group_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the sum of the losses of this rank's group: see `PlannedPairs`; 0 of mismatched completions."""
        inputs = {**inputs, **ASKED}
        if context.micro_batch == 0:
            self._distance = Distance.unknown(self.args.device)
        if inputs.pop(COMPARED, None) is not None:
            self._compare(inputs, context, columns)
            # a wrapper waits for no gradient, because no pass through it was noted; Trainer wants one to start from
            return torch.zeros((), dtype=EXACT, device=self.args.device, requires_grad=True)
        signs = torch.zeros(len(context.layout.lengths), dtype=EXACT, device=self.args.device)
        if (known := columns.get(UnpairedRows.sign)) is not None:
            signs = at_starts(context, known)
        sums = self._sums(model, inputs, context, columns, signs)
        distance, signs = self._distance.mean(), sums[-1].detach()
        # a step's distance is logged once, by the first group of its first micro-batch that learns
        is_first = context.micro_batch == self._distance.num_micro_batches and self.args.process_index == 0
        row = UnpairedMeans.of(
            sums.detach(), signs, self.beta, distance if is_first else None, context.layout.num_tokens
        )
        self._watch(context, row)
        return self._desirability.losses(sums[0] - sums[1], signs, distance).sum()

    def _compare(self, inputs: dict[str, Any], context: AttentionContext, columns: dict[str, torch.Tensor]) -> None:
        """Add mismatched completions to the distance of the step. A collective of all ranks."""
        again = context.again()
        own = by_sample(context, self._own_log_probs({**inputs, "hetero": again})[0])
        context.reached |= again.reached
        sums = over_group(context, torch.stack([own, self._reference_sums(inputs, context, columns)]))
        moved = sums[0] - sums[1]
        part = torch.stack([moved.sum(), torch.ones_like(moved).sum()]) * (context.group_rank == 0)
        everywhere: Any = self.accelerator.reduce(part, "sum")
        self._distance = self._distance.plus(everywhere)
