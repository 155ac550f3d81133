"""PackedCollator: samples of any length into one rank's tensors, without padding."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_hetero.attention.interface import planned_mask
from hf_hetero.errors import BadSample
from hf_hetero.layout import Span
from hf_hetero.limits import Limits, check_whole_numbers
from hf_hetero.loss import IGNORE_INDEX, num_targets, shift_labels
from hf_hetero.rows import PACKED_COLUMN, nested
from hf_hetero.step import RankMicroBatch, StepBatch, StepExamples

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]
NUMBERS = ("input_ids", "labels", "position_ids")
"""What a row counts with."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, ready to be packed. Each tensor has one entry a token, shape (num_tokens, ...).

    Args:
        input_ids: tokens.
        labels: what each token is, where it is to be predicted; None where the sample has no labels.
        positions: given by the row; None: they count from 0.
        inputs: what else the model takes of each token.
        weights: what else there is of each label, for a loss of one's own.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor | None = None
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @property
    def targets(self) -> torch.Tensor:
        """The label after each token; the last one has nothing to predict."""
        if self.labels is None:
            return torch.full_like(self.input_ids, IGNORE_INDEX)
        return shift_labels(self.labels)

    @property
    def num_positions(self) -> int:
        """One more than its last position."""
        return len(self.input_ids) if self.positions is None else int(self.positions.max()) + 1

    def fingerprint(self) -> int:
        """63 bits of all that is its own."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.input_ids, self.labels, self.positions, *self.inputs.values(), *self.weights.values()):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
        return int.from_bytes(digest.digest(), "big") >> 1

    def part(self, start: int, end: int) -> Sample:
        """A stretch of it, as a sample of its own."""
        kept = slice(start, end)
        return Sample(
            self.input_ids[kept],
            None if self.labels is None else self.labels[kept],
            None if self.positions is None else self.positions[kept],
            {name: values[kept] for name, values in self.inputs.items()},
            {name: values[kept] for name, values in self.weights.items()},
        )

    def position_ids(self, start: int, end: int) -> torch.Tensor:
        """Of a span."""
        return torch.arange(start, end) if self.positions is None else self.positions[start:end]


@dataclass
class PackedCollator:
    """Packs samples, shifts labels inside each of them, and keeps this rank's spans.

    Given a step's examples it returns this rank's tensors. Given a plain list of examples it is an ordinary collator:
    one padded batch with `input_ids`, `attention_mask` and `labels`.

    Args:
        example_collator: turns a list with one example into a batch with one row, for those who bring their own way of
            making labels (`DataCollatorForLanguageModeling`, for one).
        pad_token_id: fills the rows of an ordinary batch.
        makes_labels: take `input_ids` for the labels of rows that have none.
        says_so: do that in training at least, and say so once.
        needs_labels: refuse rows without labels.
        model_inputs: what the model's forward takes; of these, what a row has for each token is handed on.
        columns: of a row that are looked at; None: all. Others are left out before `example_collator` sees them.
        keeps_labels_unshifted: give `labels` as transformers does, for a loss that shifts them itself.
        limits: what the model has room for. The trainer sets it.
        counts_first_label: whether the loss of a step is divided by all labels, the first of each sample too, which
            nothing predicts: Trainer does so for some models. The trainer sets it.
        length_column: of the dataset, by which steps are planned; None: its tokens were counted.
    """

    example_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    pad_token_id: int = 0
    makes_labels: bool = True
    says_so: bool = False
    needs_labels: bool = False
    model_inputs: frozenset[str] = frozenset()
    columns: frozenset[str] | None = None
    keeps_labels_unshifted: bool = False
    limits: Limits = field(default_factory=Limits, repr=False)
    counts_first_label: bool = field(default=False, repr=False)
    length_column: str | None = None

    def __call__(self, batch: StepExamples | Sequence[Example]) -> StepBatch | dict[str, torch.Tensor]:
        """Tensors of a step, or of an ordinary batch.

        Raises:
            BadSample: no `input_ids`, no tokens, labels of another length, not the tokens that were planned for, or
                more or others than the model has.
        """
        return self._step(batch) if isinstance(batch, StepExamples) else self._padded(batch)

    def _step(self, batch: StepExamples) -> StepBatch:
        share = batch.share
        drawn, whole, samples = share.step.drawn, dict[int, Sample](), dict[int, Sample]()
        for position, example in batch.examples.items():
            row, start = drawn.rows[position], drawn.starts[position]
            if row not in whole:
                whole[row] = self.sample(example, f"row {row}", drawn.row_tokens[position])
            samples[position] = whole[row].part(start, start + drawn.lengths[position])
            self.limits.check_length(samples[position].num_positions, f"row {row}")
        micro_batches: list[RankMicroBatch] = []
        total = 0
        for group in share.groups:
            layout = share.layout(group)
            spans = layout.spans[group.ranks.index(share.rank)]
            held = [samples.get(position) for position in group.samples]
            inputs = pack_spans(spans, held, unshifted=self.keeps_labels_unshifted)
            total += sum(self._num_counted(_sample(held, span), span) for span in spans)
            reaches = tuple(_sample(held, span).num_positions for span in spans)
            micro_batches.append(RankMicroBatch(group, layout, spans, inputs, _labels(spans, held), reaches))
        fingerprints = {row: whole[row].fingerprint() for row in share.step.shared_rows() if row in whole}
        return StepBatch(share, tuple(micro_batches), total, fingerprints)

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """One row as what is trained on: without its padding, with its labels.

        Args:
            example: a row of the dataset.
            name: of the row, for messages.
            planned_tokens: tokens that it was planned with.

        Raises:
            BadSample: as for a call.
        """
        if "input_ids" not in example:
            raise BadSample(f"{name} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
        is_packed = PACKED_COLUMN in example
        if self.columns is not None:
            example = {key: values for key, values in example.items() if key in self.columns}
        if self.example_collator is not None:
            row = self.example_collator([dict(example)])
            example = {key: values[0] for key, values in row.items() if _has_rows(values)}
        input_ids = torch.as_tensor(example["input_ids"])
        if input_ids.ndim != 1:
            raise nested(name)
        per_token = {key: _per_token(values, len(input_ids)) for key, values in example.items()}
        found = {key: values for key, values in per_token.items() if values is not None}
        self._check_carried(example, found, name)
        mask = found.pop("attention_mask", None)
        check_whole_numbers({key: found[key] for key in NUMBERS if key in found}, name)
        kept = _without_padding(mask, name)
        _check_padding_labels(mask, found.get("labels"), name)
        found = {key: values[kept] for key, values in found.items()}
        input_ids, labels, positions = found.pop("input_ids").long(), found.pop("labels", None), None
        if (given := found.pop("position_ids", None)) is not None:
            positions = given.long()
            if not is_packed and bool((positions.diff() < 0).any()):
                raise BadSample(
                    f"{name} was packed: its position_ids start anew within it. Give the dataset a seq_lengths column "
                    "with the tokens of each document, as TRL's packing does, or do not pack: steps are packed anyway."
                )
            if not is_packed and mask is None and bool((positions.diff() != 1).any()):
                raise BadSample(
                    f"{name}: its position_ids skip some, which transformers takes for the start of another document "
                    "where there is no attention_mask. Give the row an attention_mask of ones if it is one sample."
                )
        elif kept.start:  # as in stock, where padding on the left takes the first positions
            positions = torch.arange(kept.start, kept.stop)
        if labels is None and self.makes_labels:
            labels = input_ids
            if self.says_so:
                logger.warning(
                    "%s has no labels: all tokens of such rows are learned. Give rows labels to learn others.", name
                )
                self.says_so = False
        if labels is None and self.needs_labels:
            raise BadSample(
                f"{name} has no labels, so there is nothing to learn. Give the dataset a labels column, or make labels "
                "of the tokens: data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), or "
                "hf_hetero.collators.PackedCollator()."
            )
        if planned_tokens is not None and input_ids.numel() != planned_tokens:
            raise BadSample(
                f"{name} has {input_ids.numel()} tokens but was planned with {planned_tokens}. {self._remedy()}"
            )
        if not input_ids.numel():
            raise BadSample(f"{name} has no tokens. Filter empty samples out of the dataset.")
        self.limits.check_tokens(input_ids, labels, name)
        self._check_first_label(labels, kept, name)
        inputs = {key: values for key, values in found.items() if key in self.model_inputs}
        weights = (
            {key: values for key, values in found.items() if key not in inputs} if self.keeps_labels_unshifted else {}
        )
        return Sample(input_ids, None if labels is None else labels.long(), positions, inputs, weights)

    def _num_counted(self, sample: Sample, span: Span) -> int:
        """Tokens of a span that count among those by which the loss of a step is divided."""
        if self.counts_first_label and sample.labels is not None:
            return num_targets(sample.labels[span.start : span.end])
        return num_targets(sample.targets[span.start : span.end])

    def check_padding(self, rows: Iterable[Example]) -> None:
        """Refuse a collator that pads on the left, where Trainer's loss would learn first tokens from the padding.

        Args:
            rows: of the dataset; two of different lengths show it.

        Raises:
            BadSample: it does, and first tokens have labels.
        """
        if self.example_collator is None:
            return
        by_length: dict[int, Example] = {}
        for number, example in enumerate(rows):
            by_length.setdefault(len(self.sample(example, f"row {number}").input_ids), example)
            if len(by_length) == 2:
                break
        else:
            return
        shorter = min(by_length)
        kept = [by_length[shorter], *(example for length, example in by_length.items() if length != shorter)]
        if self.columns is not None:
            kept = [{key: values for key, values in example.items() if key in self.columns} for example in kept]
        batch = self.example_collator([dict(example) for example in kept])
        if (mask := batch.get("attention_mask")) is None or batch.get("labels") is None:
            return
        first = int(torch.as_tensor(mask[0]).bool().int().argmax())
        if first and int(batch["labels"][0][first]) != IGNORE_INDEX:
            raise BadSample(
                "The data_collator pads on the left, where Trainer's loss learns the first token of a sample from the "
                'padding before it. Pad on the right: tokenizer.padding_side = "right".'
            )

    def _check_carried(self, example: Example, found: Mapping[str, torch.Tensor], name: str) -> None:
        """Refuse what a rank that holds a part of the row could not be given its part of."""
        num_tokens = len(found["input_ids"])
        if example.get("labels") is not None and "labels" not in found:
            raise BadSample(
                f"{name} has {num_tokens} input_ids but {torch.as_tensor(example['labels']).numel()} labels. Give "
                f"every token a label; {IGNORE_INDEX} marks those not to learn from."
            )
        for key in sorted((self.model_inputs & set(example)) - set(found)):
            if example[key] is not None:
                raise BadSample(
                    f"{name}: {key} is an input of the model and does not have one value for each of the {num_tokens} "
                    "tokens, so it cannot be shared out with them. Remove it, or train with plain Trainer."
                )

    def _check_first_label(self, labels: torch.Tensor | None, kept: slice, name: str) -> None:
        """Trainer's loss would learn a sample's first token from the padding before it."""
        if self.needs_labels and kept.start and labels is not None and int(labels[0]) != IGNORE_INDEX:
            raise BadSample(
                f"{name} is padded on the left and its first token has a label: Trainer would learn it from the "
                f"padding. Pad on the right, or give the first token the label {IGNORE_INDEX}."
            )

    def num_tokens(self, example: Example, name: str) -> int:
        """Tokens of the sample that an example becomes.

        Raises:
            BadSample: as for a step.
        """
        return self.sample(example, name).input_ids.numel()

    def _remedy(self) -> str:
        """Against a sample of another length than was planned for."""
        if self.length_column is not None:
            return f"Remove the dataset's {self.length_column} column, or make it count what is trained on."
        theirs = getattr(self.example_collator, "__qualname__", type(self.example_collator).__qualname__)
        also = "" if self.example_collator is None else f", and the collator {theirs},"
        return f"So many were counted before: the dataset{also} must give a row as many tokens at each read."

    def _padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        rows = [self.sample(example, f"sample {position} of the batch") for position, example in enumerate(examples)]

        def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row.input_ids) for row in rows], 0),
        }
        labels = [row.labels for row in rows if row.labels is not None]
        return {**batch, "labels": pad(labels, IGNORE_INDEX)} if len(labels) == len(rows) else batch


def pack_spans(
    spans: Sequence[Span], samples: Sequence[Sample | None], unshifted: bool = False
) -> dict[str, torch.Tensor]:
    """Model inputs of one rank: its spans, one after the other. Shapes (1, num_tokens).

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
    held = [(_sample(samples, span), slice(span.start, span.end)) for span in spans]
    num_tokens = sum(span.num_tokens for span in spans)
    stands_in = unshifted or not held
    inputs = {
        "input_ids": _joined([sample.input_ids[at] for sample, at in held], stands_in, 0),
        "position_ids": _joined([sample.position_ids(at.start, at.stop) for sample, at in held], stands_in, 0),
        "attention_mask": planned_mask(num_tokens, num_tokens + stands_in),
    }
    for name in _names(sample.inputs for sample, _ in held):
        inputs[name] = _joined([sample.inputs[name][at] for sample, at in held], stands_in, 0)
    if any(sample.labels is None for sample, _ in held):
        return inputs
    targets = _joined([sample.targets[at] for sample, at in held], stands_in, IGNORE_INDEX)
    if not unshifted:
        labels = [sample.labels[at] for sample, at in held if sample.labels is not None]
        return {**inputs, "labels": _joined(labels, stands_in, IGNORE_INDEX), "shift_labels": targets}
    inputs["labels"] = _one_later(targets, IGNORE_INDEX)
    for name in _names(sample.weights for sample, _ in held):
        after = [_shifted(sample.weights[name])[at] for sample, at in held]
        inputs[name] = _one_later(_joined(after, stands_in, 0), 0)
    return inputs


