"""This module has the losses of preferences, from the log-probabilities of completions.

Notation: p and q are log-probabilities of the chosen and the rejected completion by the model that is trained, p0 and
q0 by the reference; r = p - p0 and s = q - q0 are their log ratios, and b is beta. For f-divergences other than the
reverse KL the papers' losses take f'(exp(r)) in the place of r (arXiv:2309.16240).

Each loss is a sum over pairs, so no plan can change it: which pairs are computed together does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

MOST_EXPONENT = 80.0
"""Of an alpha divergence, as in TRL: its exponential stays a number in fp32."""


class Completion(NamedTuple):
    """A `Completion` is one of both of each pair; shapes (num_pairs,).

    Args:
        log_probs: by the model that is trained.
        reference: by the reference.
        num_tokens: of the completion.
    """

    log_probs: torch.Tensor
    reference: torch.Tensor
    num_tokens: torch.Tensor

    @property
    def log_ratios(self) -> torch.Tensor:
        """Return how much more probable it is than by the reference."""
        return self.log_probs - self.reference


@dataclass(frozen=True, slots=True)
class Preference:
    """A `Preference` says which loss pairs have; its fields are those of TRL's `DPOConfig`.

    Args:
        loss_type: names of `LOSSES`, or "sft"; their sum is the loss.
        loss_weights: factor of each.
        beta: how far the model may go from the reference: the smaller, the farther.
        label_smoothing: share of pairs whose completions are the wrong way round.
        f_divergence_type: by which the distance to the reference is measured.
        f_alpha_divergence_coef: of an alpha divergence.
        discopop_tau: temperature of "discopop".
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def losses(self, chosen: Completion, rejected: Completion, per_chosen_token: torch.Tensor | float) -> torch.Tensor:
        """Return the loss of each pair. Shape (num_pairs,).

        Args:
            chosen, rejected: the completions.
            per_chosen_token: pairs of the step for each target token of its chosen completions: "sft" is a mean over
                these tokens, where all others are means over pairs.
        """
        total = torch.zeros_like(chosen.log_probs)
        for name, weight in zip(self.loss_type, self.loss_weights, strict=True):
            if name == "sft":
                total = total - weight * chosen.log_probs * per_chosen_token
            else:
                total = total + weight * LOSSES[name](self, chosen, rejected)
        return total

    def score(self, completion: Completion) -> torch.Tensor:
        """Return f'(t) of t = exp(log ratio), up to a constant that the difference of two scores does not have."""
        ratios, alpha = completion.log_ratios, self.f_alpha_divergence_coef
        if self.f_divergence_type == "forward_kl":
            return 1 - torch.exp(-ratios)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + F.logsigmoid(ratios)
        # at alpha = 1 it is the reverse KL, as a limit
        if self.f_divergence_type == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
            return torch.expm1(((alpha - 1) * ratios).clamp(max=MOST_EXPONENT)) / (alpha - 1)
        return ratios

    def margin(self, chosen: Completion, rejected: Completion) -> torch.Tensor:
        """Return beta times the difference of scores."""
        return self.beta * (self.score(chosen) - self.score(rejected))

    def margin_per_token(self, chosen: Completion, rejected: Completion) -> torch.Tensor:
        """Return the difference of scores, each divided by its completion's tokens."""
        of_chosen, of_rejected = (self.score(one) / one.num_tokens.clamp(min=1) for one in (chosen, rejected))
        return of_chosen - of_rejected


@dataclass(frozen=True, slots=True)
class Desirability:
    """A `Desirability` says which loss unpaired completions have; its fields are those of TRL's `KTOConfig`.

    Args:
        beta: how far the model may go from the reference: the smaller, the farther.
        desirable_weight, undesirable_weight: factors of the losses of completions that are wanted, and of others.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def losses(
        self, log_ratios: torch.Tensor, signs: torch.Tensor, distance: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Return the loss of each completion, shape (num_samples,): weight * (1 - sigmoid(b sign (r - z))).

        That is KTO (arXiv:2402.01306, eq. 7), and with a distance of 0 the unpaired APO-zero (arXiv:2408.06266).

        Args:
            log_ratios: r, of each completion.
            signs: 1 where it is wanted, -1 where it is not, and 0 where nothing is learned.
            distance: z, of the model from its reference.
        """
        wanted, unwanted = (signs > 0).to(log_ratios), (signs < 0).to(log_ratios)
        weights = self.desirable_weight * wanted + self.undesirable_weight * unwanted
        return weights * torch.sigmoid(-self.beta * signs * (log_ratios - distance))


Loss = Callable[[Preference, Completion, Completion], torch.Tensor]


