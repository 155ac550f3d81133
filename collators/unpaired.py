"""`UnpairedCollator` packs unpaired preferences: rows of a completion, and of another that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.sample import Example, Sample
from hf_hetero.errors import HeteroError
from hf_hetero.layout import Span
from hf_hetero.samples.rows import PACKED_COLUMN
from hf_hetero.samples.unpaired import NOTHING, UnpairedRows
from hf_hetero.step import Step, StepBatch, StepExamples

ROW = ("input_ids", "labels", PACKED_COLUMN, *UnpairedRows.columns)
"""What is packed of a row; the tokens of prompt and completions, which it has, too, are not handed to the model."""
COMPARED = "compared"
"""Among the inputs of a micro-batch: its samples are mismatched ones, of which nothing is learned."""


@dataclass
class UnpairedCollator(PackedCollator):
    """`UnpairedCollator` packs rows of `UnpairedRows`, and divides a step's loss by its completions."""

    def _step(self, batch: StepExamples) -> StepBatch:
        """Pack this rank's spans, and mark micro-batches of mismatched samples, which all come first.

        Raises:
            HeteroError: the plan mixes both, or has them in another order.
        """
        compared = _compared(batch.share.step)
        made = super()._step(batch)
        mark = torch.ones(1, 1, dtype=torch.long)
        micro_batches = (
            replace(one, inputs={**one.inputs, COMPARED: mark}, learns=False) if index < compared else one
            for index, one in enumerate(made.micro_batches)
        )
        return replace(made, micro_batches=tuple(micro_batches))

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """Read a packed row, without the columns of the preference that it was made of."""
        row = {key: example[key] for key in ROW if key in example} if "input_ids" in example else example
        return super().sample(row, name, planned_tokens)

    def num_counted(self, sample: Sample, span: Span) -> int:
        """Count a completion once, where its first token is; a mismatched one counts for nothing."""
        return int(span.start == 0 and int(sample.inputs[UnpairedRows.sign][0]) != NOTHING)


def _compared(step: Step) -> int:
    """Count the micro-batches of mismatched samples, which are those that do not start their row.

    Raises:
        HeteroError: they are not the first ones, or are mixed with others.
    """
    kinds = [
        {step.drawn.starts[sample] > 0 for group in micro_batch.groups for sample in group.samples}
        for micro_batch in step.plan.micro_batches
    ]
    compared = sum(True in kind for kind in kinds)
    if any(False in kind for kind in kinds[:compared]):
        raise HeteroError(
            "The plan has completions in a micro-batch before the last mismatched ones, to which they are compared. "
            "Plan the mismatched ones first, as hf_hetero.trainer.pairs.plans.PlansOfUnpaired does."
        )
    return compared
