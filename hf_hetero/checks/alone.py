"""What a tiny instance learns of each sample alone, by its own code and loss: what a plan is held to.

The loss of a step is a sum over its tokens, divided once by its targets. A model that hands such a divisor to its
`loss_function` is asked so. One with a loss of its own takes the mean of what it is given, of each token's own label or
of the next token's; which, is found by comparing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.manners.manner import Manner
from hf_hetero.manners.outside_loss import keywords_of
from hf_hetero.model.classes.labelled import NEXT, NOTHING, SEQUENCES, TOKENS, labelled_of
from hf_hetero.model.loss import IGNORE_INDEX, num_targets, shift_labels, token_loss, token_scores

OWN_LOSS = (
    "its forward computes a loss of its own instead of calling its loss_function, and that is no plain cross-entropy: "
    "targets of packed samples, counted over all ranks, do not reach it."
)
CLOSE = 1e-5
"""Of losses, relative; fp32 rounds by less, labels of other tokens change more."""


@dataclass(frozen=True, slots=True)
class Alone:
    """An `Alone` is what samples teach, each alone, divided by the targets of all.

    Args:
        values: the loss, under "", and the gradients, by name.
        manner: what of its manner the loss tells.
        num_targets: of all samples.
    """

    values: dict[str, torch.Tensor]
    manner: Manner
    num_targets: int


def learnt_alone(model: Any, samples: Sequence[torch.Tensor]) -> Alone | None:
    """Return what samples teach a model, each alone; None where its own loss is no plain cross-entropy.

    Args:
        model: of transformers, in evaluation mode.
        samples: tokens, each of shape (num_tokens,); all are learned.
    """
    kind = labelled_of(model)
    if kind == SEQUENCES:
        model.loss_function = token_scores
    manner = _manner_of(model, max(samples, key=len)) if kind == NEXT else Manner()
    if manner is None:
        return None
    targets = [sample if manner.aligned else shift_labels(sample) for sample in samples]
    total = sum(map(num_targets, targets))
    passes: list[tuple[dict[str, Any], float]] = []
    for sample, of_sample in zip(samples, targets, strict=True):
        row = {"input_ids": sample.unsqueeze(0), "labels": sample.unsqueeze(0)}
        if not manner.outside_loss:
            passes.append(({**row, "shift_labels": of_sample.unsqueeze(0), "num_items_in_batch": total}, 1.0))
        elif num_targets(of_sample):  # the mean of nothing is none
            passes.append((row, num_targets(of_sample) / total))
    return Alone(learnt(model, passes), manner, total)


def learnt(model: Any, passes: Sequence[tuple[dict[str, Any], float]]) -> dict[str, torch.Tensor]:
    """Return the loss, under "", and the gradients, by name, of all passes together.

    Args:
        model: of transformers.
        passes: inputs, and what their loss is multiplied by.
    """
    model.zero_grad()
    total = torch.zeros(())
    for inputs, factor in passes:
        loss = loss_of(model, inputs) * factor
        loss.backward()
        total = total + loss.detach()
    return {"": total, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Compute a model's loss; of one that predicts no tokens a sum over what it says of each, by factors."""
    if (kind := labelled_of(model)) == NEXT:
        return called(model, inputs).loss
    others = {name: values for name, values in inputs.items() if name not in ("labels", "shift_labels")}
    if kind == SEQUENCES:  # by which it calls its loss, which gives these logits
        others["labels"] = torch.zeros_like(inputs["labels"])
    outputs = called(model, others)
    names = {SEQUENCES: "loss", TOKENS: "logits", NOTHING: "last_hidden_state"}
    logits = outputs[names[kind]].reshape(inputs["labels"].numel(), -1)
    classes = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    factors = torch.cos(inputs["labels"].reshape(-1, 1) * classes)
    return (logits * factors.to(logits)).sum() / inputs["num_items_in_batch"]


def called(model: Any, inputs: dict[str, Any]) -> Any:
    """Return a model's outputs, of a call without a cache."""
    known = keywords_of(model)
    return model(**inputs, **({"use_cache": False} if known is None or "use_cache" in known else {}))


def _manner_of(model: Any, sample: torch.Tensor) -> Manner | None:
    """Find how a model computes its loss; None where that is no plain cross-entropy."""
    num_calls = 0

    def counted_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return token_loss(*args, **kwargs)

    model.loss_function = counted_loss
    labels = sample.roll(3).clone()
    labels[2] = IGNORE_INDEX
    with torch.no_grad():
        found = called(model, {"input_ids": sample.unsqueeze(0), "labels": labels.unsqueeze(0)})
    if num_calls and keywords_of(model) is None:
        return Manner()
    logits = getattr(found, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:2] != (1, len(sample)):
        return None
    for aligned in (False, True):
        plain = F.cross_entropy(logits[0], labels if aligned else shift_labels(labels))
        if abs(float(found.loss - plain)) <= CLOSE * abs(float(plain)):
            return Manner(outside_loss=True, aligned=aligned)
    return None
