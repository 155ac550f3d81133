"""The probe asks whether a model learns the same under a plan: it tries a tiny instance, from its config alone.

No weights are loaded and no GPU is needed (`tiny`). One packed forward and backward pass through this package's
attention is compared with each sample alone through stock attention. Random numbers and whatever else the process
shares are left as they were.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from hf_hetero.attention import interface, rotary
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.handing_down import HandedDown
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.checks import exactness, router_loss
from hf_hetero.checks.alone import OWN_LOSS, learnt, learnt_alone, loss_of
from hf_hetero.checks.in_double import in_double
from hf_hetero.checks.tiny import LENGTHS, build, num_numbers, shrunk, text_of
from hf_hetero.checks.undisturbed import undisturbed
from hf_hetero.collators.limits import padding_of
from hf_hetero.collators.packed import MARKS_OF_TEXT
from hf_hetero.collators.sample import Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.errors import HeteroError, UnsupportedModel
from hf_hetero.images.mutual import CausalLayers
from hf_hetero.layout import contiguous
from hf_hetero.manners.manner import Manner
from hf_hetero.manners.outside_loss import OutsideLoss, keywords_of
from hf_hetero.manners.positions import PositionsBySample
from hf_hetero.manners.whole_samples import WholeSamples
from hf_hetero.model.classes.labelled import NEXT, labelled_of
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.state_layers.planned import StateLayers

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of differences, relative: rounding gives 1e-6 and 1e-14, a sample that sees another 1e-2 and more."""
NO_INTERFACE = "it does not use transformers' attention interface, so samples cannot be shared among ranks."
NO_KEYWORDS = "its forward takes no keyword arguments, so the loss cannot be divided by the step's tokens."
DIFFERS = "a tiny instance learns differently"
MOST_NUMBERS = 80_000_000  # weights and buffers that a tiny instance may have