def _joined(values: list[torch.Tensor], stands_in: bool, filling: int) -> torch.Tensor:
    """Values of tokens one after the other, and of a token that stands in. Shape (1, num_tokens, ...)."""
    shape = values[0].shape[1:] if values else ()
    kind = values[0].dtype if values else torch.long
    extra = [torch.full((1, *shape), filling, dtype=kind)] if stands_in else []
    return torch.cat([*values, *extra]).unsqueeze(0)


def _one_later(values: torch.Tensor, filling: int) -> torch.Tensor:
    """Each token's value at the token after it. Shape (1, num_tokens, ...)."""
    moved = values.roll(1, dims=1)
    moved[:, 0] = filling
    return moved


def _shifted(values: torch.Tensor) -> torch.Tensor:
    """What the token after each has; the last one gets 0. Shape (num_tokens, ...)."""
    moved = values.roll(-1, dims=0)
    moved[-1] = 0
    return moved


def _labels(spans: Sequence[Span], samples: Sequence[Sample | None]) -> torch.Tensor | None:
    held = [(_sample(samples, span), span) for span in spans]
    labels = [sample.labels[span.start : span.end] for sample, span in held if sample.labels is not None]
    return _joined(labels, stands_in=not held, filling=IGNORE_INDEX) if len(labels) == len(held) else None


