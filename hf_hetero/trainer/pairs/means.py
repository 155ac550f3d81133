"""What is logged of preferences are means over pairs, sequences or tokens of all steps since the last log.

TRL logs means of the means of its batches; here each pair counts alike, and each token, whatever the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.nn import functional as F

from hf_hetero.trainer.pairs.losses import log_odds

LOG_PROB, REFERENCE, ENTROPY, MEAN_LOGIT, IS_RIGHT, NUM_TARGETS = range(6)
"""Rows of what is known of completions: sums over the targets of each."""


class Means:
    """`Means` are sums of what is logged, and the counts by which they are divided, for training and evaluation.

    A row of numbers is what a group says of its micro-batch: a sum for each name of `counted_by`, the counts, the
    tokens, then the smallest and the largest values (`num_summed`).

    Attributes:
        counted_by: the count that divides each sum, by the name of the mean.
        empty: what is logged for a mean of nothing; None: it is left out.
        least, most: names of the smallest and of the largest values.
    """

    counted_by: ClassVar[Mapping[str, str]]
    empty: ClassVar[float | None] = 0.0
    least: ClassVar[tuple[str, ...]] = ()
    most: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: dict[str, torch.Tensor] = {}

    @classmethod
    def num_summed(cls) -> int:
        """Count the sums of a row; extremes come after them."""
        return len(cls.counted_by) + len(dict.fromkeys(cls.counted_by.values())) + 1

    @classmethod
    def once(cls, row: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Return what a rank of a group adds of a row that all of the group have: sums are the first rank's."""
        cut = cls.num_summed()
        return torch.cat([row[:cut] * is_first, row[cut:]])

    @classmethod
    def joined(cls, rows: torch.Tensor) -> torch.Tensor:
        """Join rows, shape (num_rows, n), into one."""
        summed, low = cls.num_summed(), cls.num_summed() + len(cls.least)
        return torch.cat([rows[:, :summed].sum(0), rows[:, summed:low].amin(0), rows[:, low:].amax(0)])

    def add(self, mode: str, rows: torch.Tensor) -> int:
        """Add what all ranks say of a micro-batch, shape (num_ranks, n); return its tokens."""
        more = self.joined(rows.detach().cpu())
        known = self._rows.get(mode)
        self._rows[mode] = more if known is None else self.joined(torch.stack([known, more]))
        return round(more[self.num_summed() - 1].item())

    def take(self, mode: str) -> dict[str, float]:
        """Return what is logged, by name, and begin anew; nothing if nothing was added."""
        if (row := self._rows.pop(mode, None)) is None:
            return {}
        counts = dict.fromkeys(self.counted_by.values())
        known = dict(zip((*self.counted_by, *counts, "", *self.least, *self.most), row.tolist(), strict=True))
        logged: dict[str, float] = {}
        for name, count in self.counted_by.items():
            mean = known[name] / known[count] if known[count] else self.empty
            if mean is not None:
                logged[name] = mean
        return {**logged, **{name: known[name] for name in (*self.least, *self.most)}}


