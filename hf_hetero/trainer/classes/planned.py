"""The loss of classes and numbers in a planned micro-batch, and the outputs that an evaluation makes rows of.

What transformers computes of a pack is of no use: one score, of its last token, and a mean over a call. So a model is
asked for the logits of each token; which of them count stands in the labels, and the loss is a sum over those, divided
once by the labels of the whole step (`model/classes/class_loss`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from hf_hetero.collators import ClassCollator
from hf_hetero.collators.classes import Classes
from hf_hetero.collators.sample import LOSS_WEIGHTS
from hf_hetero.model.classes.class_loss import class_loss, has_label, problem_of
from hf_hetero.model.classes.labelled import NEXT, SEQUENCES, TOKENS, Labelled
from hf_hetero.model.wrapped import base_model

LABELS = ("labels", "shift_labels", LOSS_WEIGHTS)
"""What inputs of a planned micro-batch say of its labels."""


class LearnsClasses(Trainer):
    """`LearnsClasses` computes the loss of planned micro-batches whose labels are classes or numbers.

    Attributes:
        labelled: what the labels of its models may be of.
    """

    labelled: tuple[Labelled, ...] = (NEXT, TOKENS, SEQUENCES)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute this rank's part of a step's loss, times the number of ranks; of tokens to come, as Trainer does.

        Args:
            model: that is trained, in its wrapper.
            inputs: of a planned micro-batch, or a batch of Trainer's.
            return_outputs: give outputs, too.
            num_items_in_batch: labels of the step.
        """
        classes = classes_of(self) if "hetero" in inputs else None
        if classes is None or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, labels = outputs_by_token(model, inputs, classes), inputs["shift_labels"]
        problem = _problem(base_model(self.model).config, classes, labels)
        loss = class_loss(outputs["logits"], labels, problem, inputs.get(LOSS_WEIGHTS))
        loss = (loss + outputs.pop("reached")) * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def classes_of(trainer: Any) -> Classes | None:
    """Return what the labels of a trainer's run are; None where they are tokens, or no step is planned."""
    run = trainer._planned_run
    return run.packer.classes if run is not None and isinstance(run.packer, ClassCollator) else None


def outputs_by_token(model: torch.nn.Module, inputs: dict[str, Any], classes: Classes) -> dict[str, Any]:
    """Run a model on a planned micro-batch.

    Args:
        model: in its wrapper.
        inputs: of the micro-batch, with labels or without.
        classes: of the model.

    Returns:
        Its outputs, of which `logits` are those of each token, shape (1, num_tokens, num_labels); and as `reached` a
        zero that leads to whatever else the model gave, because a wrapper looks for its weights there.
    """
    given = {name: values for name, values in inputs.items() if name not in LABELS}
    if not classes.of_sequences:
        outputs: Any = model(**given)
        found = {name: values for name, values in outputs.items() if name != "loss"}
        return {**found, "reached": 0}
    # given labels, a model calls its loss, which here gives the logits of all tokens (`loss.token_scores`)
    outputs = model(**given, labels=torch.zeros_like(given["input_ids"]))
    logits = outputs.loss.reshape(*given["input_ids"].shape, -1)
    return {"logits": logits, "reached": 0 * outputs.logits.sum()}


def _problem(config: Any, classes: Classes, labels: torch.Tensor) -> str:
    """Return which problem these labels are of; once it is known, the config says so, as transformers has it."""
    if classes.problem is not None:
        return classes.problem
    problem = problem_of(labels, classes.num_labels)
    # a rank without a label sees none of numbers
    if config.problem_type is None and bool(has_label(labels).any()):
        config.problem_type = problem
    return problem