def _sigmoid(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -log sigmoid(b (r - s))."""
    return -F.logsigmoid(by.margin(chosen, rejected))


def _hinge(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """SLiC (arXiv:2305.10425), on log ratios: max(0, 1 - b (r - s))."""
    return torch.relu(1 - by.margin(chosen, rejected))


def _ipo(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """IPO (arXiv:2310.12036, eq. 17): (r - s - 1 / (2 b))^2, with scores per token, as its authors told TRL."""
    return (by.margin_per_token(chosen, rejected) - 1 / (2 * by.beta)) ** 2


def _exo_pair(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """EXO (arXiv:2402.00856, eq. 16): the KL of softmax(b r, b s) from (1 - e, e), with e of label smoothing."""
    margin, e = by.margin(chosen, rejected), by.label_smoothing
    of_chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-e))
    return of_chosen + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(e))


def _nca_pair(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """NCA (arXiv:2402.05369): -log sigmoid(b r) - (log sigmoid(-b r) + log sigmoid(-b s)) / 2."""
    r, s = by.beta * chosen.log_ratios, by.beta * rejected.log_ratios
    return -F.logsigmoid(r) - (F.logsigmoid(-r) + F.logsigmoid(-s)) / 2


def _robust(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """Robust DPO (arXiv:2403.00409): unbiased where a share e of pairs is the wrong way round."""
    margin, e = by.margin(chosen, rejected), by.label_smoothing
    return (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)


def _bco_pair(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """BCO (arXiv:2404.04656) on pairs, without its shift: -log sigmoid(b r) - log sigmoid(-b s)."""
    return -F.logsigmoid(by.beta * chosen.log_ratios) - F.logsigmoid(-by.beta * rejected.log_ratios)


def _sppo_hard(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """SPPO (arXiv:2405.00675, eq. 4.7), where the chosen one always wins: (r - 1 / (2 b))^2 + (s + 1 / (2 b))^2."""
    return (chosen.log_ratios - 0.5 / by.beta) ** 2 + (rejected.log_ratios + 0.5 / by.beta) ** 2


def _apo_zero(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """APO-zero (arXiv:2408.06266, eq. 7): sigmoid(-b r) + sigmoid(b s)."""
    return torch.sigmoid(-by.beta * chosen.log_ratios) + torch.sigmoid(by.beta * rejected.log_ratios)


def _apo_down(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """APO-down (arXiv:2408.06266, eq. 8): sigmoid(b r) + sigmoid(-b (r - s))."""
    r, s = by.beta * chosen.log_ratios, by.beta * rejected.log_ratios
    return torch.sigmoid(r) + torch.sigmoid(s - r)


def _discopop(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """DiscoPOP (arXiv:2406.08414, eq. 5): a logistic and an exponential loss, mixed by sigmoid(margin / tau)."""
    margin = by.margin(chosen, rejected)
    share = torch.sigmoid(margin / by.discopop_tau)
    return (1 - share) * -F.logsigmoid(margin) + share * torch.exp(-margin)


def _sigmoid_norm(by: Preference, chosen: Completion, rejected: Completion) -> torch.Tensor:
    """DPO with scores per token (arXiv:2411.15124): -log sigmoid(b (r / |chosen| - s / |rejected|))."""
    return -F.logsigmoid(by.beta * by.margin_per_token(chosen, rejected))


LOSSES: Mapping[str, Loss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}


# ------------------------------------------------------------------------------------------------- without a reference


def contrast(
    kind: str,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    alpha: float = 0.0,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return the loss of each pair without a reference, and the rewards of both completions; shapes (num_pairs,).

    CPO (arXiv:2401.08417, eq. 3); with a margin, of means over tokens, SimPO (arXiv:2405.14734, eq. 6).

    Args:
        kind: "sigmoid", "hinge" or "ipo".
        chosen, rejected: log-probabilities p and q, sums or means over tokens.
        beta: factor of rewards.
        alpha: of AlphaPO (arXiv:2501.03884): rewards are (1 - exp(-alpha p)) / alpha; 0: they are p.
        gamma: by how much the chosen one's reward is to be larger.
        label_smoothing: share of pairs whose completions are the wrong way round.
    """
    scores = (
        (chosen, rejected) if alpha == 0 else tuple(-torch.expm1(-alpha * one) / alpha for one in (chosen, rejected))
    )
    margin = scores[0] - scores[1] - gamma / beta
    rewards = (beta * scores[0], beta * scores[1])
    if kind == "hinge":
        return torch.relu(1 - beta * margin), rewards
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2, rewards
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(beta * margin) - e * F.logsigmoid(-beta * margin), rewards


def log_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the log of the ratio of both odds, exp(p) / (1 - exp(p)), as ORPO has it (arXiv:2403.07691, eq. 4)."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x below 0, without cancellation."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
