"""Methods of `Trainer` that a subclass brings of its own are honoured exactly, or refused by name.

The method resolution order is asked, not a list of names. Whatever is neither transformers', TRL's `SFTTrainer`, nor
this package's with the trainer that it is made for, is somebody's own:

    compute_loss, _prepare_inputs, compute_loss_func    tried on two tiny samples, together and each alone: taken if
                                                        the loss of both is the sum, so that no plan can change it
    training_step                                       taken if it calls Trainer's with the batch that it was given
    _get_train_sampler                                  decides the order
    prediction_step, evaluation_loop, ...               evaluation is Trainer's own, without plans
    loops and loaders of training                       refused: they expect batches that no plan has made
    any of these in another trainer of TRL              refused: it compares or generates samples
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from hf_hetero.errors import UnsupportedModel

PLANNED = {name: f"Hetero{name}" for name in ("CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "RewardTrainer")}
"""Trainers of TRL that a class of this package plans, with a loss of its own in the place of theirs."""
SFT = "trl.trainer.sft_trainer"
KNOWN_MODULES = frozenset({"transformers.trainer", SFT, "trl.trainer.base_trainer"})
LOSS = ("compute_loss", "_prepare_inputs")
"""What stands between a batch and its loss."""
LOOPS = (
    "get_train_dataloader",
    "get_batch_samples",
    "_get_num_items_in_batch",
    "_inner_training_loop",
    "_run_epoch",
)
LOADING = ("_get_dataloader", "_get_collator_with_removed_columns")
"""What makes the batches of a loader, in training and in evaluation."""
EVALUATION = (
    "prediction_step",
    "evaluation_loop",
    "get_eval_dataloader",
    "get_test_dataloader",
    "_get_eval_sampler",
    "_get_dataloader",
)


def own(trainer: Any, names: Iterable[str]) -> dict[str, str]:
    """Return those of some methods that are somebody's own, each with the name of the class that has it.

    Args:
        trainer: an instance, whose attributes count, too; or its class.
    """
    kind = trainer if isinstance(trainer, type) else type(trainer)
    classes = _of_others(kind)
    owners: dict[str, str] = {}
    for name in names:
        owner = next((base.__name__ for base in classes if name in vars(base)), None)
        if not isinstance(trainer, type) and name in vars(trainer):
            owner = f"this {kind.__name__}"
        if owner is not None:
            owners[name] = owner
    return owners


def check(trainer_class: type) -> None:
    """Refuse what can be told from the class alone.

    Raises:
        UnsupportedModel: with the class and the method.
    """
    # SFTTrainer's loss is a sum over tokens; TRL's other trainers compare or generate samples in these methods
    theirs = [base for base in _of_others(trainer_class) if base.__module__.split(".")[0] == "trl"]
    for base in theirs:
        if name := next((name for name in (*LOSS, "training_step", *LOOPS) if name in vars(base)), None):
            ours = PLANNED.get(base.__name__)
            remedy = "Use it without HeteroTrainerMixin." if ours is None else f"Use hf_hetero.{ours}, which plans it."
            raise UnsupportedModel(
                f"{theirs[0].__name__} compares or generates samples, which cannot be shared out one by one: "
                f"{base.__name__}.{name} is no sum over tokens, as SFTTrainer's loss is. {remedy}"
            )
    for name, owner in own(trainer_class, LOOPS).items():
        raise UnsupportedModel(
            f"{owner}.{name} is its own, and planned steps are drawn by this package's: a DataLoader of other batches "
            "would not be planned. Remove it (an order goes into _get_train_sampler, tensors into data_collator), or "
            "use plain Trainer."
        )
    for name, owner in own(trainer_class, ("training_step",)).items():
        # each class of the chain: one that does not go on to the next cuts off Trainer's, whoever else calls it
        for base in trainer_class.__mro__:
            if name in vars(base) and base in _of_others(trainer_class) and not calls(vars(base)[name], name):
                raise UnsupportedModel(
                    f"{owner}.{name} does not call super().{name}: it compares or generates samples, or learns in a "
                    "way of its own, which cannot be shared out sample by sample. Use it with plain Trainer."
                )


def trainer_problems(trainer: Any, base: Any) -> Iterator[str]:
    """Give the reason to refuse a model whose loss `SFTTrainer` cannot compute, in words.

    Args:
        trainer: of any kind.
        base: the transformers model.
    """
    losses = (kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    owner = next(kind for kind in losses if kind.__module__.split(".")[0] != "hf_hetero")
    # TRL's asks the part of the model before its output embedding, which transformers finds by `base_model_prefix`
    if owner.__module__ == SFT and base.base_model is base:
        yield (
            f"TRL's SFTTrainer, plain too, computes the loss from what comes before the output embedding, and finds no "
            f"such part of {type(base).__name__}: it has no {base.base_model_prefix!r} (base_model_prefix). Use "
            "HeteroTrainer, on rows of input_ids and labels."
        )


def check_loading(trainer: Any) -> None:
    """Refuse to train by a loader of a subclass's own, which is only known once there is something to train.

    Raises:
        UnsupportedModel: with the class and the method.
    """
    for name, owner in own(trainer, LOADING).items():
        raise UnsupportedModel(
            f"{owner}.{name} is its own, and planned steps are not drawn from the loader that it makes. Remove it for "
            "training (an order goes into _get_train_sampler, tensors into data_collator), or use plain Trainer."
        )


def calls(function: Any, name: str) -> bool:
    """Return whether a function's code names a method anywhere, as `super().name(...)` does."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return isinstance(code, CodeType) and any(name in part.co_names for part in _parts(code))


def _parts(code: CodeType) -> list[CodeType]:
    """Return a function's code, and that of all functions within it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *(part for one in inner for part in _parts(one))]


def _of_others(kind: type) -> list[type]:
    """Return those classes of a trainer that are neither known, nor what a class of this package is made for."""
    served = {above for base in kind.__mro__ if _is_ours(base) for above in base.__bases__}
    return [base for base in kind.__mro__ if not (_is_ours(base) or base in served or _is_known(base))]


def _is_known(base: type) -> bool:
    return base.__module__ in KNOWN_MODULES or base is object


def _is_ours(base: type) -> bool:
    return base.__module__.split(".")[0] == "hf_hetero"
