"""The probe asks whether a model learns the same under a plan: it tries a tiny instance, from its config alone.

No weights are loaded and no GPU is needed (`tiny`). One packed forward and backward pass through this package's
attention is compared with each sample alone through stock attention. Random numbers and whatever else the process
shares are left as they were.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from hf_hetero.attention import interface, rotary
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.handing_down import HandedDown
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.checks import exactness
from hf_hetero.checks.in_double import in_double
from hf_hetero.checks.tiny import LENGTHS, build, num_numbers, shrunk, undisturbed
from hf_hetero.collators.limits import padding_of
from hf_hetero.collators.packed import MARKS_OF_TEXT
from hf_hetero.collators.sample import Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.errors import HeteroError, UnsupportedModel
from hf_hetero.layout import contiguous
from hf_hetero.model.classes.labelled import NEXT, NOTHING, SEQUENCES, TOKENS, labelled_of
from hf_hetero.model.loss import shift_labels, token_loss, token_scores
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.state_layers.planned import StateLayers

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of differences, relative: rounding gives 1e-6 and 1e-14, a sample that sees another 1e-2 and more."""
NO_INTERFACE = "it does not use transformers' attention interface, so samples cannot be shared among ranks."
DIFFERS = "a tiny instance learns differently"
MOST_NUMBERS = 80_000_000  # weights and buffers that a tiny instance may have


