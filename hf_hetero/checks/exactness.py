"""Models and options under which a plan would change the learning are refused here, when a trainer is made.

Nothing here is approximated in silence. Each refusal says what was found, why it is not exact, and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss, ForTokenClassification

from hf_hetero.attention import rotary
from hf_hetero.checks import overrides, own_loss, router_loss
from hf_hetero.checks.additions import adapters, hooks, strangers
from hf_hetero.errors import ConfigError, UnsupportedModel
from hf_hetero.model.classes.labelled import NEXT, NOTHING, SEQUENCES, TOKENS, Labelled, labelled_of, pools_last_token
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks import mesh, sharding
from hf_hetero.state_layers.families import mixers_of

if TYPE_CHECKING:  # a trainer brings `datasets` and more, for which who only estimates would wait
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

# model types whose gradients are compared with a plain Trainer's in tests/end_to_end
TESTED_MODEL_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "granite", "olmo2", "phi3"}
    | {"deepseek_v3"}
    | {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bamba", "granitemoehybrid"}
    | {"falcon_h1", "nemotron_h", "zamba2", "mamba", "mamba2", "falcon_mamba", "jamba", "lfm2", "recurrent_gemma"}
    | {"minimax"}
)
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
STEPS_IN_BACKWARD = frozenset({"lomo", "adalomo"})
TOKEN_LAYER_TYPES = frozenset({"mlp", "moe"})
"""Layers that look at one token at a time."""
EXACT_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"}) | {
    "indexed_attention",  # these two for samples so short that nothing is left out (`collators.limits`)
    "minimax_m3_sparse",
}
KNOWN_MAKERS = frozenset({"torch", "transformers", "peft", "hf_hetero"})
"""Packages whose modules a model may be built of."""
SEES_TARGETS = (
    "it looks at tokens after its own, which it is to predict. Train a causal language model, or classes or embeddings "
    "by this one, or use plain Trainer."
)
LABELLED: tuple[Labelled, ...] = (NEXT, TOKENS, SEQUENCES)
"""What the labels of a model may be of, where its trainer does not say otherwise."""
PLAIN_LOSSES: Mapping[Labelled, Callable[..., Any]] = MappingProxyType(
    {NEXT: ForCausalLMLoss, SEQUENCES: ForSequenceClassificationLoss, TOKENS: ForTokenClassification}
)
STATE_LAYER_TYPES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})


def is_tested(model: PreTrainedModel) -> bool:
    """Return whether the model's architecture is compared with plain training in this package's tests."""
    return model.config.model_type in TESTED_MODEL_TYPES and type(model).__module__.startswith("transformers.models.")


def check_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that would not do what they say.

    Raises:
        ConfigError: a batch, or an accumulation, of less than one.
        UnsupportedModel: with every reason found.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(args, name)) < 1:
            raise ConfigError(f"{name}={value}: it must be at least 1.")
    _raise_all("These training arguments", _argument_problems(args))


def check_model(trainer: Trainer) -> None:
    """Refuse models and trainer options that are not exact.

    Raises:
        UnsupportedModel: with every reason found.
    """
    model: torch.nn.Module = trainer.model  # pyright: ignore[reportAssignmentType]
    scores = getattr(trainer, "learns_scores", False)
    problems = model_problems(model, (SEQUENCES,) if scores else getattr(trainer, "labelled", LABELLED))
    _raise_all(type(base_model(model)).__name__, [*problems, *_trainer_problems(trainer)])
    if dropouts := sorted({m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}):
        logger.warning(
            "The model has dropout (p = %s): its noise is drawn on each rank, so two plans see different noise of the "
            "same distribution.",
            ", ".join(map(str, dropouts)),
        )
    if drawing := adapters.noisy(model):
        logger.warning(
            "Adapter %s draws noise in each pass, on each rank, so two plans see different noise of the same "
            "distribution.",
            ", ".join(drawing),
        )


def check_num_ranks(expected: int | None, num_ranks: int) -> None:
    """Refuse to start with another number of ranks than the run was written for.

    Raises:
        ConfigError: with the usual cause.
    """
    if expected is not None and expected != num_ranks:
        raise ConfigError(
            f"This run was written for {expected} ranks (HeteroConfig.num_ranks) and has {num_ranks}. Start it with "
            "`accelerate launch --config_file ...` or `torchrun --nproc-per-node ...`, or change num_ranks."
        )


def _raise_all(what: str, problems: Iterator[str] | list[str]) -> None:
    # all at once, so that they are mended in one go
    if sentences := list(problems):
        raise UnsupportedModel(f"{what} cannot be trained exactly under changing plans: {' '.join(sentences)}")


def _argument_problems(args: TrainingArguments) -> Iterator[str]:
    """Yield, in words, why training arguments are refused: what would be learnt, or done, is not what they say."""
    accelerator = args.accelerator_config
    options: dict[str, Any] = accelerator if isinstance(accelerator, dict) else vars(accelerator or object)
    if not args.average_tokens_across_devices:
        yield "average_tokens_across_devices=False weighs ranks instead of tokens; leave it True."
    if args.label_smoothing_factor:
        yield f"label_smoothing_factor={args.label_smoothing_factor} shifts labels on its own; set it to 0."
    if args.neftune_noise_alpha is not None:
        yield f"neftune_noise_alpha={args.neftune_noise_alpha} scales noise by the batch's shape; unset it."
    if args.auto_find_batch_size:
        yield "auto_find_batch_size=True changes the global batch; the planner already fits memory, so unset it."
    if args.train_sampling_strategy not in ("random", "sequential"):
        yield f"train_sampling_strategy={args.train_sampling_strategy!r}: the planner balances lengths; use 'random'."
    if (optim := str(getattr(args.optim, "value", args.optim))).endswith("_layerwise") or optim in STEPS_IN_BACKWARD:
        yield f"optim={optim!r} steps inside backward, and a step has as many of these as its plan; use another one."
    yield from sharding.argument_problems(args)
    if args.ddp_static_graph:
        yield "ddp_static_graph=True: torch counts on one backward pass a step, and a plan has several; unset it."
    for name in ("split_batches", "dispatch_batches", "use_stateful_dataloader"):
        if options.get(name):
            yield f"accelerator_config.{name} does not apply to planned steps; unset it."
    # transformers itself leaves a 1 there
    if (options.get("gradient_accumulation_kwargs") or {}).get("num_steps") not in (None, 1):
        yield "accelerator_config.gradient_accumulation_kwargs.num_steps: set gradient_accumulation_steps instead."
    if args.n_gpu > 1:
        yield f"one process with {args.n_gpu} GPUs would use DataParallel; start one a GPU with accelerate launch."


def _trainer_problems(trainer: Trainer) -> Iterator[str]:
    """Yield, in words, why a trainer is refused for more than its model and its arguments."""
    yield from sharding.trainer_problems(trainer)
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        yield from mesh.mesh_problems(getattr(base_model(trainer.model).config, "distributed_config", None))
    yield from router_loss.trainer_problems(trainer, base_model(trainer.model))
    yield from overrides.trainer_problems(trainer, base_model(trainer.model))
    if labelled_of(base_model(trainer.model)) in (TOKENS, SEQUENCES):
        yield from _class_problems(trainer)
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        if parallel is not None and getattr(parallel, name, 1) > 1:
            yield f"{name}={getattr(parallel, name)} splits every sample the same way; leave it 1 and let the planner."
    # what Trainer takes from its arguments once, and a script may set later
    if trainer.label_smoother is not None:
        yield "trainer.label_smoother shifts labels on its own; set it to None."
    if trainer.neftune_noise_alpha is not None:
        yield f"trainer.neftune_noise_alpha={trainer.neftune_noise_alpha} scales noise by the batch's shape; unset it."
    if trainer.is_model_parallel:
        yield "device_map spreads the model over several devices; load it without."


def _class_problems(trainer: Any) -> Iterator[str]:
    """Yield, in words, why a trainer of classes is refused; one that learns scores in a way of its own is not."""
    if getattr(trainer, "learns_scores", False):
        return
    if what := own_loss.owners(trainer):
        yield (
            f"{what} would be given logits of tokens, of which some count; the loss of classes is this package's. "
            "Remove it; factors of rows, such as weights of their classes, go into HeteroConfig.weight_column."
        )
    if trainer.hetero.longer_samples == "split" and labelled_of(base_model(trainer.model)) == SEQUENCES:
        yield "HeteroConfig.longer_samples='split' would make several sequences of one that has one label."


def model_problems(model: torch.nn.Module, labelled: Sequence[Labelled] = LABELLED) -> Iterator[str]:
    """Yield, in words, why a model is refused.

    Args:
        model: in adapters or not.
        labelled: what its labels may be of.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        yield "it is not a transformers model."
        return
    config: Any = base.config
    yield from adapters.problems(model)
    yield from hooks.problems(model)
    yield from strangers.problems(model)
    # what writes text token by token, whatever its class is called: of text alone, or of images and text
    kind = labelled_of(base)
    if kind not in labelled or config.is_encoder_decoder:
        yield _unlearned(base, labelled)
        return
    if kind == SEQUENCES and not pools_last_token(base):
        yield _unlearned(base, (SEQUENCES,))
    config = config.get_text_config(decoder=True)
    if not getattr(config, "is_causal", True):
        yield "config.is_causal=False: only causal attention is supported."
    if has_unknown_states(base) and not is_stock(base):
        yield _unknown_states(getattr(config, "layer_types", None) or [])
    # a model that another trainer has fitted computes this package's loss
    plain = PLAIN_LOSSES.get(kind)
    if plain is not None and base.loss_function is not plain and "hf_hetero" not in base.loss_function.__module__:
        what = "the causal language model loss" if kind == NEXT else f"transformers' loss of labels of {kind}"
        yield f"its loss is {base.loss_function.__name__}, not {what}."
    for name in ATTENTION_DROPOUTS:
        if dropout := getattr(config, name, 0.0):
            # its layers have read the config already
            yield f"{name}={dropout} draws another mask for every layout; load it by from_pretrained(..., {name}=0.0)."
    yield from router_loss.problems(base)
    if factor := getattr(base, "z_loss_coefficient", 0.0):  # Bamba's
        yield (
            f"z_loss_coefficient={factor} adds a mean over a micro-batch's tokens, of which a step may have several; "
            "load it by from_pretrained(..., z_loss_coefficient=0.0)."
        )