def _sample(samples: Sequence[Sample | None], span: Span) -> Sample:
    sample = samples[span.sample]
    assert sample is not None
    return sample


def _names(of_samples: Iterable[Mapping[str, torch.Tensor]]) -> list[str]:
    """Keys of the first; all samples of a pack must have the same."""
    keys = [tuple(sorted(one)) for one in of_samples]
    if len(set(keys)) > 1:
        raise BadSample(f"Some rows have {sorted(set(keys[0]) ^ set(min(set(keys) - {keys[0]})))}, others have not.")
    return list(keys[0]) if keys else []


def _has_rows(values: Any) -> bool:
    return isinstance(values, torch.Tensor | Sequence | np.ndarray) and len(values) == 1


def _per_token(values: Any, num_tokens: int) -> torch.Tensor | None:
    """As a tensor with one entry a token; None for anything else."""
    if values is None or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        return None
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor if tensor.ndim and len(tensor) == num_tokens else None


def _without_padding(mask: torch.Tensor | None, name: str) -> slice:
    """Where the tokens of a padded row are."""
    if mask is None:
        return slice(None)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BadSample(
            f"{name} was packed: its attention_mask numbers its documents. Give the dataset a seq_lengths column with "
            "the tokens of each document instead."
        )
    tokens = torch.nonzero(mask).flatten()
    if not len(tokens):
        return slice(0, 0)
    first, last = int(tokens[0]), int(tokens[-1])
    if last - first + 1 != len(tokens):
        raise BadSample(
            f"{name} has holes in its attention_mask: only padding at its ends can be left out. Remove the masked "
            "tokens from the row, or train with plain Trainer."
        )
    return slice(first, last + 1)


def _check_padding_labels(mask: torch.Tensor | None, labels: torch.Tensor | None, name: str) -> None:
    """Trainer's loss would learn padding that has labels, and padding is left out here."""
    if mask is None or labels is None:
        return
    if bool((learnt := (mask == 0) & (labels != IGNORE_INDEX)).any()):
        place = int(torch.nonzero(learnt)[0])
        raise BadSample(
            f"{name} has the label {int(labels[place])} at token {place}, which its attention_mask says is padding: "
            f"Trainer would learn it. Give padding the label {IGNORE_INDEX}, or leave it out: no padding is needed."
        )