@dataclass(frozen=True, slots=True)
class Probe:
    """A `Probe` says what the tiny instance did.

    Args:
        num_layers: layers that have attention or count as such.
        reached: layers that the attention function was called for, under a plan.
        loss_error, gradient_error: largest difference from stock attention, relative to the largest value.
        problem: what it does under a plan that plain training does not, in words; empty if nothing.
        failure: why it could not be tried, in words; empty if it could.
    """

    num_layers: int = 0
    reached: int = 0
    loss_error: float = 0.0
    gradient_error: float = 0.0
    problem: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Return whether every layer was reached, and nothing differs by more than rounding."""
        return not self.failure and not self.problem


def tried(config: PretrainedConfig, architecture: type[PreTrainedModel] | None = None) -> Probe:
    """Try a tiny instance of a config; return what it does, or why there is none.

    Args:
        config: of transformers; stays as it is.
        architecture: as for `build`.
    """
    try:
        small = shrunk(config)
        # counted without weights first: a size that `shrunk` does not know may be as large as ever
        if (numbers := num_numbers(build(small, "meta", architecture))) > MOST_NUMBERS:
            return Probe(failure=f"an instance that should be tiny would still have {numbers:,} weights")
        model = build(small, "cpu", architecture)
    except Exception as error:
        return Probe(failure=f"a tiny instance cannot be built: {_said(error)}")
    return probe(model)


def check_untested(model: PreTrainedModel, control: dist.ProcessGroup | None) -> None:
    """Try a tiny instance of an architecture that is not among the tested ones. A collective of all ranks.

    Args:
        model: of transformers; its config and its class are read.
        control: carries what rank 0 saw to the others; None for a single process.

    Raises:
        UnsupportedModel: with what the tiny instance does under a plan; on every rank.
    """
    name, kind = type(model).__name__, model.config.model_type
    # tried on rank 0 for all: ranks that came to other ends, by a machine's rounding, would not all go on
    trial = broadcast(lambda: tried(model.config, type(model)), control)
    # what says that it does not use the interface may be wrong about that, but only a trial can tell
    unproved = trial.failure and not model._supports_attention_backend  # pyright: ignore[reportPrivateUsage]
    if problem := trial.problem or (NO_INTERFACE if unproved else ""):
        raise UnsupportedModel(f"{name} cannot be trained exactly under changing plans: {problem}")
    if trial.failure:
        logger.warning(
            "%s (model type %r) is not among those tested for exact gradients (%s), and could not be tried: %s.",
            name,
            kind,
            ", ".join(sorted(exactness.TESTED_MODEL_TYPES)),
            trial.failure,
        )
    else:
        logger.info("%s (model type %r): a tiny instance learns the same under a plan.", name, kind)


def probe(model: Any) -> Probe:
    """Compare one packed pass under a plan with each sample alone.

    Both in evaluation mode, so that dropout outside of attention, which is allowed, does not hide other differences;
    then one forward pass in training mode, for what is refused only there.
    """
    with undisturbed():
        attention = model.config._attn_implementation
        found = _probe(model.float())
        if not found.problem.startswith(DIFFERS):
            return found
        # a model may be so steep that fp32 rounds by more than the tolerance: fp64 tells that from an error
        model.set_attn_implementation(attention)
        with in_double(model):
            return _probe(model)


def _probe(model: Any) -> Probe:
    """Compare as `probe`; what the process shares is the caller's to restore."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    # none of the first three numbers, which tiny configs have for padding, begin and end
    ids = [torch.randint(min(3, vocab - 1), vocab, (length,), generator=generator) for length in LENGTHS]
    num_targets = sum(length - 1 for length in LENGTHS)
    model = model.eval()
    losses: list[str] = []

    def counted_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append("")
        return token_loss(*args, **kwargs)

    kind = labelled_of(model)
    model.loss_function = token_scores if kind == SEQUENCES else counted_loss
    layers: set[int] = set()
    try:
        with _watched(model, layers):
            expected = _pass(model, [_alone(sample, num_targets) for sample in ids])
    except Exception as error:
        return Probe(failure=f"a tiny instance fails with stock attention, too: {_said(error)}")
    if kind == NEXT and len(losses) != len(ids):
        return Probe(
            problem="its forward computes a cross-entropy of its own instead of calling its loss_function, so targets "
            "of packed samples, counted over all ranks, do not reach it."
        )
    if not all(bool(x.isfinite().all()) for x in expected.values()):
        return Probe(failure="the loss or a gradient of a tiny instance is not finite with stock attention")
    context = _context()
    padding = padding_of(model)
    inputs = pack_spans(context.layout.spans[0], [Sample(sample, sample, padding=padding) for sample in ids])
    marks = {name: torch.zeros_like(inputs["input_ids"]) for name in MARKS_OF_TEXT & _named_inputs(model)}
    batch = {**inputs, **marks, "hetero": context, "num_items_in_batch": num_targets}
    interface.register()
    hooks = HandedDown(model), rotary.TablesBySample(model)
    try:
        model.set_attn_implementation(interface.ATTENTION_NAME)
        with StateLayers(model).planned(context):
            planned = _pass(model, [batch])
            with torch.no_grad():
                _loss(model.train(), batch)
    except HeteroError as error:
        return Probe(problem=str(error))
    except Exception as error:
        if not context.reached and not model._supports_attention_backend:
            return Probe(problem=NO_INTERFACE)
        return Probe(problem=f"a tiny instance fails under a plan, and not with stock attention: {_said(error)}")
    finally:
        for hook in hooks:
            hook.remove()
    if kind == NEXT and context.looked_ahead:
        return Probe(problem=exactness.SEES_TARGETS)
    kinds: list[str] = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    layers -= {number for number, kind in enumerate(kinds) if kind in exactness.TOKEN_LAYER_TYPES}
    return _judged(layers, context.reached, planned, expected)


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
    layers: set[int], reached: set[int], planned: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> Probe:
    """Say in words what differs, the cause before its effects: layers, then missing gradients, then their values."""
    loss_error, gradient_error = _errors(planned, expected)
    problem = ""
    if not reached:
        problem = NO_INTERFACE
    elif layers - reached:
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
    return Probe(len(layers), len(reached), loss_error, gradient_error, problem)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _alone(sample: torch.Tensor, num_targets: int) -> dict[str, Any]:
    row = sample.unsqueeze(0)
    shifted = shift_labels(sample).unsqueeze(0)
    return {"input_ids": row, "labels": row, "shift_labels": shifted, "num_items_in_batch": num_targets}


def _pass(model: Any, batches: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the loss, under "", and the gradients, by name, of all batches together."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = _loss(model, batch)
        loss.backward()
        total = total + loss.detach()
    return {"": total, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def _loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Compute the loss of a batch; of another model than of tokens a sum over what it says of each, by factors."""
    if (kind := labelled_of(model)) == NEXT:
        return model(**batch, use_cache=False).loss
    inputs = {name: values for name, values in batch.items() if name not in ("labels", "shift_labels")}
    if kind == SEQUENCES:  # by which it calls its loss, which gives these logits
        inputs["labels"] = torch.zeros_like(batch["labels"])
    outputs = model(**inputs, use_cache=False)
    names = {SEQUENCES: "loss", TOKENS: "logits", NOTHING: "last_hidden_state"}
    logits = outputs[names[kind]].reshape(batch["labels"].numel(), -1)
    classes = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    factors = torch.cos(batch["labels"].reshape(-1, 1) * classes)
    return (logits * factors.to(logits)).sum() / batch["num_items_in_batch"]


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
