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
from hf_hetero.samples.pairs import PairRows, ScoredRows
from hf_hetero.trainer.pairs.planned import PlannedPairs, refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.sums import at_starts, by_sample, counted_once, over_group


class HeteroRewardTrainer(PlannedPairs, RewardTrainer):
    """`HeteroRewardTrainer` is `trl.RewardTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    Evaluation is TRL's own, without plans.

    Raises:
        UnsupportedModel: what cannot be shared out.
    """

    loss_is_scaled_for_ga = True  # by the pairs of the whole step
    learns_scores = True

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
        self._begin_with(ScoredRows(pad_token_id=collator.pad_token_id))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute this rank's part of the loss of a step's pairs, times the number of ranks.

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
        of_pair = inputs.pop(PairRows.column, None)
        outputs = model(**inputs)
        # the model's own score of the pack joins the graph, because a wrapper looks for its weights there
        tokens = outputs.loss + 0 * outputs.logits.sum()
        counts = (inputs["labels"] != IGNORE_INDEX).to(tokens.dtype)
        rewards = by_sample(context, tokens * counts)
        margin = torch.zeros_like(rewards) if of_pair is None else at_starts(context, of_pair[0])[None]
        sums = over_group(context, torch.cat([rewards, margin]))
        chosen, rejected = sums[0, ::2], sums[0, 1::2]
        losses = -F.logsigmoid(chosen - rejected - sums[1, ::2].detach())
        settings: Any = self.args
        if settings.center_rewards_coefficient is not None:
            losses = losses + settings.center_rewards_coefficient * (chosen + rejected) ** 2
        self._watch(context, chosen.detach(), rejected.detach())
        return counted_once(context, losses.sum()) * self.accelerator.num_processes / num_items_in_batch

    def _watch(self, context: AttentionContext, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Add a micro-batch to what is logged. A collective of all ranks."""
        # all ranks of a group know the same
        share = int(context.group_rank == 0)
        rewards = torch.cat([chosen, rejected])
        parts = [rewards.sum(), (chosen > rejected).sum(), (chosen - rejected).sum(), torch.ones_like(chosen).sum()]
        sums = share * torch.stack([part.to(rewards) for part in parts])
        sums = torch.cat([sums, sums.new_tensor([share * context.layout.num_tokens])])
        infinity = rewards.new_tensor([float("inf")])
        extremes = torch.stack([torch.cat([rewards, infinity]).min(), torch.cat([rewards, -infinity]).max()])
        everywhere: Any = self.accelerator.gather(torch.cat([sums, extremes])[None])
        total, accuracy, margin, num_pairs, num_tokens = everywhere[:, :5].sum(0).tolist()
        self._total_train_tokens += round(num_tokens)
        self._seen = [old + new for old, new in zip(self._seen, (total / 2, accuracy, margin, num_pairs), strict=True)]
        self._least = min(self._least, everywhere[:, 5].min().item())
        self._most = max(self._most, everywhere[:, 6].max().item())

    _seen: list[float] = [0.0, 0.0, 0.0, 0.0]
    _least, _most = float("inf"), float("-inf")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does: means over the pairs, and extremes, since the last log."""
        *sums, num_pairs = self._seen
        if num_pairs and self.model is not None and self.model.training:
            kept = self._metrics["train"]
            for name, value in zip(("mean_reward", "accuracy", "margin"), sums, strict=True):
                kept[name] = [value / num_pairs]
            kept["min_reward"], kept["max_reward"] = [self._least], [self._most]
            kept["num_tokens"] = [self._total_train_tokens]
            self._seen, self._least, self._most = [0.0] * 4, float("inf"), float("-inf")
        super().log(logs, start_time)
