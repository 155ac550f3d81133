"""A student learns a teacher's stored probabilities of the k likeliest tokens, exactly, under every plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import (
    IGNORE,
    LENGTHS,
    ScriptedTrainer,
    gradients_of,
    largest_difference,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
K = 3


def taught_rows() -> list[dict[str, Any]]:
    """Rows with a teacher's k likeliest tokens in the place of each token, and their probabilities."""
    generator = torch.Generator().manual_seed(3)
    rows = samples(LENGTHS)
    for row in rows:
        num = len(row["input_ids"])
        row["teacher_ids"] = torch.randint(0, 48, (num, K), generator=generator).tolist()
        row["teacher_probs"] = torch.rand(num, K, generator=generator, dtype=torch.float64).softmax(-1).float().tolist()
    return rows


def pad(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Make the tensors of a batch, as a collator of a user's own does."""
    fillings = {"input_ids": 0, "labels": IGNORE, "teacher_ids": 0, "teacher_probs": 0.0}
    columns = {name: [torch.tensor(row[name]) for row in examples] for name in fillings}
    columns["teacher_probs"] = [probs.double() for probs in columns["teacher_probs"]]
    return {
        name: pad_sequence(values, batch_first=True, padding_value=fillings[name]) for name, values in columns.items()
    }


def distance(logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropies to what the teacher says of the token after each, where that is learned."""
    taken = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:])
    return -((probs[:, 1:] * taken).sum(-1) * (labels[:, 1:] != IGNORE)).sum()


class Student(ScriptedTrainer):
    """Learns what the teacher said; rows without a teacher, such as those its loss is tried on, plainly."""

    own_place = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=pad, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, probs = inputs.pop("teacher_ids", None), inputs.pop("teacher_probs", None)
        outputs, labels = model(**inputs), inputs["labels"]
        if ids is None:
            loss = F.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum")
        else:
            if self.own_place:  # what the teacher said of each token, in the place of the one after it
                ids, probs = ids.roll(1, dims=1), probs.roll(1, dims=1)
            loss = distance(outputs.logits, labels, ids, probs)
        loss = loss / num_items_in_batch * self.args.world_size  # as `Trainer.compute_loss`: ranks are averaged
        return (loss, outputs) if return_outputs else loss


class Misled(Student):
    own_place = True


def run(kind: Any) -> Any:
    return trained(tiny_model(dtype=torch.float64), taught_rows(), kind, remove_unused_columns=False)


def reference() -> list[dict[str, torch.Tensor]]:
    """Each sample alone, on one process."""
    model, rows, gradients = tiny_model(dtype=torch.float64), taught_rows(), []
    for step in STEPS:
        model.zero_grad()
        count = sum(label != IGNORE for row in step for label in rows[row]["labels"][1:])
        for row in step:
            taught = pad([rows[row]])
            logits = model(input_ids=taught["input_ids"], use_cache=False).logits
            loss = distance(logits, taught["labels"], taught["teacher_ids"], taught["teacher_probs"]) / count
            (loss + 0 * logits.sum()).backward()
        gradients.append(gradients_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return gradients


def test_a_student_learns_as_on_one_process() -> None:
    """Gradients are those of each sample alone, on 4 ranks that cut samples; a teacher one token late is noticed."""
    expected = reference()
    for kind, is_right in ((Student, True), (Misled, False)):
        for rank in run_ranks(run, 4, kind):
            pairs = zip(rank["gradients"], expected, strict=True)
            difference = max(largest_difference(ours, theirs) for ours, theirs in pairs)
            assert (difference < 1e-12) if is_right else (difference > 1e-3), (kind, difference)
