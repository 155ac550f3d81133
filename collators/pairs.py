"""`PairCollator` packs preference pairs: rows of two samples whose loss is one."""

from __future__ import annotations

from dataclasses import dataclass

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.sample import Example, Sample
from hf_hetero.layout import Span
from hf_hetero.samples.pairs import PairRows, check_together
from hf_hetero.samples.rows import PACKED_COLUMN
from hf_hetero.step import StepBatch, StepExamples

ROW = ("input_ids", "labels", PACKED_COLUMN, PairRows.column)
"""What is packed of a row; the tokens of prompt and completions, which it has, too, are not handed to the model."""


@dataclass
class PairCollator(PackedCollator):
    """`PairCollator` packs rows of `hf_hetero.samples.pairs.PairRows`, and divides a step's loss by its pairs."""

    def _step(self, batch: StepExamples) -> StepBatch:
        """Pack this rank's spans, if each pair is in one group.

        Raises:
            HeteroError: the plan splits a pair.
        """
        for group in batch.share.step.plan.groups:
            check_together(batch.share.step.rows, group.samples, group.ranks)
        return super()._step(batch)

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """Read a packed row, without the columns of the pair that it was made of."""
        row = {key: example[key] for key in ROW if key in example} if "input_ids" in example else example
        return super().sample(row, name, planned_tokens)

    def num_counted(self, sample: Sample, span: Span) -> int:
        """Count a pair once: where the first token of its chosen sample is."""
        return int(span.sample % 2 == 0 and span.start == 0)
