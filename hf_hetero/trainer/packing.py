"""A run's packer turns rows into this rank's tensors as the user's collator, model and columns have it."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields, replace
from typing import Any

from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from hf_hetero.attention.kernels.contract import NO_LSE
from hf_hetero.checks import own_loss
from hf_hetero.checks.tiny import build, shrunk
from hf_hetero.collators import ClassCollator, PackedCollator
from hf_hetero.collators.classes import Classes
from hf_hetero.collators.limits import limits_of
from hf_hetero.config import HeteroConfig
from hf_hetero.errors import UnsupportedModel
from hf_hetero.images.families import OWN_EXPERTS, mutual_of, why_blind
from hf_hetero.images.features import merging_part
from hf_hetero.images.reading import sight_of
from hf_hetero.images.sight import Sight
from hf_hetero.images.towers import TextRates, Towers, towers_of
from hf_hetero.manners.manner import Manner
from hf_hetero.model.classes.class_loss import ONE_CLASS
from hf_hetero.model.classes.labelled import NEXT, NOTHING, SEQUENCES, labelled_of
from hf_hetero.model.wrapped import base_model
from hf_hetero.samples.rows import PACKED_COLUMN
from hf_hetero.trainer.fitting import Fitted

logger = logging.getLogger(__name__)

PLANNED_INPUTS = frozenset(
    {"input_ids", "labels", "attention_mask", "position_ids", "label", "label_ids", PACKED_COLUMN}
)
"""What every batch of a causal language model has; of these, each plan makes its own."""


def collator_of(trainer: Trainer) -> Any:
    """Return a trainer's collator of ordinary batches; the default one would take rows of one length only."""
    collator: Any = trainer.data_collator
    if collator is default_data_collator:
        collator = PackedCollator(makes_labels=False, says_so=True)
    return of_classes(collator, trainer) if isinstance(collator, PackedCollator) else collator


def packer_of(collator: Any, processing_class: Any) -> PackedCollator:
    """Return what packs rows as a collator of the user's makes them."""
    if isinstance(collator, PackedCollator):
        return collator
    if type(collator) is DataCollatorWithPadding:  # transformers' choice where there is a tokenizer
        pad = getattr(processing_class, "pad_token_id", None)
        return PackedCollator(pad_token_id=pad if pad is not None else 0, makes_labels=False, says_so=True)
    # theirs keeps serving stock batches; here it makes the labels of one sample at a time
    return PackedCollator(example_collator=collator, makes_labels=False)


def fitting_packer(
    trainer: Trainer, hetero: HeteroConfig, packer: PackedCollator, manner: Manner, fitted: Fitted
) -> PackedCollator:
    """Return the same packer for this trainer's model as it was fitted, its manner, loss and columns."""
    trainer._set_signature_columns_if_needed()  # pyright: ignore[reportPrivateUsage]
    signature = frozenset(trainer._signature_columns or ())  # pyright: ignore[reportPrivateUsage]
    # no inputs of the model; but Trainer keeps what is listed here, in training and evaluation
    if added := {hetero.weight_column, hetero.source_column} - {None, *signature}:
        trainer._signature_columns = [*signature, *filter(None, added)]  # pyright: ignore[reportPrivateUsage]
    base = base_model(trainer.model)
    masks_first = getattr(trainer, "padding_free", False)  # TRL's collator does
    blind = why_blind(base) or (manner.whole and "its samples go whole, which was not tried with images")
    if not blind and fitted.sharding.is_sharded and base.config.model_type in OWN_EXPERTS:
        blind = "its experts of images are called where there are any, and ranks that share weights wait for each other"
    if not blind and mutual_of(base.config) is not None and not fitted.kernel.has_lse:
        blind = NO_LSE.format(fitted.kernel.name).rstrip(".")
    sight, inputs = None if blind else _sight_of(base), signature
    if sight is not None:  # a collator may make them of columns that are no inputs, as TRL's does of chats and images
        inputs |= frozenset(inspect.signature(base.forward).parameters)
    return replace(
        of_classes(packer, trainer),
        needs_labels=False,
        model_inputs=inputs - PLANNED_INPUTS,
        columns=signature if trainer.args.remove_unused_columns else None,
        keeps_labels_unshifted=bool(own_loss.owners(trainer)),
        limits=limits_of(base),
        # Trainer divides by all labels where it does not know that the model's loss shifts them: GPT-2, for one
        counts_first_label=not (getattr(trainer, "_loss_shifts_labels", True) or masks_first or manner.outside_loss),
        weight_column=hetero.weight_column,
        source_column=hetero.source_column,
        aligned=manner.aligned,
        sight=sight,
        blind=blind or "and, for this model, images",
        towers=None if sight is None else _towers_of(base, fitted),
    )


def _sight_of(base: Any) -> Sight | None:
    """Return how rows hold the images of a model that is not blind."""
    part: Any = merging_part(base)
    has_positions = hasattr(part, "get_rope_index")
    return sight_of(base, build(shrunk(base.config), "meta", type(part)) if has_positions else None)


def _towers_of(base: Any, fitted: Fitted) -> Towers | None:
    """Count what the towers of a model that is not blind compute; None where they are built in an unknown way."""
    if (flops := fitted.flops) is None:
        return None
    again = flops.in_layers if fitted.sharding.checkpointing else 0.0
    try:
        return towers_of(base, TextRates(flops.in_layers + flops.in_head, flops.a_token, again))
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        logger.warning("What towers of %s compute is in no plan: %r.", type(base).__name__, error)
        return None


def makes_tokens(trainer: Trainer, packer: PackedCollator) -> bool:
    """Return whether rows may come without tokens, which the user's collator makes of their text and images."""
    return packer.example_collator is not None and not why_blind(base_model(trainer.model))


def of_classes(packer: PackedCollator, trainer: Trainer) -> PackedCollator:
    """Return the same packer for labels as the trainer's model has them; one that knows them already, as it is.

    Raises:
        UnsupportedModel: a collator of the user's own, which knows tokens as labels.
    """
    base = base_model(trainer.model)
    kind = labelled_of(base)
    if kind in (NEXT, NOTHING) or getattr(trainer, "learns_scores", False):  # in a way of its own
        return packer
    config: Any = base.config
    problem, pad = config.problem_type if kind == SEQUENCES else ONE_CLASS, config.get_text_config().pad_token_id
    classes = Classes(kind, config.num_labels, problem, pad)
    if isinstance(packer, ClassCollator):
        return replace(packer, classes=classes)
    if type(packer) is not PackedCollator:
        raise UnsupportedModel(
            f"The data_collator {type(packer).__name__} takes labels for tokens, and {type(base).__name__} has "
            "classes. Make it a subclass of hf_hetero.collators.ClassCollator."
        )
    known: dict[str, Any] = {field.name: getattr(packer, field.name) for field in fields(packer)}
    return replace(ClassCollator(**known), makes_labels=False, says_so=False, classes=classes)


def columns_kept(trainer: Trainer) -> list[str] | None:
    """Return the columns of a stream, or keys of rows, that are used; None: all."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()  # pyright: ignore[reportPrivateUsage]
    return [*(trainer._signature_columns or []), PACKED_COLUMN]  # pyright: ignore[reportPrivateUsage]
