"""`TextsCollator` packs texts that belong together; each is a sample of its own, anywhere in the step."""

from __future__ import annotations

from dataclasses import dataclass

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.sample import Example, Sample
from hf_hetero.layout import Span
from hf_hetero.samples.rows import PACKED_COLUMN

ROW = ("input_ids", PACKED_COLUMN)


@dataclass
class TextsCollator(PackedCollator):
    """`TextsCollator` packs rows of `hf_hetero.samples.texts.TextRows`, and counts texts.

    The labels, which are tokens, say only that there is something to learn: the loss is of what texts are as a whole.
    """

    def sample(self, example: Example, name: str, planned_tokens: int | None = None) -> Sample:
        """Read a packed row."""
        return super().sample({key: example[key] for key in ROW if key in example}, name, planned_tokens)

    def num_counted(self, sample: Sample, span: Span) -> int:
        """Count a text once: where its first token is."""
        return int(span.start == 0)