OTHER_LOSS = (
    "its forward computes a loss of its own instead of calling its loss_function. Of transformers' own classes that is "
    "known to be a plain cross-entropy, of others it is not. Call self.loss_function(logits, labels, **kwargs)."
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A `Probe` says what the tiny instance did.

    Args:
        num_layers: layers that have attention or count as such.
        reached: layers that the attention function was called for, under a plan.
        loss_error, gradient_error: largest difference from stock attention, relative to the largest value.
        problem: what it does under a plan that plain training does not, in words; empty if nothing.
        failure: why it could not be tried, in words; empty if it could.
        manner: how it is trained.
    """

    num_layers: int = 0
    reached: int = 0
    loss_error: float = 0.0
    gradient_error: float = 0.0
    problem: str = ""
    failure: str = ""
    manner: Manner = field(default_factory=Manner)

    @property
    def ok(self) -> bool:
        """Return whether every layer was reached, and nothing differs by more than rounding."""
        return not self.failure and not self.problem


def tried(config: PretrainedConfig, architecture: type[PreTrainedModel] | None = None, cause: str = "") -> Probe:
    """Try a tiny instance of a config; return what it does, or why there is none.

    Args:
        config: of transformers; stays as it is.
        architecture: as for `build`.
        cause: as for `probe`.
    """
    try:
        small = shrunk(config)
        # counted without weights first: a size that `shrunk` does not know may be as large as ever
        if (numbers := num_numbers(build(small, "meta", architecture))) > MOST_NUMBERS:
            return Probe(failure=f"an instance that should be tiny would still have {numbers:,} weights")
        model = build(small, "cpu", architecture)
        if router_loss.is_wanted(model):  # a statistic of all tokens, which no sample alone has
            text_of(model.config).output_router_logits = False
    except Exception as error:
        return Probe(failure=f"a tiny instance cannot be built: {_said(error)}")
    return probe(model, cause)


def needs_trial(model: PreTrainedModel) -> bool:
    """Return whether a tiny instance of a model must be tried before it is trained."""
    return not exactness.is_tested(model) or any(exactness.sharing_problems(model))


def check_untested(model: PreTrainedModel, control: dist.ProcessGroup | None) -> Manner:
    """Try a tiny instance of an architecture that is not among the tested ones. A collective of all ranks.

    Args:
        model: of transformers; its config and its class are read.
        control: carries what rank 0 saw to the others; None for a single process.

    Returns:
        How it is trained.

    Raises:
        UnsupportedModel: with what the tiny instance does under a plan; on every rank.
    """
    name, kind, cause = type(model).__name__, model.config.model_type, " ".join(exactness.sharing_problems(model))
    # tried on rank 0 for all: ranks that came to other ends, by a machine's rounding, would not all go on
    trial = broadcast(lambda: tried(model.config, type(model), cause), control)
    # what says that it does not use the interface may be wrong about that, but only a trial can tell
    unproved = NO_INTERFACE if not model._supports_attention_backend else cause  # pyright: ignore[reportPrivateUsage]
    if keywords_of(model) is not None:
        unproved = unproved or NO_KEYWORDS
    # what somebody's own class adds to a plain cross-entropy, a tiny instance might not show
    foreign = OTHER_LOSS if trial.manner.outside_loss and not exactness.is_stock(model) else ""
    if problem := trial.problem or foreign or (unproved if trial.failure else ""):
        raise UnsupportedModel(f"{name} cannot be trained exactly under changing plans: {problem}")
    if trial.failure:
        logger.warning(
            "%s (model type %r) is not among those tested for exact gradients (%s), and could not be tried: %s.",
            name,
            kind,
            ", ".join(sorted(exactness.TESTED_MODEL_TYPES)),
            trial.failure,
        )
    elif trial.manner.whole:
        logger.warning(
            "%s (model type %r): ranks cannot share its samples, so each goes over whole ones, and HeteroConfig."
            "max_degree is 1 unless it is set. For %s",
            name,
            kind,
            trial.manner.whole,
        )
    else:
        logger.info("%s (model type %r): a tiny instance learns the same under a plan.", name, kind)
    return trial.manner


def probe(model: Any, cause: str = "") -> Probe:
    """Compare one packed pass under a plan with each sample alone.

    Both in evaluation mode, so that dropout outside of attention, which is allowed, does not hide other differences;
    then one forward pass in training mode, for what is refused only there. What does not learn the same where ranks
    can share samples is tried with each rank going over whole ones.

    Args:
        model: a tiny instance.
        cause: why ranks cannot share samples, if that is known; then it is not tried.
    """
    attention = model.config._attn_implementation
    with undisturbed():
        found = Probe(problem=cause) if cause else _precisely(model, attention, "")
        if not found.problem or found.problem == OWN_LOSS:
            return found
        whole = _precisely(model, attention, found.problem)
        return whole if whole.ok or (cause and whole.failure) else found


def _precisely(model: Any, attention: str, cause: str) -> Probe:
    """Compare in fp32, and again in fp64 where that differs."""
    model.set_attn_implementation(attention)
    found = _probe(model.float(), cause)
    if not found.problem.startswith(DIFFERS):
        return found
    # a model may be so steep that fp32 rounds by more than the tolerance: fp64 tells that from an error
    model.set_attn_implementation(attention)
    with in_double(model):
        return _probe(model, cause)


def _probe(model: Any, cause: str) -> Probe:
    """Compare as `probe`; what the process shares is the caller's to restore."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    # none of the first three numbers, which tiny configs have for padding, begin and end
    ids = [torch.randint(min(3, vocab - 1), vocab, (length,), generator=generator) for length in LENGTHS]
    model = model.eval()
    layers: set[int] = set()
    try:
        with _watched(model, layers):
            alone = learnt_alone(model, ids)
    except Exception as error:
        return Probe(failure=f"a tiny instance fails with stock attention, too: {_said(error)}")
    if alone is None:
        return Probe(problem=OWN_LOSS)
    if not all(bool(x.isfinite().all()) for x in alone.values.values()):
        return Probe(failure="the loss or a gradient of a tiny instance is not finite with stock attention")
    manner, context = replace(alone.manner, whole=cause), _context()
    padding = padding_of(model)
    pack = [Sample(sample, sample, padding=padding, aligned=manner.aligned) for sample in ids]
    inputs = pack_spans(context.layout.spans[0], pack)
    marks = {name: torch.zeros_like(inputs["input_ids"]) for name in MARKS_OF_TEXT & _named_inputs(model)}
    batch = {**inputs, **marks, "hetero": context, "num_items_in_batch": alone.num_targets}
    try:
        with ExitStack() as undone:
            undone.enter_context(_fitted(model, manner, undone).planned(context))
            planned = learnt(model, [(batch, 1.0)])
            with torch.no_grad():
                loss_of(model.train(), batch)
    except HeteroError as error:
        return Probe(problem=str(error))
    except Exception as error:
        if not context.reached and not model._supports_attention_backend:
            return Probe(problem=NO_INTERFACE)
        return Probe(problem=f"a tiny instance fails under a plan, and not with stock attention: {_said(error)}")
    if labelled_of(model) == NEXT and context.looked_ahead:
        return Probe(problem=exactness.SEES_TARGETS)
    kinds: list[str] = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    layers -= {number for number, kind in enumerate(kinds) if kind in exactness.TOKEN_LAYER_TYPES}
    return _judged(layers, context.reached, planned, alone.values, manner)


def _fitted(model: Any, manner: Manner, undone: ExitStack) -> StateLayers | WholeSamples:
    """Fit a tiny instance for a plan, as `trainer.fitting` does; return what goes over samples."""
    if manner.outside_loss:
        undone.callback(OutsideLoss(model, model, manner.aligned).remove)
    if manner.whole:
        return WholeSamples(model)
    interface.register()
    for hooks in (HandedDown(model), rotary.TablesBySample(model), CausalLayers(model), PositionsBySample(model)):
        undone.callback(hooks.remove)
    model.set_attn_implementation(interface.ATTENTION_NAME)
    return StateLayers(model)


def _named_inputs(model: Any) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


@contextmanager
def _watched(model: torch.nn.Module, layers: set[int]) -> Iterator[None]:
    """Note the numbers of layers that compute meanwhile: a tower that sees images has layers of its own."""

    def note(module: torch.nn.Module, args: Any) -> None:
        layers.add(cast("Any", module).layer_idx)

    numbered = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    hooks = [module.register_forward_pre_hook(note) for module in numbered]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _context() -> AttentionContext:
    """Make the context of one rank that holds all samples: packing is tried, ranks are not needed for it."""
    layout = contiguous(list(LENGTHS), 1)
    return AttentionContext(layout, (0,), 0, None, "ulysses", CPU, torch.device("cpu"))


def _judged(
    layers: set[int],
    reached: set[int],
    planned: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    manner: Manner,
) -> Probe:
    """Say in words what differs, the cause before its effects: layers, then missing gradients, then their values."""
    loss_error, gradient_error = _errors(planned, expected)
    problem = ""
    if not reached:
        problem = NO_INTERFACE
    elif layers - reached and not manner.whole:
        missing = ", ".join(map(str, sorted(layers - reached)))
        problem = (
            f"under a plan {len(reached)} of {len(layers)} layers of a tiny instance call transformers' attention "
            f"interface (not: {missing}); the others would not learn which ranks share their tokens."
        )
    elif without := sorted(expected.keys() - planned.keys()):
        problem = (
            f"under a plan {len(without)} weights of a tiny instance get no gradient, {without[0]} for one: its "
            "attention depends on them in a way of its own, such as a learned mask."
        )
    elif not max(loss_error, gradient_error) <= TOLERANCE[expected[""].dtype]:  # so that nan is no pass
        problem = (
            f"{DIFFERS} when samples are packed: the loss differs by {loss_error:.0e}, "
            f"gradients by {gradient_error:.0e} of the largest value. Something other than attention mixes samples, "
            "or positions are not taken from position_ids."
        )
    return Probe(len(layers), len(reached), loss_error, gradient_error, problem, manner=manner)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _errors(planned: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the largest difference of loss and of gradients, relative to the largest value of the same tensor."""
    largest = max((float(x.abs().max()) for name, x in expected.items() if name), default=0.0)
    errors = {"": 0.0}
    for name in expected.keys() & planned.keys():
        x, y = planned[name], expected[name]
        # a gradient that is zero but for rounding is measured by the others
        scale = max(float(y.abs().max()), 1e-3 * largest if name else 0.0, 1e-30)
        errors[name] = float((x - y).abs().max()) / scale if bool(x.isfinite().all()) else float("inf")
    return errors.pop(""), max(errors.values(), default=0.0)
