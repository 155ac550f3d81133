"""HeteroDPOTrainer is TRL's DPOTrainer with planned steps. It needs the extra `trl`.

TRL tokenises the dataset, loads the reference model and writes the logs. A pair is planned as one item: its two
sequences are in one group of one micro-batch, packed without padding, and each may be held by many ranks. The loss of a
step is the mean over its pairs, as TRL's of a batch that is the whole step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from hf_hetero.attention.context import AttentionContext
from hf_hetero.config import HeteroConfig
from hf_hetero.ranks.made_together import made_together
from hf_hetero.samples.pairs import PairRows
from hf_hetero.trainer.pairs.losses import LOSSES, Completion, Preference
from hf_hetero.trainer.pairs.means import PairMeans
from hf_hetero.trainer.pairs.planned import refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.reference import ASKED, PairsWithReference

SORTED = ("aot", "aot_unpaired")


class _ModelThenArguments(DPOTrainer):
    """`_ModelThenArguments` takes its arguments in the order of `Trainer`, by which the mixin hands them on."""

    def __init__(self, model: Any, args: Any = None, *others: Any, ref_model: Any = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, *others, **kwargs)


class HeteroDPOTrainer(PairsWithReference, _ModelThenArguments):
    """`HeteroDPOTrainer` is `trl.DPOTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    Evaluation is planned, too, unless `compute_metrics` or the loss "sft" ask for what TRL computes of its own batches.

    Raises:
        UnsupportedModel: a loss that is no sum over pairs, or what cannot be shared out.
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
        refuse(type(self).__name__, [*loss_problems(args), *setting_problems(hetero or HeteroConfig())])
        super().__init__(model, args, *others, hetero=hetero, ref_model=ref_model, **kwargs)
        settings: Any = self.args
        problems = [*loss_problems(settings), *trainer_problems(self, DataCollatorForPreference)]
        refuse(type(self).__name__, problems)
        self._preference = Preference(
            tuple(settings.loss_type),
            tuple(self.loss_weights),
            settings.beta,
            settings.label_smoothing,
            settings.f_divergence_type,
            settings.f_alpha_divergence_coef,
            settings.discopop_tau,
        )
        self.counts_chosen = "sft" in self._preference.loss_type
        self._begin_with(PairRows(settings.max_length, settings.truncation_mode == "keep_end"), PairMeans())

    def _plans_evaluation(self) -> bool:
        # "sft" is a mean over the tokens of a batch, which for an evaluation is TRL's own
        return super()._plans_evaluation() and not self.counts_chosen

    def group_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the sum of the losses of this rank's group: see `PlannedPairs`."""
        sums = self._sums(model, {**inputs, **ASKED}, context, columns)
        # pairs lie side by side, chosen first
        chosen, rejected = sums[:, ::2], sums[:, 1::2]
        of_chosen, of_rejected = (Completion(s[0], s[1], s[6].detach()) for s in (chosen, rejected))
        row = PairMeans.of(chosen.detach(), rejected.detach(), self.beta, context.layout.num_tokens)
        self._watch(context, row)
        return self._preference.losses(of_chosen, of_rejected, self._per_chosen_token).sum()


def loss_problems(args: Any) -> list[str]:
    """Return, in words, why the loss that TRL's `DPOConfig` asks for, or its default, is no sum over pairs."""
    reasons: list[str] = []
    losses = getattr(args, "loss_type", None) or ["sigmoid"]
    losses = [losses] if isinstance(losses, str) else losses
    if found := [name for name in losses if name in SORTED]:
        reasons.append(f"loss_type={found} sorts the pairs of a batch, so it depends on which are computed together.")
    elif unknown := [name for name in losses if name not in LOSSES and name != "sft"]:
        reasons.append(f"loss_type={unknown} is not known; choose from {', '.join([*LOSSES, 'sft'])}.")
    if getattr(args, "use_weighting", False):
        reasons.append("use_weighting=True needs the squares of all probabilities, which are not kept; leave it out.")
    if getattr(args, "ld_alpha", None) is not None:
        reasons.append(f"ld_alpha={args.ld_alpha} weighs tokens by the other completion's length; leave it out.")
    return reasons
