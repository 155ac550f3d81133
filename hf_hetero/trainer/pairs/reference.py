"""The reference of a preference is a frozen model, the trained one without its adapters, or columns of the dataset.

It is asked without a gradient, in a context of its own over the same micro-batch, or before training, once for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from hf_hetero.attention.context import AttentionContext
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.samples.pairs import PairRows
from hf_hetero.trainer.pairs.planned import PlannedPairs
from hf_hetero.trainer.pairs.sums import EXACT, at_starts, by_sample, over_group


class PairsWithReference(PlannedPairs):
    """`PairsWithReference` goes before a trainer of TRL that compares a model with what it was."""

    precompute_ref_logps: bool
    ref_model: Any

    @property
    def reference_passes(self) -> int:
        """Count the passes of each token through the reference: none where all was computed before."""
        return 0 if self.precompute_ref_logps else 1

    def _sums(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
        *others: torch.Tensor,
    ) -> torch.Tensor:
        """Return what is known of each sample of the group, shape (7 + others, num_samples). A collective of the group.

        These are log-probability, that of the reference, and sums over targets of entropy, mean logit and whether the
        most probable token is right; targets; tokens of the completion; then the sums of `others`. The first has this
        rank's gradient.

        Args:
            model: that is trained, in its wrapper.
            inputs: of the model, with "token_log_probs".
            context: of the micro-batch.
            columns: of this rank's tokens.
            others: this rank's part of more, shape (num_samples,) each.
        """
        reference = self._reference_sums(inputs, context, columns)
        head = self._run.fitted.head
        with nullcontext() if head is None else head.lazy(always=True):
            tokens = model(**inputs).loss
        is_target = inputs["shift_labels"] != IGNORE_INDEX
        is_completion = inputs["labels"] != IGNORE_INDEX
        watched = by_sample(context, torch.cat([tokens[1:], is_target, is_completion]).detach())
        own = [by_sample(context, tokens[:1]), reference[None], watched, *(one[None] for one in others)]
        return over_group(context, torch.cat(own))

    def _reference_sums(
        self, inputs: dict[str, Any], context: AttentionContext, columns: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return this rank's part of the reference's log-probability of each sample. Shape (num_samples,).

        Args:
            inputs: of the model, with "token_log_probs".
            context: of the micro-batch.
            columns: of this rank's tokens; `PairRows.column` has what was computed before.
        """
        if not self.precompute_ref_logps:
            return by_sample(context, self._reference_log_probs({**inputs, "hetero": context.again()})[0])
        if (known := columns.get(PairRows.column)) is not None:
            return at_starts(context, known)
        return torch.zeros(len(context.layout.lengths), dtype=EXACT, device=self.args.device)

    @torch.no_grad()
    def _reference_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what the reference gives of this rank's tokens, as `chunked_log_probs` does. Shape (4, n)."""
        if self.ref_model is None:
            with self._reference_adapter():
                return self._own_log_probs(inputs)
        fitted, frozen = self._run.fitted, self.ref_model
        with ExitStack() as opened:
            if fitted.reference_layers is not None:
                opened.enter_context(fitted.reference_layers.planned(inputs["hetero"]))
            opened.enter_context(self.compute_loss_context_manager())
            if fitted.reference is not None:
                opened.enter_context(fitted.reference.lazy(always=True))
            return frozen(**inputs).loss

    @torch.no_grad()
    def _own_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what the trained model gives of this rank's tokens, as `chunked_log_probs` does. Shape (4, n)."""
        fitted, trained = self._run.fitted, self.model
        assert trained is not None
        with ExitStack() as opened:
            opened.enter_context(fitted.state_layers.planned(inputs["hetero"]))
            opened.enter_context(self.compute_loss_context_manager())
            if fitted.head is not None:
                opened.enter_context(fitted.head.lazy(always=True))
            return trained(**inputs).loss

    @contextmanager
    def _reference_adapter(self) -> Iterator[None]:
        """Be the reference meanwhile: an adapter that was kept as it was, or the model without any."""
        adapted: Any = self.accelerator.unwrap_model(self.model)
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            yield
