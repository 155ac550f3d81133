"""This module lays the spans that a rank holds one after the other, as inputs of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from hf_hetero.attention.context import planned_mask
from hf_hetero.collators.sample import Sample
from hf_hetero.errors import BadSample
from hf_hetero.layout import Span
from hf_hetero.model.loss import IGNORE_INDEX


def pack_spans(
    spans: Sequence[Span], samples: Sequence[Sample | None], unshifted: bool = False
) -> dict[str, torch.Tensor]:
    """Make the model inputs of one rank: its spans, one after the other. Shapes (1, num_tokens).

    Positions are of shape (3, 1, num_tokens) where those of a sample have three parts.

    Positions count within each sample, unless its row gives others. The loss reads `shift_labels`, what each token has
    to predict, since the next token may lie elsewhere; `labels` are each token's own. A rank without tokens runs one
    token that has no target and that attention leaves out: its gradient is zero, and the rank joins every collective.

    A loss that shifts `labels` itself compares those of tokens 1, 2, ... with the logits of tokens 0, 1, ... So for
    one, `labels` are the targets, one place later, and a token that stands in at the end makes room for the last:
    whatever spans the rank holds, the loss compares each token with its target, and no token with another sample's.

    Args:
        spans: of one rank, in memory order.
        samples: of the pack; None where this rank holds nothing of them.
        unshifted: for a loss that shifts labels itself.
    """
    parts = [(sample_of(samples, span), slice(span.start, span.end)) for span in spans]
    num_tokens = sum(span.num_tokens for span in spans)
    stands_in = unshifted or not parts
    inputs = {
        "input_ids": _joined([sample.input_ids[at] for sample, at in parts], stands_in, 0),
        "position_ids": _positions([sample.position_ids(at.start, at.stop) for sample, at in parts], stands_in),
        "attention_mask": planned_mask(num_tokens, num_tokens + stands_in),
    }
    for name in _names(sample.inputs for sample, _ in parts):
        inputs[name] = _joined([sample.inputs[name][at] for sample, at in parts], stands_in, 0)
    if any(sample.labels is None for sample, _ in parts):
        return inputs
    # shifted in the whole sample, then cut: what a span's last token has to predict lies in another span
    targets = _joined([sample.targets[at] for sample, at in parts], stands_in, IGNORE_INDEX)
    # of a label, so they are where the label is: beside the token that is to predict it
    weights = {
        name: _joined([sample.of_targets(name)[at] for sample, at in parts], stands_in, 0)
        for name in _names(sample.weights for sample, _ in parts)
    }
    if not unshifted:
        labels = [sample.labels[at] for sample, at in parts if sample.labels is not None]
        return {**inputs, **weights, "labels": _joined(labels, stands_in, IGNORE_INDEX), "shift_labels": targets}
    weights = {name: _one_later(values, 0) for name, values in weights.items()}
    return {**inputs, **weights, "labels": _one_later(targets, IGNORE_INDEX)}


def _positions(values: list[torch.Tensor], stands_in: bool) -> torch.Tensor:
    """Join positions; beside those of three parts, others have three equal ones, as models take them for text."""
    parts = max((x.shape[1] for x in values if x.ndim > 1), default=0)
    if not parts:
        return _joined(values, stands_in, 0)
    in_parts = [x if x.ndim > 1 else x.unsqueeze(1).expand(-1, parts) for x in values]
    return _joined(in_parts, stands_in, 0).permute(2, 0, 1).contiguous()


def _joined(values: list[torch.Tensor], stands_in: bool, filling: int) -> torch.Tensor:
    """Join the values of tokens, one after the other, and of a token that stands in. Shape (1, num_tokens, ...)."""
    shape = values[0].shape[1:] if values else ()
    kind = values[0].dtype if values else torch.long  # without tokens there are only columns of whole numbers
    extra = [torch.full((1, *shape), filling, dtype=kind)] if stands_in else []
    return torch.cat([*values, *extra]).unsqueeze(0)


def _one_later(values: torch.Tensor, filling: int) -> torch.Tensor:
    """Move each token's value to the token after it. Shape (1, num_tokens, ...)."""
    moved = values.roll(1, dims=1)  # the last one, of the token that stands in, falls off: it has no target
    moved[:, 0] = filling
    return moved


def labels_of(spans: Sequence[Span], samples: Sequence[Sample | None]) -> torch.Tensor | None:
    """Return each token's own label, shape (1, num_tokens); None where a sample has none."""
    parts = [(sample_of(samples, span), span) for span in spans]
    labels = [sample.labels[span.start : span.end] for sample, span in parts if sample.labels is not None]
    return _joined(labels, stands_in=not parts, filling=IGNORE_INDEX) if len(labels) == len(parts) else None


def scored_of(spans: Sequence[Span], samples: Sequence[Sample | None]) -> tuple[int | None, ...]:
    """Return for each span the place in it of the token whose score is its sample's; None where that lies elsewhere."""
    places = [(sample_of(samples, span).scored, span) for span in spans]
    return tuple(None if p is None or not span.start <= p < span.end else p - span.start for p, span in places)


def sample_of(samples: Sequence[Sample | None], span: Span) -> Sample:
    """Return the sample that a span is of, which this rank has read."""
    sample = samples[span.sample]
    assert sample is not None
    return sample


def _names(of_samples: Iterable[Mapping[str, torch.Tensor]]) -> list[str]:
    """List the names of a pack's values; refuse samples that differ in them, because the pack is one tensor a name."""
    keys = [tuple(sorted(one)) for one in of_samples]
    if len(set(keys)) > 1:
        raise BadSample(f"Some rows have {sorted(set(keys[0]) ^ set(min(set(keys) - {keys[0]})))}, others have not.")
    return list(keys[0]) if keys else []