def _row(sums: Sequence[torch.Tensor], counts: Sequence[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """Make a row of values to be summed, of counts, and of tokens."""
    summed = torch.stack([values.sum() for values in (*sums, *counts)])
    return torch.cat([summed, summed.new_tensor([num_tokens])])


class PairMeans(Means):
    """`PairMeans` are those of `HeteroDPOTrainer`."""

    counted_by: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"), "pairs"),
        **dict.fromkeys(("logps/chosen", "logps/rejected"), "pairs"),
        "entropy": "targets",
        "mean_token_accuracy": "chosen",
        "logits/chosen": "chosen",
        "logits/rejected": "rejected",
    }

    @staticmethod
    def of(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, num_tokens: int) -> torch.Tensor:
        """Return the row of a group's pairs.

        Args:
            chosen, rejected: shape (6 or more, num_pairs): log-probability, that of the reference, and sums over
                targets of entropy, mean logit and whether the most probable token is right; targets.
            beta: what log ratios are multiplied by to be rewards.
            num_tokens: of the pairs, prompts included.
        """
        of_chosen, of_rejected = (beta * (one[LOG_PROB] - one[REFERENCE]) for one in (chosen, rejected))
        is_right = (of_chosen > of_rejected).to(chosen.dtype)
        by_pair = [of_chosen, of_rejected, is_right, of_chosen - of_rejected, chosen[LOG_PROB], rejected[LOG_PROB]]
        both = torch.cat([chosen, rejected], dim=1)
        by_token = [both[ENTROPY], chosen[IS_RIGHT], chosen[MEAN_LOGIT], rejected[MEAN_LOGIT]]
        counts = [torch.ones_like(of_chosen), both[NUM_TARGETS], chosen[NUM_TARGETS], rejected[NUM_TARGETS]]
        return _row([*by_pair, *by_token], counts, num_tokens)


class RewardMeans(Means):
    """`RewardMeans` are those of `HeteroRewardTrainer`."""

    counted_by: ClassVar[Mapping[str, str]] = {"mean_reward": "sequences", "accuracy": "pairs", "margin": "pairs"}
    least: ClassVar[tuple[str, ...]] = ("min_reward",)
    most: ClassVar[tuple[str, ...]] = ("max_reward",)

    @staticmethod
    def of(chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Return the row of a group's pairs, of whose sequences the rewards are given, shape (num_pairs,) each."""
        rewards, infinity = torch.cat([chosen, rejected]), chosen.new_tensor([float("inf")])
        is_right = (chosen > rejected).to(rewards.dtype)
        counts = [torch.ones_like(rewards), torch.ones_like(chosen)]
        extremes = torch.cat([rewards, infinity]).amin(), torch.cat([rewards, -infinity]).amax()
        return torch.cat([_row([rewards, is_right, chosen - rejected], counts, num_tokens), torch.stack(extremes)])


class UnpairedMeans(Means):
    """`UnpairedMeans` are those of `HeteroKTOTrainer`."""

    counted_by: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("rewards/chosen", "logps/chosen"), "wanted"),
        **dict.fromkeys(("rewards/rejected", "logps/rejected"), "unwanted"),
        "logits/chosen": "wanted targets",
        "logits/rejected": "unwanted targets",
        "entropy": "targets",
        "kl": "steps",
    }
    empty: ClassVar[float | None] = None

    @staticmethod
    def of(
        sums: torch.Tensor, signs: torch.Tensor, beta: float, distance: torch.Tensor | None, num_tokens: int
    ) -> torch.Tensor:
        """Return the row of a group's completions.

        Args:
            sums: shape (6 or more, num_samples), as those of `PairMeans.of`.
            signs: above 0 where a completion is wanted.
            beta: what log ratios are multiplied by to be rewards.
            distance: of the step, for one group in its first micro-batch with completions; else None.
            num_tokens: of the completions, prompts included.
        """
        wanted, unwanted, rewards = (
            (signs > 0).to(sums),
            (signs < 0).to(sums),
            beta * (sums[LOG_PROB] - sums[REFERENCE]),
        )
        values = [one * kind for kind in (wanted, unwanted) for one in (rewards, sums[LOG_PROB])]
        values += [sums[MEAN_LOGIT] * wanted, sums[MEAN_LOGIT] * unwanted, sums[ENTROPY]]
        targets = sums[NUM_TARGETS]
        counts = [wanted, unwanted, targets * wanted, targets * unwanted, targets]
        nothing = sums.new_zeros(1)
        step = (nothing, nothing) if distance is None else (distance.reshape(1).to(sums), nothing + 1)
        return _row([*values, step[0]], [*counts, step[1]], num_tokens)

    def take(self, mode: str) -> dict[str, float]:
        """Return what is logged, as `Means` do, and the margin where there are both kinds."""
        logged = super().take(mode)
        if {"rewards/chosen", "rewards/rejected"} <= set(logged):
            logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
        return logged


class ContrastMeans(Means):
    """`ContrastMeans` are those of `HeteroCPOTrainer` and `HeteroORPOTrainer`."""

    counted_by: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"), "pairs"),
        **dict.fromkeys(("logps/chosen", "logps/rejected", "log_odds_ratio", "log_odds_chosen"), "pairs"),
        "nll_loss": "chosen",
        "logits/chosen": "chosen",
        "logits/rejected": "rejected",
    }

    @staticmethod
    def of(
        log_probs: torch.Tensor, rewards: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """Return the row of a group's pairs.

        Args:
            log_probs, rewards: of both completions, shape (2, num_pairs).
            chosen, rejected: shape (5, num_pairs): sums of the log-probabilities that are compared, and of all that are
                learned, how many these are, and the sum of mean logits over the latter.
            num_tokens: of the pairs, prompts included.
        """
        is_right, odds = (rewards[0] > rewards[1]).to(rewards), log_odds(log_probs[0], log_probs[1])
        by_pair = [rewards[0], rewards[1], is_right, rewards[0] - rewards[1], log_probs[0], log_probs[1]]
        by_token = [-chosen[1], chosen[4], rejected[4]]
        counts = [torch.ones_like(is_right), chosen[3], rejected[3]]
        return _row([*by_pair, F.logsigmoid(odds), odds, *by_token], counts, num_tokens)
