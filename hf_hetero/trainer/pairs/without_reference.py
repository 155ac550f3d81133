"""HeteroCPOTrainer and HeteroORPOTrainer are TRL's CPOTrainer and ORPOTrainer with planned steps. They need `trl`.

Both compare the completions of a pair by the trained model alone, and learn the chosen one's tokens as well: the loss
of a step is a mean over its pairs, and one over its tokens, as TRL's of a batch that is the whole step. TRL has these
trainers in `trl.experimental`: a later version of it may have others, or none.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import TrainingArguments
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from hf_hetero.attention.context import AttentionContext
from hf_hetero.config import HeteroConfig
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.ranks.made_together import made_together
from hf_hetero.samples.pairs import ContrastedRows
from hf_hetero.trainer.pairs.losses import contrast, log_odds
from hf_hetero.trainer.pairs.means import ContrastMeans
from hf_hetero.trainer.pairs.planned import PlannedPairs, refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.sums import by_sample, over_group


class _Contrasting(PlannedPairs):
    """A `_Contrasting` is what both have: sums of the completions of a pair, and a loss of its chosen one's tokens.

    Evaluation is TRL's own, without plans.
    """

    counts_chosen = True
    learns_prompts: ClassVar[bool] = False

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
        refuse(type(self).__name__, trainer_problems(self, DPODataCollatorWithPadding))
        self._begin_with(ContrastedRows(learns_prompts=self.learns_prompts), ContrastMeans())

    def _plans_evaluation(self) -> bool:
        return False

    def _kept(self, mode: str) -> dict[str, list[float]]:
        stored: Any = self
        return stored._stored_metrics[mode]

    def group_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute the sum of the losses of this rank's group: see `PlannedPairs`."""
        head = self._run.fitted.head
        with nullcontext() if head is None else head.lazy(always=True):
            tokens = model(**inputs, token_log_probs=True).loss
        is_target = (inputs["shift_labels"] != IGNORE_INDEX).to(tokens.dtype)
        compared = columns.get(ContrastedRows.column)  # none on a rank without tokens
        compared = torch.zeros_like(is_target) if compared is None else compared[None].to(tokens.dtype)
        # a token that stands in at the end is in none of them
        compared = F.pad(compared, (0, is_target.shape[1] - compared.shape[1]))
        own = torch.cat([tokens[:1] * compared, tokens[:1], compared, is_target, tokens[2:3].detach()])
        sums = over_group(context, by_sample(context, own))
        chosen, rejected = sums[:, ::2], sums[:, 1::2]
        of_chosen, of_rejected = chosen[0], rejected[0]
        if self._divides():
            of_chosen, of_rejected = of_chosen / chosen[2].detach(), of_rejected / rejected[2].detach()
        losses, rewards = self._compare(of_chosen, of_rejected)
        logged = ContrastMeans.of(
            torch.stack([of_chosen, of_rejected]).detach(),
            torch.stack(rewards).detach(),
            chosen.detach(),
            rejected.detach(),
            context.layout.num_tokens,
        )
        self._watch(context, logged)
        return (losses - self._share_of_tokens() * chosen[1] * self._per_chosen_token).sum()

    def _divides(self) -> bool:
        """Return whether completions are compared by the mean over their tokens, not by the sum."""
        return True

    def _share_of_tokens(self) -> float:
        """Return the factor of the loss of the chosen one's tokens."""
        return 1.0

    def _compare(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Return the loss of each pair, and the rewards of both completions, from their log-probabilities."""
        raise NotImplementedError


class HeteroCPOTrainer(_Contrasting, CPOTrainer):
    """`HeteroCPOTrainer` is TRL's `CPOTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    It is CPO (arXiv:2401.08417), SimPO (arXiv:2405.14734) and AlphaPO (arXiv:2501.03884), as `CPOConfig` says.

    Raises:
        UnsupportedModel: what cannot be shared out.
    """

    def _divides(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    def _share_of_tokens(self) -> float:
        return self.cpo_alpha

    def _compare(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        gamma = self.simpo_gamma if self.loss_type == "simpo" else 0.0
        kind = "sigmoid" if self.loss_type == "simpo" else self.loss_type
        return contrast(kind, chosen, rejected, self.beta, self.alpha, gamma, self.label_smoothing)


class HeteroORPOTrainer(_Contrasting, ORPOTrainer):
    """`HeteroORPOTrainer` is TRL's `ORPOTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    It is ORPO (arXiv:2403.07691): the odds of both completions are compared, and the chosen sequence is learned with
    its prompt, as in TRL.

    Raises:
        UnsupportedModel: what cannot be shared out.
    """

    learns_prompts: ClassVar[bool] = True

    def _compare(
        self, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        return -self.beta * F.logsigmoid(log_odds(chosen, rejected)), (self.beta * chosen, self.beta * rejected)