def sharing_problems(base: PreTrainedModel) -> Iterator[str]:
    """Yield, in words, why ranks cannot share a sample of a model, so that each must go over whole ones.

    Args:
        base: of transformers.
    """
    kinds: list[str] = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or []
    if has_unknown_states(base) and is_stock(base):
        yield _unknown_states(kinds)
    if other := sorted(set(kinds) - EXACT_LAYER_TYPES - TOKEN_LAYER_TYPES - STATE_LAYER_TYPES):
        known = " and ".join(sorted(EXACT_LAYER_TYPES))
        yield f"layers of type {', '.join(other)} are not known to be exact; {known} are."
    yield from rotary.problems(base)


def has_unknown_states(base: PreTrainedModel) -> bool:
    """Return whether layers carry state along a sample in a way that is not known."""
    kinds: list[str] = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or []
    return sum(1 for _ in mixers_of(base)) < sum(kind in STATE_LAYER_TYPES for kind in kinds)


def _unknown_states(kinds: list[str]) -> str:
    with_state = sorted(set(kinds) & STATE_LAYER_TYPES)
    return f"layers of type {', '.join(with_state)} carry state along a sample that ranks would have to pass on."


def is_stock(base: PreTrainedModel) -> bool:
    """Return whether a model is built of transformers' parts, as the tiny instance that is tried will be."""
    return all(type(module).__module__.split(".")[0] in KNOWN_MAKERS for module in base.modules())


def _unlearned(base: PreTrainedModel, labelled: Sequence[Labelled]) -> str:
    """Say that a model is of no kind that a trainer learns."""
    name = type(base).__name__
    if NOTHING in labelled:
        return f"{name} has a head, and embeddings are what comes before it: load it by AutoModel.from_pretrained(...)."
    if labelled != (SEQUENCES,) and (SEQUENCES not in labelled or labelled_of(base) not in (SEQUENCES, TOKENS)):
        return f"only decoder-only language models are supported, and {name} is none."
    return f"{name} does not score sequences as AutoModelForSequenceClassification of decoders does, by the last token."
