"""The user's model is fitted for planned steps here, and given back as it was.

What is set: the attention that crosses ranks, rotary tables that follow each sample, a loss that stays in fp64 where
weights are, an output embedding that does without whole logits. None of it touches a weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss

from hf_hetero.attention import interface
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.handing_down import HandedDown
from hf_hetero.attention.kernels import choice
from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.attention.rotary import TablesBySample
from hf_hetero.checks import own_loss, router_loss
from hf_hetero.checks.additions import strangers
from hf_hetero.checks.exactness import SEES_TARGETS
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import UnsupportedModel
from hf_hetero.estimate.flops import ModelFlops, flops_of
from hf_hetero.images.families import why_blind
from hf_hetero.images.features import FeaturesOfSpans
from hf_hetero.images.mutual import CausalLayers
from hf_hetero.manners.manner import Manner
from hf_hetero.manners.outside_loss import OutsideLoss
from hf_hetero.manners.positions import PositionsBySample
from hf_hetero.manners.whole_samples import WholeSamples
from hf_hetero.model import lm_head, loss
from hf_hetero.model.activations import Activations
from hf_hetero.model.classes.labelled import NEXT, labelled_of
from hf_hetero.model.experts.load import ExpertLoad
from hf_hetero.model.experts.router_loss import COEFFICIENT, RouterLoss
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.sharding import Sharding, sharding_of
from hf_hetero.state_layers.planned import StateLayers
from hf_hetero.step import RankMicroBatch

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8 is for linear layers only


class Asked(NamedTuple):
    """An `Asked` is what a trainer asks a reference beside its model in each micro-batch.

    Args:
        passes: of each token, forward only.
        num_bytes: of a frozen model's weights; 0 where it is the model without its adapters.
    """

    passes: int = 0
    num_bytes: int = 0

    @classmethod
    def by(cls, trainer: Trainer) -> Asked:
        """Return what a trainer asks, which says so by `reference_passes`; most ask nothing."""
        frozen: Any = getattr(trainer, "ref_model", None)  # TRL's name
        weights: Iterable[torch.Tensor] = () if frozen is None else frozen.parameters()
        return cls(getattr(trainer, "reference_passes", 0), sum(p.numel() * p.element_size() for p in weights))


NOTHING_ASKED = Asked()


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
        state_layers: what of it goes over samples one by one: layers that carry state, or the whole of it.
        flops: operations that its training needs; None where they cannot be counted.
        reference: the output embedding of a frozen model that is asked beside it, if there is one and it can, too.
        reference_layers: the same of the frozen model.
        asked: of that model, or of this one without its adapters.
        undone: gives the models back.
    """

    model: Any
    kernel: Kernel
    head: LeanHead | None
    experts: ExpertLoad
    router_loss: RouterLoss
    sharding: Sharding
    activations: Activations
    state_layers: StateLayers | WholeSamples
    flops: ModelFlops | None
    reference: LeanHead | None
    reference_layers: StateLayers | WholeSamples | None
    asked: Asked
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


def check_manner(trainer: Trainer, manner: Manner) -> None:
    """Refuse what a manner of training does not go with.

    Raises:
        UnsupportedModel: with the setting and the remedy.
    """
    name = type(base_model(trainer.model)).__name__
    if manner.outside_loss and getattr(trainer, "learns_pairs", False):
        raise UnsupportedModel(
            f"{name} computes a loss of its own, which pairs are not compared by. Use another model, or TRL's trainer."
        )
    if manner.aligned and (what := own_loss.owners(trainer)):
        raise UnsupportedModel(
            f"{name} compares each token with its own label, and {what} would be given labels for the token after it. "
            "Remove it, or use plain Trainer."
        )


def check_reached(fitted: Fitted, context: AttentionContext) -> None:
    """Refuse a model whose micro-batch did not go the way that its plan needs.

    Raises:
        UnsupportedModel: in words.
    """
    if not context.reached:
        raise UnsupportedModel(
            f"{type(fitted.model).__name__} never called its attention through transformers' interface, so samples "
            "cannot be shared among ranks. Use plain Trainer."
        )
    if context.looked_ahead and labelled_of(fitted.model) == NEXT:
        raise UnsupportedModel(f"{type(fitted.model).__name__}: {SEES_TARGETS}")


