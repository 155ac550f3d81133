"""A preference pair is one prompt and two completions; here it becomes a packed row of two samples: chosen, rejected.

Both samples have the prompt's tokens, and neither sees the other. What is learned of them are their completions, so
the prompt has no labels. Columns are those of TRL's `DPOTrainer`, after it has tokenised a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.samples.rows import PACKED_COLUMN

PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Log-probabilities of both completions by a reference model, where they were computed before."""
REFERENCE = "ref_logps"
"""The same, as a packed row has them: for each token that of the completion it is of."""
NOT_LEARNED = -100
"""The label of a token without a target, as everywhere in torch and transformers."""


@dataclass(frozen=True, slots=True)
class PairRows:
    """`PairRows` makes packed rows of preference pairs.

    Args:
        most_tokens: of a prompt with a completion; None: any number.
        keeps_end: longer ones lose their first tokens, instead of their last ones.
    """

    most_tokens: int | None = None
    keeps_end: bool = False

    def row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pair's columns, and those of the packed row that it is.

        Args:
            pair: with tokens of prompt, chosen and rejected completion.

        Raises:
            BadSample: one of them is missing.
        """
        if missing := [name for name in (PROMPT, CHOSEN, REJECTED) if name not in pair]:
            raise BadSample(
                f"A row has no {', '.join(missing)}, only {sorted(pair)}. Give it to DPOTrainer to tokenise."
            )
        prompt, completions = list(pair[PROMPT]), [list(pair[CHOSEN]), list(pair[REJECTED])]
        kept = [self._kept([*prompt, *completion]) for completion in completions]
        labels = [self._kept([*[NOT_LEARNED] * len(prompt), *completion]) for completion in completions]
        tokens = [len(ids) for ids in kept]
        row = {**pair, "input_ids": kept[0] + kept[1], "labels": labels[0] + labels[1], PACKED_COLUMN: tokens}
        if all(name in pair for name in REFERENCE_COLUMNS):
            row[REFERENCE] = np.repeat([float(pair[name]) for name in REFERENCE_COLUMNS], tokens)
        return row

    def rows(self, pairs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the same of several pairs, column by column."""
        made = [self.row(dict(zip(pairs, values, strict=True))) for values in zip(*pairs.values(), strict=True)]
        return {name: [row[name] for row in made] for name in made[0]}

    def of(self, dataset: Any, length_column: str = "") -> Any:
        """Return a view of a dataset of pairs, whose rows are packed ones, made when read.

        Args:
            dataset: a table or a stream.
            length_column: that is left out: a length of a row says nothing of its two sequences.
        """
        if not hasattr(dataset, "with_transform"):
            return dataset.map(self.row)
        names = [name for name in dataset.column_names if name in (length_column, PACKED_COLUMN)]
        return dataset.remove_columns(names).with_transform(self.rows)

    def _kept(self, values: list[int]) -> list[int]:
        """Return those of a sequence's values that are not cut off."""
        if self.most_tokens is None:
            return values
        return values[-self.most_tokens :] if self.keeps_end else values[: self.most_tokens]


def check_together(rows: Sequence[int], samples: Sequence[int], ranks: Sequence[int]) -> None:
    """Refuse a group that does not hold pairs whole: a loss of one half of a pair is that of no pair.

    Args:
        rows: of each sample of the global batch.
        samples: of a group, in the order in which they are packed.
        ranks: of the group, for the message.

    Raises:
        HeteroError: a pair is split.
    """
    for place in range(0, len(samples), 2):
        chosen, *others = samples[place : place + 2]
        is_first = not chosen or rows[chosen - 1] != rows[chosen]
        if not is_first or others != [chosen + 1] or rows[chosen] != rows[chosen + 1]:
            raise HeteroError(
                f"The plan gives ranks {list(ranks)} one half of the pair in row {rows[chosen]}, whose loss needs "
                "both. Plan pairs as items, as hf_hetero.data.plans_of_pairs.PlansOfPairs does."
            )
