"""HeteroDPOTrainer is TRL's DPOTrainer with planned steps. It needs the extra `trl`.

TRL tokenises the dataset, loads the reference model and writes the logs. A pair is planned as one item: its two
sequences are in one group of one micro-batch, packed without padding, and each may be held by many ranks. The loss of a
step is the mean over its pairs, as TRL's of a batch that is the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.utils import use_adapter

from hf_hetero.attention.context import AttentionContext
from hf_hetero.config import HeteroConfig
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.samples.pairs import PairRows
from hf_hetero.trainer.pairs.losses import LOSSES, Completion, Preference
from hf_hetero.trainer.pairs.means import PairMeans
from hf_hetero.trainer.pairs.planned import PlannedPairs, refuse, setting_problems, trainer_problems
from hf_hetero.trainer.pairs.sums import EXACT, at_starts, by_sample, counted_once, over_group

SORTED = ("aot", "aot_unpaired")


class _ModelThenArguments(DPOTrainer):
    """`_ModelThenArguments` takes its arguments in the order of `Trainer`, by which the mixin hands them on."""

    def __init__(self, model: Any, args: Any = None, *others: Any, ref_model: Any = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model, args, *others, **kwargs)


class HeteroDPOTrainer(PlannedPairs, _ModelThenArguments):
    """`HeteroDPOTrainer` is `trl.DPOTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`.

    Evaluation is planned, too, unless `compute_metrics` or the loss "sft" ask for what TRL computes of its own batches.

    Raises:
        UnsupportedModel: a loss that is no sum over pairs, or what cannot be shared out.
    """

    loss_is_scaled_for_ga = True  # by the pairs of the whole step

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
        if self.aux_loss_enabled:
            problems.append("The auxiliary loss of routers is of a batch; set DPOConfig(router_aux_loss_coef=0.0).")
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
        self._means = PairMeans()
        self._per_chosen_token: torch.Tensor | float = 0.0
        self._begin_with(PairRows(settings.max_length, settings.truncation_mode == "keep_end"))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's own loader, whose batches can be read; `evaluation_loop` plans its pairs if it can."""
        loader = super().get_eval_dataloader(eval_dataset)
        dataset = self._between_runs.evaluated[loader]
        if self.compute_metrics is None and "sft" not in self._preference.loss_type and dataset is not None:
            self._between_runs.evaluated[loader] = self._view(dataset)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the next planned step as so many batches, and its pairs over all ranks."""
        batches, num_pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "sft" in self._preference.loss_type:
            own = sum(_num_chosen_targets(m) for part in batches for m in part.micro_batches)
            total: Any = self.accelerator.reduce(torch.tensor(own, device=device), "sum")
            self._per_chosen_token = num_pairs / total.clamp(min=1).to(EXACT)
        return batches, num_pairs

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
        inputs = {**inputs, "use_cache": False, "token_log_probs": True}
        known = inputs.pop(PairRows.column, None)
        if self.precompute_ref_logps:
            reference = torch.zeros(len(context.layout.lengths), dtype=torch.float64, device=self.args.device)
            reference = reference if known is None else at_starts(context, known[0])
        else:
            reference = by_sample(context, self._reference_log_probs({**inputs, "hetero": context.again()})[0])
        head = self._run.fitted.head
        with ExitStack() as lazily:
            if head is not None:
                lazily.enter_context(head.lazy(always=True))
            tokens = model(**inputs).loss
        is_target = inputs["shift_labels"] != IGNORE_INDEX
        is_completion = inputs["labels"] != IGNORE_INDEX
        watched = by_sample(context, torch.cat([tokens[1:], is_target, is_completion]).detach())
        sums = over_group(context, torch.cat([by_sample(context, tokens[:1]), reference[None], watched]))
        # pairs lie side by side, chosen first
        chosen, rejected = sums[:, ::2], sums[:, 1::2]
        of_chosen, of_rejected = (Completion(s[0], s[1], s[6].detach()) for s in (chosen, rejected))
        loss = self._preference.losses(of_chosen, of_rejected, self._per_chosen_token).sum()
        self._watch(context, chosen.detach(), rejected.detach())
        return counted_once(context, loss) * self.accelerator.num_processes / num_items_in_batch

    @torch.no_grad()
    def _reference_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what the reference gives of this rank's tokens, as `chunked_log_probs` does. Shape (4, n)."""
        fitted, frozen = self._run.fitted, self.ref_model
        head, asked = (fitted.head, self.model) if frozen is None else (fitted.reference, frozen)
        layers = fitted.state_layers if frozen is None else fitted.reference_layers
        reference: Any = asked
        with ExitStack() as opened:
            if layers is not None:
                opened.enter_context(layers.planned(inputs["hetero"]))
            opened.enter_context(self.compute_loss_context_manager())
            if head is not None:
                opened.enter_context(head.lazy(always=True))
            if frozen is None:
                opened.enter_context(self._reference_adapter())
            return reference(**inputs).loss

    @contextmanager
    def _reference_adapter(self) -> Iterator[None]:
        """Be the reference meanwhile: an adapter that was kept as it was, or the model without any."""
        adapted: Any = self.accelerator.unwrap_model(self.model)
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            yield

    def _watch(self, context: AttentionContext, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Add a micro-batch to what is logged. A collective of all ranks."""
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        # all ranks of a group know the same
        share = PairMeans.of(chosen, rejected, self.beta, context.layout.num_tokens) * (context.group_rank == 0)
        total: Any = self.accelerator.reduce(share, "sum")
        num_tokens = self._means.add(mode, total.tolist())
        if mode == "train":
            self._total_train_tokens += num_tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does: means over the pairs, or the tokens, since the last log."""
        assert self.model is not None
        mode = "train" if self.model.training else "eval"
        for name, value in self._means.take(mode).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)


def _num_chosen_targets(micro_batch: Any) -> int:
    """Count this rank's targets in chosen completions."""
    targets, place, count = micro_batch.inputs["shift_labels"][0], 0, 0
    for span in micro_batch.spans:
        if span.sample % 2 == 0:
            count += int((targets[place : place + span.num_tokens] != IGNORE_INDEX).sum())
        place += span.num_tokens
    return count


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
