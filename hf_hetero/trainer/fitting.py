"""The user's model is fitted for planned steps here, and given back as it was.

What is set: the attention that crosses ranks, rotary tables that follow each sample, a loss that stays in fp64 where
weights are, an output embedding that does without whole logits. None of it touches a weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss

from hf_hetero.attention import interface
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.handing_down import HandedDown
from hf_hetero.attention.kernels import choice
from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.attention.rotary import TablesBySample
from hf_hetero.checks import own_loss, router_loss
from hf_hetero.config import HeteroConfig
from hf_hetero.estimate.flops import ModelFlops, flops_of
from hf_hetero.model import lm_head, loss
from hf_hetero.model.activations import Activations
from hf_hetero.model.experts.load import ExpertLoad
from hf_hetero.model.experts.router_loss import COEFFICIENT, RouterLoss
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.sharding import Sharding, sharding_of
from hf_hetero.state_layers.planned import StateLayers
from hf_hetero.step import RankMicroBatch

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8 is for linear layers only


@dataclass(frozen=True, slots=True)
class Fitted:
    """A `Fitted` is a user's model while planned steps run on it.

    Args:
        model: the transformers model, inside a peft one or not.
        kernel: what computes attention on one rank.
        head: its output embedding, if it can do without whole logits.
        experts: how evenly they are used; false where there are none.
        router_loss: of a step; false where the model has none.
        sharding: how its weights are spread over ranks.
        activations: what its layers can do to hold more tokens.
        state_layers: those of its layers that carry state along a sample.
        flops: operations that its training needs; None where they cannot be counted.
        reference: the output embedding of a frozen model that is asked beside it, if there is one and it can, too.
        reference_layers: the frozen model's, that carry state.
        undone: gives the models back.
    """

    model: Any
    kernel: Kernel
    head: LeanHead | None
    experts: ExpertLoad
    router_loss: RouterLoss
    sharding: Sharding
    activations: Activations
    state_layers: StateLayers
    flops: ModelFlops | None
    reference: LeanHead | None
    reference_layers: StateLayers | None
    undone: ExitStack

    @contextmanager
    def as_planned(self, micro_batch: RankMicroBatch, context: AttentionContext) -> Iterator[None]:
        """Have forward and backward of a micro-batch as planned: a lazy head, layers that hold what a policy says."""
        lazy = nullcontext() if self.head is None else self.head.lazy()
        holding = self.activations.following(micro_batch.group.activations, context.store)
        with lazy, holding, self.state_layers.planned(context), self.experts.micro_batch(context.num_tokens):
            yield

    @contextmanager
    def as_looked_at(self, micro_batch: RankMicroBatch, context: AttentionContext) -> Iterator[None]:
        """Have the forward pass of a micro-batch as planned, where nothing is learned from it and nothing counted."""
        lazy = nullcontext() if self.head is None else self.head.lazy(always=True)
        holding = self.activations.following(micro_batch.group.activations, context.store)
        with lazy, holding, self.state_layers.planned(context):
            yield

    def close(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        self.undone.close()


def accept(trainer: Trainer) -> None:
    """Have a trainer divide the loss by the step's tokens, once it is known that something computes the attention.

    Classes that see images say that their loss cannot be divided so (`accepts_loss_kwargs`), which it can, as the trial
    shows; for want of it Trainer would take the mean of each batch's mean.

    Raises:
        HeteroError: no kernel can.
    """
    choose_kernel(base_model(trainer.model), trainer.args.device.type, compute_dtype(trainer))
    trainer.model_accepts_loss_kwargs = True


def fit(trainer: Trainer, hetero: HeteroConfig) -> Fitted:
    """Fit a trainer's model of now for planned steps.

    Raises:
        UnsupportedModel: a loss of one's own is not exact under plans.
        HeteroError: no kernel computes the model's attention. The model is as it was after either.
    """
    base, args = base_model(trainer.model), trainer.args
    kernel = choose_kernel(base, args.device.type, half_evaluation_dtype(trainer) or compute_dtype(trainer))
    # what is set is entered to be undone in the same breath: an error on the way gives the model back as it was
    with ExitStack() as undone:
        interface.register()
        # Liger brings a loss of its own; a compiler sees through no lazy tensor
        has_lazy_logits = hetero.chunked_loss and not args.use_liger_kernel and not args.torch_compile
        head = _fit(base, has_lazy_logits, undone)
        frozen: Any = getattr(trainer, "ref_model", None)  # TRL's name
        reference = None if frozen is None else _fit(base_model(frozen), has_lazy_logits, undone)
        logger.info("Attention %r with kernel %r.", interface.ATTENTION_NAME, kernel.name)
        own_loss.check_trainer(trainer, kernel)
        if hetero.weight_column is not None:
            own_loss.check_weights(trainer, kernel, hetero.weight_column)
        sharding = sharding_of(trainer, hetero.sync_each_micro_batch)
        activations = Activations(
            base, recomputes=sharding.checkpointing, in_chunks=hetero.chunked_mlp, compiled=args.torch_compile
        )
        states, of_frozen = StateLayers(base), None if frozen is None else StateLayers(base_model(frozen))
        return Fitted(
            base,
            kernel,
            head,
            ExpertLoad(base),
            _router_loss(trainer, base, hetero.router_loss == "last_step"),
            sharding,
            activations,
            states,
            _flops(base),
            reference,
            of_frozen,
            undone.pop_all(),
        )


def _flops(base: Any) -> ModelFlops | None:
    """Count what a model's training needs; of one that is built in an unknown way that is no reason to end a run."""
    try:
        return flops_of(base)
    except (AttributeError, TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        logger.info("Operations of %s are not counted: %r.", type(base).__name__, error)
        return None


def _router_loss(trainer: Trainer, base: Any, last_step: bool) -> RouterLoss:
    """Return the loss of a model's routers as a trainer adds it to the whole; a false one where it adds none."""
    if trainer.compute_loss_func is not None or not router_loss.is_wanted(base):
        return RouterLoss(base)
    # TRL's trainers have a factor of their own
    coefficient = getattr(trainer, COEFFICIENT, router_loss.coefficient_of(base))
    return RouterLoss(base, coefficient, last_step)


def _fit(base: Any, has_lazy_logits: bool, undone: ExitStack) -> LeanHead | None:
    """Set attention, rotary tables, loss and head of a model; return its head, if it can do without whole logits."""
    undone.callback(_give_back_attention, base, base.config._attn_implementation)
    base.set_attn_implementation(interface.ATTENTION_NAME)
    undone.callback(HandedDown(base).remove)
    undone.callback(TablesBySample(base).remove)
    if getattr(base, "loss_function", None) is ForSequenceClassificationLoss:
        loss.install(base, ForSequenceClassificationLoss, loss.token_scores)
    else:
        loss.install(base, ForCausalLMLoss)
    undone.callback(loss.uninstall, base)
    has_logits = base.get_output_embeddings() is not None
    return _lean_head(base, undone) if has_lazy_logits and has_logits else None


def _lean_head(base: Any, undone: ExitStack) -> LeanHead | None:
    """Install a head that does without whole logits, if it can be; else say why not, and compute them."""
    head = lm_head.install(base)
    if isinstance(head, str):
        logger.warning("Whole logits are computed for the loss: %s.", head)
        return None
    undone.callback(lm_head.uninstall, base)
    return head


def _give_back_attention(base: Any, name: str) -> None:
    base.set_attn_implementation(name)


def choose_kernel(base: Any, device_type: str, dtype: torch.dtype) -> Kernel:
    """Choose what computes this model's attention on one rank.

    Raises:
        HeteroError: no kernel can.
    """
    implementation = base.config._attn_implementation
    return choice.choose_kernel(
        device_type, dtype, choice.features_of(base.config.get_text_config(decoder=True)), implementation
    )


def compute_dtype(trainer: Trainer) -> torch.dtype:
    """Return the type that attention computes in, whoever asked for it: the arguments or the launcher."""
    own: torch.dtype = base_model(trainer.model).dtype
    return AUTOCAST.get(trainer.accelerator.mixed_precision, own)


def half_evaluation_dtype(trainer: Trainer) -> torch.dtype | None:
    """Return the half type that the whole model takes for an evaluation outside of training; None: it keeps its own."""
    if trainer.is_in_train or not (trainer.args.fp16_full_eval or trainer.args.bf16_full_eval):
        return None
    return torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16
