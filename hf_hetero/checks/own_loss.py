"""A loss of somebody's own must be a sum over samples; it is tried on two tiny ones before the first step.

    loss(both in one pack) = loss(first alone) + loss(second alone)        with the same num_items_in_batch

If that holds, no plan can change what is learnt from it. A mean over a batch, a term that counts batches, or one that
looks at rows instead of tokens does not pass. The model's place is taken by a table of random logits, so that the trial
costs milliseconds and touches no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.checks import overrides
from hf_hetero.collators.sample import LOSS_WEIGHTS, Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.errors import HeteroError, UnsupportedModel
from hf_hetero.layout import contiguous
from hf_hetero.model.logged_means import uncounted
from hf_hetero.model.loss import IGNORE_INDEX, carried_weights, token_loss
from hf_hetero.model.wrapped import base_model

if TYPE_CHECKING:
    from transformers import Trainer

TOKENS = 5
CLOSE = 1e-4
"""Relative; sums in fp32 differ by less, terms that should not be there by more."""

ComputeLoss = Callable[[nn.Module, dict[str, Any], torch.Tensor], torch.Tensor]
Pack = Callable[[Sequence[int]], dict[str, Any]]


def check(compute_loss: ComputeLoss, pack: Pack, config: Any, device: torch.device, what: str) -> None:
    """Refuse a loss that is no sum over samples.

    Args:
        compute_loss: model, inputs, target tokens -> loss, through everything that is somebody's own.
        pack: which of two samples -> their inputs.
        config: of the model.
        device: where it computes.
        what: whose loss it is, for messages.

    Raises:
        UnsupportedModel: with what the trial showed, and what to do.
    """
    remedy = (
        "Return a sum over tokens divided by num_items_in_batch, of model(**inputs), e.g. as "
        "compute_loss_func(outputs, labels, num_items_in_batch); or use plain Trainer."
    )
    rng = torch.random.get_rng_state()
    model = _table(config, device)
    total = torch.tensor(2 * TOKENS)
    losses: list[float] = []
    # `total` is the same for each: a sum over tokens, divided by it, adds up; a mean over what is given does not
    try:
        for samples in ((0,), (1,), (0, 1)):
            model.reached = False
            with torch.enable_grad():
                losses.append(compute_loss(model, pack(samples), total).item())
            if not model.reached:
                raise UnsupportedModel(
                    f"{what} does not hand all its inputs to the model, so attention cannot learn which ranks share "
                    f"its tokens. {remedy}"
                )
    except HeteroError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{what} could not be tried: {type(error).__name__}: {error}. {remedy}") from error
    finally:
        torch.random.set_rng_state(rng)
    first, second, both = losses
    # "not <=", so that nan does not pass
    if not abs(first + second - both) <= CLOSE * max(abs(first), abs(second), abs(both)):
        raise UnsupportedModel(
            f"{what} gives {both:.6g} for two samples together, and {first:.6g} and {second:.6g} for each: what is "
            f"learnt would depend on which samples are planned together. {remedy}"
        )


def owners(trainer: Trainer) -> str:
    """Say whose loss stands in the place of the model's; "" where none does."""
    methods = [f"{owner}.{name}" for name, owner in overrides.own(trainer, overrides.LOSS).items()]
    return " and ".join([*methods, *(["compute_loss_func"] if trainer.compute_loss_func is not None else [])])


def check_trainer(trainer: Trainer, kernel: Kernel) -> None:
    """Refuse a trainer's own loss that is no sum over samples; without one there is nothing to try.

    Args:
        trainer: its methods, and those of its subclass.
        kernel: what computes attention of its model.

    Raises:
        UnsupportedModel: with what the trial showed, and what to do.
    """
    what, base = owners(trainer), base_model(trainer.model)
    if not what:
        return

    def pack(numbers: Sequence[int]) -> dict[str, Any]:
        return _packed(_samples(base.config, numbers), kernel, trainer.args.device, unshifted=True)

    with uncounted(trainer):
        check(_loss_of(trainer), pack, base.config, trainer.args.device, what)


def check_weights(trainer: Trainer, kernel: Kernel, column: str) -> None:
    """Refuse a weight column whose weights the loss does not know: it would be learned as if there were none.

    Args:
        trainer: its loss, and that of its model.
        kernel: what computes attention of its model.
        column: of the dataset, for messages.

    Raises:
        UnsupportedModel: the loss of a sample whose weights are 0 is not 0, or the model has a loss of its own.
    """
    what, base = owners(trainer), base_model(trainer.model)
    if base.loss_function is not token_loss or trainer.args.use_liger_kernel:
        raise UnsupportedModel(
            f"HeteroConfig.weight_column={column!r}: the loss of {type(base).__name__} is "
            f"{'that of Liger' if trainer.args.use_liger_kernel else 'one of its own'}, which knows no weights. "
            "Remove weight_column, or train with the plain loss of causal language models."
        )
    device = trainer.args.device
    [sample] = _samples(base.config, [0])
    weightless = replace(sample, weights={LOSS_WEIGHTS: carried_weights(torch.zeros(TOKENS))})
    model = _table(base.config, device)
    with uncounted(trainer), torch.random.fork_rng(devices=[]), torch.enable_grad():
        inputs = _packed([weightless], kernel, device, unshifted=bool(what))
        loss = _loss_of(trainer)(model, inputs, torch.tensor(TOKENS)).item()
    if loss != 0:
        raise UnsupportedModel(
            f"HeteroConfig.weight_column={column!r}: {what or type(trainer).__name__} computes a loss of {loss:.3g} "
            "for tokens that weigh 0, so it knows no weights. Take the loss from model(**inputs).loss, which does; or "
            "remove weight_column, and let the loss read a column of its own."
        )