def accept(trainer: Trainer, manner: Manner) -> None:
    """Have a trainer divide the loss by the step's tokens, once it is known that something computes the attention.

    Classes that see images say that their loss cannot be divided so (`accepts_loss_kwargs`), which it can, as the trial
    shows; for want of it Trainer would take the mean of each batch's mean.

    Raises:
        HeteroError: no kernel can.
    """
    choose_kernel(base_model(trainer.model), trainer.args.device.type, compute_dtype(trainer), manner)
    trainer.model_accepts_loss_kwargs = True


def fit(trainer: Trainer, hetero: HeteroConfig, manner: Manner | None = None) -> Fitted:
    """Fit a trainer's model of now for planned steps, to be trained in a manner; None: as most are.

    Raises:
        UnsupportedModel: a loss of one's own is not exact under plans.
        HeteroError: no kernel computes the model's attention. The model is as it was after either.
    """
    base, args = base_model(trainer.model), trainer.args
    manner = manner or Manner()
    dtype = half_evaluation_dtype(trainer) or compute_dtype(trainer)
    kernel = choose_kernel(base, args.device.type, dtype, manner)
    # what is set is entered to be undone in the same breath: an error on the way gives the model back as it was
    with ExitStack() as undone:
        interface.register()
        # Liger brings a loss of its own; a compiler sees through no lazy tensor
        has_lazy_logits = hetero.chunked_loss and not args.use_liger_kernel and not args.torch_compile
        head = _fit(trainer.model, has_lazy_logits, manner, undone)
        if manner.outside_loss:
            undone.callback(OutsideLoss(trainer.model, base, manner.aligned).remove)  # pyright: ignore[reportArgumentType]
        frozen: Any = getattr(trainer, "ref_model", None)  # TRL's name
        reference = None if frozen is None else _fit(frozen, has_lazy_logits, manner, undone)
        if not manner.whole:
            logger.info("Attention %r with kernel %r.", interface.ATTENTION_NAME, kernel.name)
        own_loss.check_trainer(trainer, kernel)
        if not manner.whole and labelled_of(base) == NEXT:
            strangers.check(trainer.model, own_loss.logits_of(trainer, kernel, dtype), dtype)  # pyright: ignore
        if hetero.weight_column is not None and labelled_of(base) == NEXT:  # others' losses are this package's
            own_loss.check_weights(trainer, kernel, hetero.weight_column)
        sharding = sharding_of(trainer, hetero.sync_each_micro_batch)
        activations = Activations(
            base, recomputes=sharding.checkpointing, in_chunks=hetero.chunked_mlp, compiled=args.torch_compile
        )
        layers = WholeSamples if manner.whole else StateLayers
        states, of_frozen = layers(base), None if frozen is None else layers(base_model(frozen))
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
            Asked.by(trainer),
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


def _fit(wrapped: Any, has_lazy_logits: bool, manner: Manner, undone: ExitStack) -> LeanHead | None:
    """Set attention, rotary tables, loss and head of a model; return its head, if it can do without whole logits."""
    base = base_model(wrapped)
    if not manner.whole:  # whole samples are computed as transformers does
        before = _attention_of(base)
        undone.callback(base.set_attn_implementation, before)
        name = interface.ATTENTION_NAME
        base.set_attn_implementation(dict.fromkeys(before, name) if isinstance(before, dict) else name)
        undone.callback(FeaturesOfSpans(base, wrapped).remove)
        for hooks in (HandedDown, TablesBySample, CausalLayers, PositionsBySample):
            undone.callback(hooks(base).remove)
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


def _attention_of(base: Any) -> str | dict[str, str]:
    """Return what attention is called where this package's comes: everywhere, but not in towers that see images.

    These run on whole images, so theirs may stay, and with it what a library does about images of many sizes.
    """
    config = base.config
    if why_blind(base):
        return config._attn_implementation
    return {"": config._attn_implementation, "text_config": config.text_config._attn_implementation}


def choose_kernel(base: Any, device_type: str, dtype: torch.dtype, manner: Manner) -> Kernel:
    """Choose what computes this model's attention on one rank.

    Raises:
        HeteroError: no kernel can.
    """
    if manner.whole:  # the model itself does
        return PLAIN
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
