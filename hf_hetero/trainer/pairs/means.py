"""What is logged of preference pairs are means over pairs, or over tokens, of all steps since the last log.

TRL logs means of the means of its batches; here each pair counts alike, and each token, whatever the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

BY_PAIR = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
BY_TOKEN = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""Over all targets, those of chosen completions, and those of either."""
NUM_PAIRS, NUM_CHOSEN, NUM_REJECTED, NUM_TOKENS = -4, -3, -2, -1
"""Places of the counts, after all sums."""


class PairMeans:
    """`PairMeans` are sums of what is logged, and the counts by which they are divided, for training and evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    @staticmethod
    def of(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, num_tokens: int) -> torch.Tensor:
        """Return the sums and counts of a group's pairs. Shape (14,).

        Args:
            chosen, rejected: shape (7, num_pairs): log-probability, that of the reference, and sums over targets of
                entropy, mean logit and whether the most probable token is right; targets; tokens.
            beta: what log ratios are multiplied by to be rewards.
            num_tokens: of the pairs, prompts included.
        """
        of_chosen, of_rejected = beta * (chosen[0] - chosen[1]), beta * (rejected[0] - rejected[1])
        is_right = (of_chosen > of_rejected).to(chosen.dtype)
        by_pair = [of_chosen, of_rejected, is_right, of_chosen - of_rejected, chosen[0], rejected[0]]
        by_token = [torch.cat([chosen[2], rejected[2]]), chosen[4], chosen[3], rejected[3]]
        counts = [torch.ones_like(of_chosen), chosen[5], rejected[5]]
        sums = torch.stack([values.sum() for values in (*by_pair, *by_token, *counts)])
        return torch.cat([sums, sums.new_tensor([num_tokens])])

    def add(self, mode: str, sums: Sequence[float]) -> int:
        """Add the sums of a micro-batch, over all ranks; return its tokens."""
        before = self._sums.get(mode, [0.0] * len(sums))
        self._sums[mode] = [old + new for old, new in zip(before, sums, strict=True)]
        return round(sums[NUM_TOKENS])

    def take(self, mode: str) -> Mapping[str, float]:
        """Return the means, by name, and begin anew; none if nothing was added."""
        if (sums := self._sums.pop(mode, None)) is None:
            return {}
        num_pairs, num_chosen, num_rejected = sums[NUM_PAIRS], sums[NUM_CHOSEN], sums[NUM_REJECTED]
        counts = [num_pairs] * len(BY_PAIR) + [num_chosen + num_rejected, num_chosen, num_chosen, num_rejected]
        names = (*BY_PAIR, *BY_TOKEN)
        found = zip(names, sums, counts, strict=False)
        return {name: value / count if count else 0.0 for name, value, count in found}
