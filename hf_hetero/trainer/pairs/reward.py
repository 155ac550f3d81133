"""HeteroRewardTrainer is TRL's RewardTrainer with planned steps. It needs the extra `trl`.

A model with one score for each sequence learns to give the chosen one of two more than the rejected one
(arXiv:2203.02155, eq. 1). The rank that holds the token whose score counts has it; the others of its group are told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import TrainingArguments
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from hf_hetero.attention.context import AttentionContext
from hf_hetero.config import HeteroConfig
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.ranks.made_together import made_together
from hf_hetero.samples.pairs import ScoredRows
from hf_hetero.trainer.pairs.means import RewardMeans
from hf_hetero.trainer.pairs.planned import PlannedPairs, refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.sums import at_starts, by_sample, over_group


class HeteroRewardTrainer(PlannedPairs, RewardTrainer):
    """`HeteroRewardTrainer` is `trl.RewardTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    Evaluation is planned, too, unless `compute_metrics` asks for what TRL computes of its own batches.

    Raises:
        UnsupportedModel: what cannot be shared out.
    """

    learns_scores = True

    @made_together
    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        refuse(type(self).__name__, setting_problems(hetero or HeteroConfig()))
        super().__init__(model, args, *others, hetero=hetero, **kwargs)
        refuse(type(self).__name__, trainer_problems(self, DataCollatorForPreference))
        collator: Any = self.data_collator
        self._begin_with(ScoredRows(pad_token_id=collator.pad_token_id), RewardMeans())

    def group_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the sum of the losses of this rank's group: see `PlannedPairs`."""
        outputs = model(**inputs)
        # the model's own score of the pack joins the graph, because a wrapper looks for its weights there
        tokens = outputs.loss + 0 * outputs.logits.sum()
        counts = (inputs["labels"] != IGNORE_INDEX).to(tokens.dtype)
        rewards = by_sample(context, tokens * counts)
        known = columns.get(ScoredRows.column)
        margin = torch.zeros_like(rewards) if known is None else at_starts(context, known)[None]
        sums = over_group(context, torch.cat([rewards, margin]))
        chosen, rejected = sums[0, ::2], sums[0, 1::2]
        losses = -F.logsigmoid(chosen - rejected - sums[1, ::2].detach())
        settings: Any = self.args
        if settings.center_rewards_coefficient is not None:
            losses = losses + settings.center_rewards_coefficient * (chosen + rejected) ** 2
        self._watch(context, RewardMeans.of(chosen.detach(), rejected.detach(), context.layout.num_tokens))
        return losses.sum()
