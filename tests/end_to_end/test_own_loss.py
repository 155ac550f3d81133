"""A loss of somebody's own learns the same under every plan: whatever spans a rank holds, it shifts labels rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)
from torch.nn import functional as F

from hf_hetero import UnsupportedModel


def shifted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """As transformers documents it for a batch of rows."""
    logits, targets = outputs.logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


class Method(ScriptedTrainer):
    """Overrides `compute_loss`."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        loss = shifted(model(**inputs), labels, num_items_in_batch)
        return loss * self.args.world_size  # as Trainer's own does, since gradients are averaged


class Function(ScriptedTrainer):
    """Has a `compute_loss_func`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, compute_loss_func=shifted)


class Masking(ScriptedTrainer):
    """Masks labels in `_prepare_inputs`: those of odd tokens."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": inputs["labels"].where(inputs["labels"] % 2 == 0, -100)}


class Crossing(Method):
    """A negative control: labels as each token has them, which a shift takes across spans."""

    def _run_on(self, fitted: Any) -> Any:
        run = super()._run_on(fitted)
        run.packer.keeps_labels_unshifted = False
        return run


def run(kind: Any) -> Any:
    return trained(tiny_model(dtype=torch.float64), samples(LENGTHS), kind)


def expected(masked: bool = False) -> Any:
    """Each sample alone, on one process."""
    data = samples(LENGTHS)
    steps = trainer_order(len(LENGTHS), 12, 7, 4)
    model = tiny_model(dtype=torch.float64)
    if not masked:
        return reference_steps(model, data, steps)
    kept = [[label if label % 2 == 0 else -100 for label in row["labels"]] for row in data]
    counts = [sum(label != -100 for row in rows for label in data[row]["labels"][1:]) for rows in steps]
    halves = [sum(label != -100 for row in rows for label in kept[row][1:]) for rows in steps]
    # Trainer divides by the labels that there were before
    masked_data = [{**row, "labels": labels} for row, labels in zip(data, kept, strict=True)]
    first = reference_steps(model, masked_data, steps[:1])
    gradients = {name: g * halves[0] / counts[0] for name, g in first["gradients"][0].items()}
    return {"gradients": [gradients]}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", [Method, Function])
def test_loss_of_ones_own(kind: Any, num_ranks: int) -> None:
    """Gradients and weights of every rank are those of the samples alone."""
    reference = expected()
    for found in run_ranks(run, num_ranks, kind):
        for ours, theirs in zip(found["gradients"], reference["gradients"], strict=True):
            assert largest_difference(ours, theirs) < 1e-12
        assert largest_difference(found["weights"], reference["weights"]) < 1e-12


def test_labels_masked_on_the_way() -> None:
    """So are those of a batch whose labels are changed before the loss."""
    reference = expected(masked=True)
    for found in run_ranks(run, 4, Masking):
        assert largest_difference(found["gradients"][0], reference["gradients"][0]) < 1e-12


def test_a_shift_across_spans_is_noticed() -> None:
    """Labels that were not moved give other gradients: the comparison can fail."""
    reference = expected()
    for found in run_ranks(run, 2, Crossing):
        assert largest_difference(found["gradients"][0], reference["gradients"][0]) > 1e-3


class OfMean(ScriptedTrainer):
    """A mean over whatever is planned together."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        return model(**inputs).loss


def test_a_mean_is_refused_on_every_rank() -> None:
    """Before the first step, by name."""
    for error in run_ranks(run, 2, OfMean, expect_errors=True):
        assert isinstance(error, UnsupportedModel)
        assert "OfMean.compute_loss gives" in str(error)
