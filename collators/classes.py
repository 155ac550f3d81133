"""Labels of a row that are classes, or numbers, instead of tokens: of each of its tokens, or of the whole sequence.

A model gives a sequence the score of one of its tokens, the last that is no padding. So a sequence's label is put on
that token, and from there on labels of sequences and of tokens are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.row import Row
from hf_hetero.collators.sample import Example, Sample
from hf_hetero.errors import BadSample
from hf_hetero.layout import Span
from hf_hetero.model.classes.class_loss import MANY_CLASSES, ONE_CLASS, REGRESSION, numbers_of
from hf_hetero.model.classes.labelled import SEQUENCES, TOKENS, Labelled
from hf_hetero.model.loss import IGNORE_INDEX, carried_weights
from hf_hetero.samples.rows import PACKED_COLUMN, last_token

LABEL_NAMES = ("labels", "label", "label_ids")
"""Columns that transformers' collators know labels by."""


@dataclass(frozen=True, slots=True)
class Classes:
    """`Classes` say what a model's labels are.

    Args:
        of: tokens, or sequences.
        num_labels: classes, or numbers.
        problem: of sequences, as transformers calls it (`model.classes.class_loss`); None: as the labels of a row look.
        pad_token_id: the last token that is another is the one whose score counts; None: the last of all.
    """

    of: Labelled = TOKENS
    num_labels: int = 2
    problem: str | None = None
    pad_token_id: int | None = None

    @property
    def of_sequences(self) -> bool:
        """Return whether a row has one label, instead of one for each token."""
        return self.of == SEQUENCES

    def label(self, given: Any, name: str) -> torch.Tensor:
        """Read the label of a sequence.

        Args:
            given: by a row.
            name: of the row, for messages.

        Returns:
            A class, shape (), or numbers as they travel, shape (num_labels,).

        Raises:
            BadSample: it is not what the model's labels are.
        """
        try:
            label = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadSample(f"{name} has the label {given!r:.60}, and labels are numbers.") from error
        problem = self.problem or self._problem(label)
        if problem == ONE_CLASS:
            if label.numel() != 1 or label.is_floating_point():
                raise BadSample(
                    f"{name} has the label {given!r:.60}, and the model has {self.num_labels} classes, one a sequence. "
                    "Give each row one whole number; for several classes at once a list of as many numbers, and "
                    f"model.config.problem_type = {MANY_CLASSES!r}."
                )
            label = label.reshape(()).long()
            self.check_classes(label[None], name)
            return label
        label = torch.as_tensor(given, dtype=torch.float64).reshape(-1)  # read anew, for a list is read in fp32
        if len(label) != self.num_labels or not bool(label.isfinite().all()):
            raise BadSample(
                f"{name} has the label {given!r:.60}, and the model has {self.num_labels} labels (config.num_labels): "
                "give each row as many finite numbers."
            )
        return carried_weights(label)

    def _problem(self, label: torch.Tensor) -> str:
        """Return the problem of which this is a label, as transformers tells; there a list of whole numbers is none."""
        if self.num_labels == 1:
            return REGRESSION
        return ONE_CLASS if label.numel() == 1 else MANY_CLASSES

    def check_classes(self, labels: torch.Tensor, name: str) -> None:
        """Refuse classes that the model does not have.

        Args:
            labels: shape (n,).
            name: of the row, for messages.

        Raises:
            BadSample: with the class, and those that there are.
        """
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= self.num_labels))
        if bool(wrong.any()):
            raise BadSample(
                f"{name} has the class {int(labels[wrong][0])}, and the model has {self.num_labels}: 0 to "
                f"{self.num_labels - 1}, and {IGNORE_INDEX} for what is not to be learned. Load it with num_labels."
            )

    def at_last_token(self, sample: Sample) -> Sample:
        """Leave a sequence's label at the token whose score counts, and at no other."""
        place = last_token(sample.input_ids.tolist(), self.pad_token_id)
        if sample.labels is None:
            return replace(sample, scored=place)
        labels = torch.full_like(sample.labels, IGNORE_INDEX)
        labels[place] = sample.labels[place]
        return replace(sample, labels=labels, scored=place)

    def as_given(self, labels: torch.Tensor) -> torch.Tensor:
        """Return labels of sequences as transformers has them.

        Args:
            labels: of some tokens, as they travel; shape (n,) or (n, num_labels).

        Returns:
            Classes, shape (n,); numbers in fp32, shape (n,) for one number, or (n, num_labels).
        """
        if labels.ndim == 1:
            return labels
        numbers = numbers_of(labels).float()
        return numbers[:, 0] if (self.problem or REGRESSION) == REGRESSION and self.num_labels == 1 else numbers


