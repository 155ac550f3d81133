"""`PackedCollator` turns samples of any length into one rank's tensors, without padding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_hetero.collators.limits import Limits
from hf_hetero.collators.row import Row, has_rows, of_each_token, read_row, refuse_seen, source_of, weights_of
from hf_hetero.collators.sample import LOSS_WEIGHTS, Example, Sample
from hf_hetero.collators.spans import labels_of, pack_spans, sample_of, scored_of
from hf_hetero.errors import BadSample
from hf_hetero.images.pictures import packed_pictures
from hf_hetero.images.positions import KINDS
from hf_hetero.images.sight import Sight, all_inputs
from hf_hetero.images.towers import Towers
from hf_hetero.layout import Span
from hf_hetero.model.loss import IGNORE_INDEX, num_targets
from hf_hetero.samples.rows import PACKED_COLUMN
from hf_hetero.step import RankMicroBatch, StepBatch, StepExamples

MARKS_OF_TEXT = frozenset({KINDS, f"moe_{KINDS}"})
"""Inputs that are 0 for a token of text, which some models that see images want in training."""

logger = logging.getLogger(__name__)


@dataclass
class PackedCollator:
    """`PackedCollator` packs samples, shifts labels inside each of them, and keeps this rank's spans.

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
        aligned: a label is the target of its own token, and not of the one before it. The trainer sets it.
        length_column: of the dataset, by which steps are planned; None: its tokens were counted.
        weight_column: what the loss of each token is multiplied by, or of all tokens of a row; None: all weigh 1.
        sight: how rows hold images; None: such rows are refused. The trainer sets it.
        blind: why, in words.
        towers: what images take beside their tokens; None: nobody knows. The trainer sets it.
        source_column: where a row is from, for the log; None: nobody asks.
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
    aligned: bool = field(default=False, repr=False)
    length_column: str | None = None
    weight_column: str | None = None
    sight: Sight | None = field(default=None, repr=False)
    blind: str = field(default="", repr=False)
    towers: Towers | None = field(default=None, repr=False)
    source_column: str | None = None

    def __call__(self, batch: StepExamples | Sequence[Example]) -> StepBatch | dict[str, torch.Tensor]:
        """Return the tensors of a step, or of an ordinary batch.

        Raises:
            BadSample: no `input_ids`, no tokens, labels of another length, not the tokens that were planned for, or
                more or others than the model has.
        """
        return self._step(batch) if isinstance(batch, StepExamples) else self._padded(batch)

    def _step(self, batch: StepExamples) -> StepBatch:
        """Pack this rank's spans of each micro-batch, and count the targets that are its own."""
        share = batch.share
        drawn, whole, samples = share.step.drawn, dict[int, Sample](), dict[int, Sample]()
        # a row is read once, and cut into the samples that this rank holds parts of
        for position, example in batch.examples.items():
            row, start = drawn.rows[position], drawn.starts[position]
            if row not in whole:
                whole[row] = self.sample(example, f"row {row}", drawn.row_tokens[position])
            end = start + drawn.lengths[position]
            samples[position] = self._part(whole[row], start, end, f"row {row}")
            self.limits.check_length(samples[position].num_positions, f"row {row}")
        micro_batches: list[RankMicroBatch] = []
        total = 0
        for group in share.groups:
            layout = share.layout(group)
            spans = layout.spans[group.ranks.index(share.rank)]
            pack = [samples.get(position) for position in group.samples]
            inputs = pack_spans(spans, pack, unshifted=self.keeps_labels_unshifted)
            for name in self.model_inputs & MARKS_OF_TEXT - set(inputs):
                inputs[name] = torch.zeros_like(inputs["input_ids"])
            seen = {n: sample.seen for n, sample in enumerate(pack) if sample is not None and sample.seen is not None}
            inputs |= packed_pictures(spans, seen)
            # a span counts its own targets, and the spans of a sample partition it: over all ranks each counts once
            total += sum(self.num_counted(sample_of(pack, span), span) for span in spans)
            reaches = tuple(sample_of(pack, span).num_positions for span in spans)
            labels, scored = labels_of(spans, pack), scored_of(spans, pack)
            sources = self._sources(batch, [group.samples[span.sample] for span in spans])
            mutual = {n: sample.mutual for n, sample in enumerate(pack) if sample is not None and sample.mutual}
            found = RankMicroBatch(group, layout, spans, inputs, labels, reaches, True, scored, sources, mutual)
            micro_batches.append(found)
        # ranks that read the same row compare these: what differs would be learned in parts of two samples
        fingerprints = {row: whole[row].fingerprint() for row in share.step.shared_rows() if row in whole}
        return StepBatch(share, tuple(micro_batches), total, fingerprints)

    def _sources(self, batch: StepExamples, positions: Sequence[int]) -> tuple[str, ...] | None:
        """Return where the rows of some samples are from; None: nobody asks, as in an evaluation.

        Raises:
            BadSample: a row does not say it.
        """
        if self.source_column is None or not self.needs_labels:
            return None
        return tuple(
            source_of(batch.examples[position], self.source_column, f"row {batch.share.step.rows[position]}")
            for position in positions
        )

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """Read one row as what is trained on: without its padding, with its labels.

        Args:
            example: a row of the dataset.
            name: of the row, for messages.
            planned_tokens: tokens that it was planned with.

        Raises:
            BadSample: as for a call.
        """
        if "input_ids" not in example and not self.makes_tokens:
            raise BadSample(f"{name} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
        is_packed = PACKED_COLUMN in example
        loss_weights = None if self.weight_column is None else weights_of(example, self.weight_column, name)
        example, images = self._collated(example, name)
        num_in_row = len(example["input_ids"])
        row = read_row(example, self.model_inputs, name, self.blind)
        positions, others = row.positions(is_packed, name), dict(row.values)
        if self.limits.padding is not None and "position_ids" not in others:
            positions = None  # padding before a sample takes no positions there
        has_positions = others.pop("position_ids", None) is not None
        input_ids, labels = others.pop("input_ids").long(), others.pop("labels", None)
        labels = self._labels(input_ids, labels, name)
        if planned_tokens is not None and input_ids.numel() != planned_tokens:
            raise BadSample(
                f"{name} has {input_ids.numel()} tokens but was planned with {planned_tokens}. {self._remedy()}"
            )
        if not input_ids.numel():
            raise BadSample(f"{name} has no tokens. Filter empty samples out of the dataset.")
        self._check(input_ids, labels, row, name)
        inputs = {key: values for key, values in others.items() if key in self.model_inputs}
        seen = None if self.sight is None else self.sight.seen(images, input_ids, name)
        if seen is not None and self.sight is not None and self.sight.positions is not None and not has_positions:
            positions = self.sight.positions.of(input_ids, inputs, all_inputs(seen), name)
        # only a loss of the user's own, which gets labels as transformers has them, could read anything else
        weights = (
            {key: values for key, values in others.items() if key not in inputs} if self.keeps_labels_unshifted else {}
        )
        if loss_weights is not None and self.weight_column is not None:
            weights[LOSS_WEIGHTS] = of_each_token(loss_weights, row, num_in_row, name, self.weight_column)
        if self.sight is not None:  # beside rows with images, which have them
            marks = {key: torch.zeros_like(input_ids) for key in self.model_inputs & MARKS_OF_TEXT}
            inputs = {**marks, **self.sight.marks(input_ids), **inputs}
        mutual = () if self.sight is None else self.sight.stretches(inputs, name)
        aligned, padding = self.aligned, self.limits.padding
        return Sample(input_ids, labels, positions, inputs, weights, padding, aligned, seen=seen, mutual=mutual)

    def _part(self, row: Sample, start: int, end: int, name: str) -> Sample:
        """Cut a sample out of its row."""
        return row.part(start, end, name)

    def _collated(self, example: Example, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return what is looked at of a row, and its images, as the user's collator makes them."""
        example, images = self._without_images(self.looked_at(example), name)
        if self.example_collator is not None:
            # patches of an image need not be one row a sample; a collator may give them another dim for that
            batch, made = self._without_images(self.example_collator([{**example, **images}]), name)
            images = images or made
            refuse_seen(batch, self.model_inputs, name, self.blind)
            example = {key: values[0] for key, values in batch.items() if has_rows(values)}
        if "input_ids" not in example:
            raise BadSample(f"{name}: the data_collator makes no input_ids of it, only {sorted(example)}.")
        return example, images

    def _check(self, input_ids: torch.Tensor, labels: torch.Tensor | None, row: Row, name: str) -> None:
        """Refuse tokens and labels that the model does not have, or that plain training would learn otherwise."""
        self.limits.check_tokens(input_ids, labels, name, self.aligned)
        self._check_first_label(labels, row.unpadded, name)

    @property
    def makes_tokens(self) -> bool:
        """Return whether rows may come without tokens, which the collator makes of their text and images."""
        return self.sight is not None and self.example_collator is not None

    def _without_images(self, example: Example, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Take the images that the model can be given out of a row, or out of a batch with one row."""
        if self.sight is None:
            return dict(example), {}
        images = self.sight.inputs_of(example, name)
        return {key: values for key, values in example.items() if key not in self.sight.inputs}, images

    def looked_at(self, example: Example) -> dict[str, Any]:
        """Return a row without the columns that are not looked at, and those of the plan, which no collator knows."""
        return {
            key: values
            for key, values in example.items()
            if key not in (self.weight_column, self.source_column) and (self.columns is None or key in self.columns)
        }

    def _labels(self, input_ids: torch.Tensor, labels: torch.Tensor | None, name: str) -> torch.Tensor | None:
        """Return a row's labels, or make them of its tokens; None where it has none and needs none."""
        if labels is None and self.makes_labels:
            if self.says_so:
                logger.warning("%s has no labels: all tokens of such rows are learned.", name)
                self.says_so = False
            return input_ids
        if labels is None and self.needs_labels:
            raise BadSample(
                f"{name} has no labels, so there is nothing to learn. Give the dataset a labels column, or make labels "
                "of the tokens: data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), or "
                "hf_hetero.collators.PackedCollator()."
            )
        return None if labels is None else labels.long()

    def num_counted(self, sample: Sample, span: Span) -> int:
        """Count what a span has of that by which the loss of a step is divided: its targets."""
        if self.counts_first_label and sample.labels is not None:
            return num_targets(sample.labels[span.start : span.end])
        return num_targets(sample.targets[span.start : span.end])

    def check_padding(self, rows: Iterable[Example]) -> None:
        """Refuse a collator that pads on the left, where Trainer's loss would learn first tokens from the padding.

        Args:
            rows: of the dataset; two of different lengths show it.

        Raises:
            BadSample: the collator does, and first tokens have labels.
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
        pair = [by_length[shorter], *(example for length, example in by_length.items() if length != shorter)]
        batch = self.example_collator([self.looked_at(example) for example in pair])
        if (mask := batch.get("attention_mask")) is None or batch.get("labels") is None:
            return
        first = int(torch.as_tensor(mask[0]).bool().int().argmax())  # of the shorter row, the one that was padded
        if first and int(batch["labels"][0][first]) != IGNORE_INDEX and not self.aligned:
            raise BadSample(
                "The data_collator pads on the left, where Trainer's loss learns the first token of a sample from the "
                'padding before it. Pad on the right: tokenizer.padding_side = "right".'
            )

    def _check_first_label(self, labels: torch.Tensor | None, unpadded: slice, name: str) -> None:
        """Refuse a first token with a label after padding, from which Trainer's loss would learn it."""
        is_learned = labels is not None and int(labels[0]) != IGNORE_INDEX
        if self.needs_labels and unpadded.start and is_learned and not self.aligned:
            raise BadSample(
                f"{name} is padded on the left and its first token has a label: Trainer would learn it from the "
                f"padding. Pad on the right, or give the first token the label {IGNORE_INDEX}."
            )

    def num_tokens(self, example: Example, name: str) -> int:
        """Count the tokens of the sample that an example becomes.

        Raises:
            BadSample: as for a step.
        """
        return self.sample(example, name).input_ids.numel()

    def _remedy(self) -> str:
        """Say what to do against a sample of another length than was planned for."""
        if self.length_column is not None:
            return f"Remove the dataset's {self.length_column} column, or make it count what is trained on."
        collator = getattr(self.example_collator, "__qualname__", type(self.example_collator).__qualname__)
        also = "" if self.example_collator is None else f", and the collator {collator},"
        return f"So many were counted before: the dataset{also} must give a row as many tokens at each read."

    def _padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make an ordinary batch: rows padded on the right to the longest of them."""
        rows = [self.sample(example, f"sample {position} of the batch") for position, example in enumerate(examples)]
        if any(row.seen is not None or row.mutual for row in rows):
            raise BadSample("Rows with images are packed by a plan only. Leave HeteroConfig.plan_evaluation on.")

        def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row.input_ids) for row in rows], 0),
        }
        labels = [row.labels for row in rows if row.labels is not None]
        return {**batch, "labels": pad(labels, IGNORE_INDEX)} if len(labels) == len(rows) else batch