def logits_of(trainer: Trainer, kernel: Kernel, dtype: torch.dtype) -> Callable[[Sequence[int]], torch.Tensor]:
    """Return how the trainer's own model comes from some of two samples, packed, to their logits.

    Args:
        trainer: its model is fitted.
        kernel: what computes attention.
        dtype: that it computes in.
    """
    base, device = base_model(trainer.model), trainer.args.device
    model: Any = trainer.model

    def logits(numbers: Sequence[int]) -> torch.Tensor:
        inputs = _packed(_samples(base.config, numbers), kernel, device, unshifted=True)
        del inputs["labels"]
        with torch.autocast(device.type, dtype, enabled=dtype != base.dtype):
            # a token may stand in at the end
            return model(**inputs, use_cache=False).logits[0, : TOKENS * len(numbers)]

    return logits


def _loss_of(trainer: Trainer) -> ComputeLoss:
    """Return how a trainer comes from inputs of the model to its loss, through everything that is somebody's own."""
    has_methods = bool(overrides.own(trainer, overrides.LOSS))

    def compute(model: nn.Module, inputs: dict[str, Any], total: torch.Tensor) -> torch.Tensor:
        prepared: Any = trainer._prepare_inputs(inputs)  # pyright: ignore[reportPrivateUsage]
        # a compute_loss of somebody's own decides itself what becomes of compute_loss_func
        if has_methods or trainer.compute_loss_func is None:
            return trainer.compute_loss(model, prepared, num_items_in_batch=total)  # pyright: ignore
        labels = prepared.pop("labels")
        return trainer.compute_loss_func(model(**prepared), labels, num_items_in_batch=total)

    return compute


def _samples(config: Any, numbers: Sequence[int]) -> list[Sample]:
    """Return some of two samples of `TOKENS` tokens, each of which is to be predicted."""
    most = config.get_text_config().vocab_size
    ids = [torch.arange(start, start + TOKENS) % most for start in (3, 11)]
    return [Sample(ids[number], ids[number]) for number in numbers]


def _packed(samples: Sequence[Sample], kernel: Kernel, device: torch.device, unshifted: bool) -> dict[str, Any]:
    """Return the inputs of a model for samples in one pack, on one rank."""
    layout = contiguous([TOKENS] * len(samples), 1)
    context = AttentionContext(layout, (0,), 0, None, "ulysses", kernel, device)
    return {**pack_spans(layout.spans[0], samples, unshifted), "hetero": context}


def _table(config: Any, device: torch.device) -> _Table:
    """Return what takes the place of the model."""
    generator = torch.Generator().manual_seed(0)
    return _Table(torch.randn(257, 64, generator=generator), config).to(device)


class _Table(nn.Module):
    """A `_Table` takes the place of a causal language model: its logits depend on token and position alone.

    As with attention that keeps samples apart, packing changes none of them; so what differs is the loss's.
    """

    def __init__(self, table: torch.Tensor, config: Any) -> None:
        super().__init__()
        self.table, self.config = nn.Parameter(table), config
        self.vocab_size: int = config.get_text_config().vocab_size
        self.reached = False

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        hetero: object = None,
        fused_lm_head: bool = False,
        **inputs: Any,
    ) -> Any:
        self.reached = hetero is not None
        places = torch.zeros_like(input_ids) if position_ids is None else position_ids
        hidden = self.table[(input_ids * 31 + places * 17) % len(self.table)]
        weight = self.table[torch.arange(self.vocab_size, device=self.table.device) % len(self.table)]
        logits = hidden @ weight.T / 8
        if fused_lm_head:
            return _log_probs(logits, labels, inputs.get("shift_labels"))
        loss = None
        if labels is not None:
            handed_on = ("num_items_in_batch", "shift_labels", LOSS_WEIGHTS)
            keywords = {name: inputs[name] for name in handed_on if name in inputs}
            loss = token_loss(logits, labels, self.vocab_size, **keywords)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def _log_probs(logits: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> Any:
    """Return what models give to TRL's SFTTrainer in the place of logits, each of shape (1, num_tokens)."""
    if shift_labels is None:
        assert labels is not None
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    is_target = shift_labels != IGNORE_INDEX
    all_log_probs = logits.float().log_softmax(-1)
    log_probs = all_log_probs.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * is_target
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1) * is_target
    is_top1 = (logits.argmax(-1) == shift_labels) & is_target
    nothing = torch.zeros((), device=logits.device)
    return SimpleNamespace(
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=is_target, aux_loss=nothing
    )