@dataclass
class ClassCollator(PackedCollator):
    """`ClassCollator` packs rows whose labels are classes, or numbers: nothing is shifted, and no labels are made.

    Args:
        classes: of the model.
    """

    classes: Classes = field(default_factory=Classes)

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """Read a row. The label of a sequence is on each of its tokens, until it is known where the sequence ends."""
        return replace(super().sample(example, name, planned_tokens), aligned=True)

    def num_counted(self, sample: Sample, span: Span) -> int:
        """Count the labels of a span: the loss of a step is divided by them."""
        if sample.labels is None:
            return 0
        labels = sample.labels[span.start : span.end]
        return int(((labels if labels.ndim == 1 else labels[:, 0]) != IGNORE_INDEX).sum())

    def check_padding(self, rows: Any) -> None:
        """Do nothing: no token is learned from the one before it, so padding may stand on either side."""

    def _collated(self, example: Example, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        row, images = super()._collated(example, name)
        return self._labelled(row, example, name), images

    def _labelled(self, row: dict[str, Any], example: Example, name: str) -> dict[str, Any]:
        """Return a row with its label as it travels: that of a sequence at each token."""
        given = next((row[key] for key in LABEL_NAMES if row.get(key) is not None), None)
        row = {key: values for key, values in row.items() if key not in LABEL_NAMES}
        if not self.classes.of_sequences:
            return row if given is None else {**row, "labels": given}
        if (documents := example.get(PACKED_COLUMN)) is not None and len(documents) > 1:
            raise BadSample(f"{name} has {len(documents)} sequences, and one label. Give each sequence a row.")
        if given is None:
            return row
        label, num_tokens = self.classes.label(given, name), len(row["input_ids"])
        labels = label.expand(num_tokens, *label.shape).clone()
        if (mask := row.get("attention_mask")) is not None:
            labels[torch.as_tensor(mask) == 0] = IGNORE_INDEX
        return {**row, "labels": labels}

    def _labels(self, input_ids: torch.Tensor, labels: torch.Tensor | None, name: str) -> torch.Tensor | None:
        if labels is None and self.needs_labels:
            what = "one for the row" if self.classes.of_sequences else "one for each token"
            raise BadSample(
                f"{name} has no labels, so there is nothing to learn. Give the dataset a labels column: {what}."
            )
        return None if labels is None else labels.long()

    def _check(self, input_ids: torch.Tensor, labels: torch.Tensor | None, row: Row, name: str) -> None:
        self.limits.check_tokens(input_ids, None, name)
        if labels is not None and labels.ndim == 1:
            self.classes.check_classes(labels, name)

    def _part(self, row: Sample, start: int, end: int, name: str) -> Sample:
        part = super()._part(row, start, end, name)
        return self.classes.at_last_token(part) if self.classes.of_sequences else part

    def _padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = super()._padded(examples)
        if self.classes.of_sequences and "labels" in batch:
            rows = [self.sample(example, "a row of the batch").labels for example in examples]
            batch["labels"] = torch.cat([self.classes.as_given(labels[:1]) for labels in rows if labels is not None])
        return batch
