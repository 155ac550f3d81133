"""PackedCollator: samples of any length into one rank's tensors, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.attention.interface import planned_mask
from hf_hetero.errors import BadSample
from hf_hetero.layout import Span
from hf_hetero.loss import IGNORE_INDEX, num_targets, shift_labels
from hf_hetero.step import RankMicroBatch, StepBatch, StepExamples

Example = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, ready to be packed: tokens and their labels. Shape (num_tokens,)."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        """The label after each token; the last one has nothing to predict."""
        return shift_labels(self.labels)

    def fingerprint(self) -> int:
        """63 bits of its tokens and labels."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.input_ids, self.labels):
            digest.update(tensor.contiguous().numpy().data)
        return int.from_bytes(digest.digest(), "big") >> 1

    def part(self, start: int, end: int) -> Sample:
        """A stretch of it, as a sample of its own."""
        return Sample(self.input_ids[start:end], self.labels[start:end])


@dataclass
class PackedCollator:
    """Packs samples, shifts labels inside each of them, and keeps this rank's spans.

    Given a step's examples it returns this rank's tensors. Given a plain list of examples, as in evaluation, it is an
    ordinary collator: one padded batch with `input_ids`, `attention_mask` and `labels`.

    Args:
        example_collator: turns a list with one example into a batch with one row, for those who bring their own way of
            making labels (`DataCollatorForLanguageModeling`, for one). Without it, an example's `labels` are used, or
            its `input_ids` where it has none.
        pad_token_id: fills the rows of an ordinary batch.
    """

    example_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None
    pad_token_id: int = 0

    def __call__(self, batch: StepExamples | Sequence[Example]) -> StepBatch | dict[str, torch.Tensor]:
        """Tensors of a step, or of an ordinary batch.

        Raises:
            BadSample: no `input_ids`, no tokens, labels of another length, or not the tokens that were planned for.
        """
        return self._step(batch) if isinstance(batch, StepExamples) else self._padded(batch)

    def _step(self, batch: StepExamples) -> StepBatch:
        share = batch.share
        drawn, whole, samples = share.step.drawn, dict[int, Sample](), dict[int, Sample]()
        for position, example in batch.examples.items():
            row, start = drawn.rows[position], drawn.starts[position]
            if row not in whole:
                whole[row] = self._sample(example, f"row {row}", drawn.row_tokens[position])
            samples[position] = whole[row].part(start, start + drawn.lengths[position])
        micro_batches: list[RankMicroBatch] = []
        for group in share.groups:
            layout = share.layout(group)
            spans = layout.spans[group.ranks.index(share.rank)]
            inputs = pack_spans(spans, [samples.get(position) for position in group.samples])
            micro_batches.append(RankMicroBatch(group, layout, inputs))
        total = sum(num_targets(m.inputs["shift_labels"]) for m in micro_batches)
        fingerprints = {row: whole[row].fingerprint() for row in share.step.shared_rows() if row in whole}
        return StepBatch(share, tuple(micro_batches), total, fingerprints)

    def _sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        if "input_ids" not in example:
            raise BadSample(f"{name} has no input_ids, only {sorted(example)}. Tokenise the dataset first.")
        if self._restarts(example):
            raise BadSample(
                f"{name} was packed: its position_ids start anew within it. Give the dataset a seq_lengths column with "
                "the tokens of each document, as TRL's packing does, or do not pack: steps are packed anyway."
            )
        if self.example_collator is not None:
            row = self.example_collator([dict(example)])
            example = {name: row[name][0] for name in ("input_ids", "labels", "attention_mask") if name in row}
        input_ids = torch.as_tensor(example["input_ids"], dtype=torch.long)
        labels = example.get("labels")
        labels = input_ids if labels is None else torch.as_tensor(labels, dtype=torch.long)
        if labels.shape != input_ids.shape:
            raise BadSample(
                f"{name} has {input_ids.numel()} input_ids but {labels.numel()} labels. Give every token a label; "
                f"{IGNORE_INDEX} marks those not to learn from."
            )
        if (mask := example.get("attention_mask")) is not None:
            kept = torch.as_tensor(mask).bool()
            input_ids, labels = input_ids[kept], labels[kept]
        if planned_tokens is not None and input_ids.numel() != planned_tokens:
            raise BadSample(
                f"{name} has {input_ids.numel()} tokens but was planned with {planned_tokens}. "
                "Remove the dataset's length column, or make it count what is trained on."
            )
        if not input_ids.numel():
            raise BadSample(f"{name} has no tokens. Filter empty samples out of the dataset.")
        return Sample(input_ids, labels)

    @staticmethod
    def _restarts(example: Example) -> bool:
        if (positions := example.get("position_ids")) is None or "seq_lengths" in example:
            return False
        return bool((torch.as_tensor(positions).flatten().diff() < 0).any())

    def _padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        # the model shifts labels itself here; the first one is never a target
        rows = [self._sample(example, f"sample {position} of the batch") for position, example in enumerate(examples)]

        def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        return {
            "input_ids": pad([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row.input_ids) for row in rows], 0),
            "labels": pad([F.pad(row.labels[1:], (1, 0), value=IGNORE_INDEX) for row in rows], IGNORE_INDEX),
        }


def pack_spans(spans: Sequence[Span], samples: Sequence[Sample | None]) -> dict[str, torch.Tensor]:
    """Model inputs of one rank: its spans, one after the other. Shapes (1, num_tokens).

    Positions count within each sample. The loss reads `shift_labels`, what each token has to predict, since the next
    token may lie elsewhere; `labels` are each token's own. A rank without tokens runs one token that has no target and
    that attention leaves out: its gradient is zero, and the rank joins every collective.

    Args:
        spans: of one rank, in memory order.
        samples: of the pack; None where this rank holds nothing of them.
    """
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for span in spans:
        sample = samples[span.sample]
        assert sample is not None
        ids.append(sample.input_ids[span.start : span.end])
        labels.append(sample.labels[span.start : span.end])
        targets.append(sample.targets[span.start : span.end])
        positions.append(torch.arange(span.start, span.end))
    num_tokens = sum(span.num_tokens for span in spans)
    if not num_tokens:
        ids, positions = [torch.tensor([0])], [torch.tensor([0])]
        labels = targets = [torch.tensor([IGNORE_INDEX])]
    return {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": torch.cat(positions).unsqueeze(0),
        "labels": torch.cat(labels).unsqueeze(0),
        "shift_labels": torch.cat(targets).unsqueeze(0),
        "attention_mask": planned_mask(num_tokens, max(num_tokens, 1)),
    }
