"""A preference pair is one prompt and two completions; here it becomes a packed row of two samples: chosen, rejected.

Both samples have the prompt's tokens, and neither sees the other. What is learned of them are their completions, so
the prompt has no labels. Columns are those of TRL's `DPOTrainer`, after it has tokenised a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.samples.rows import PACKED_COLUMN, last_token

PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Log-probabilities of both completions by a reference model, where they were computed before."""
MARGIN = "margin"
"""By how much a reward should be larger than the other, where a dataset says so."""
NOT_LEARNED = -100
"""The label of a token without a target, as everywhere in torch and transformers."""


@dataclass(frozen=True, slots=True)
class PairRows:
    """`PairRows` makes packed rows of preference pairs.

    Args:
        most_tokens: of a prompt with a completion; None: any number.
        keeps_end: longer ones lose their first tokens, instead of their last ones.

    Attributes:
        column: of a packed row, with a number for each token: that of its sequence, where a pair has numbers.
        columns: all such columns of a packed row.
        references: columns of a pair with the log-probability of each of its samples by a reference model.
    """

    most_tokens: int | None = None
    keeps_end: bool = False
    column: ClassVar[str] = "of_pair"
    columns: ClassVar[tuple[str, ...]] = (column,)
    references: ClassVar[tuple[str, ...]] = REFERENCE_COLUMNS

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
            row[self.column] = np.repeat([float(pair[name]) for name in REFERENCE_COLUMNS], tokens)
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


@dataclass(frozen=True, slots=True)
class ScoredRows(PairRows):
    """`ScoredRows` makes packed rows of pairs of whole sequences, each of which is to have one score.

    The label of a sequence is where the token is whose score counts: the last one that is not padding, as transformers
    finds it, which takes an end of text for padding where both are the same token.

    Args:
        pad_token_id: of the tokenizer.
    """

    pad_token_id: int = 0

    def row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pair's columns, and those of the packed row that it is.

        Raises:
            BadSample: a sequence is missing.
        """
        if missing := [name for name in (CHOSEN, REJECTED) if name not in pair]:
            raise BadSample(f"A row has no {', '.join(missing)}, only {sorted(pair)}. Have RewardTrainer tokenise it.")
        sequences = [list(pair[name]) for name in (CHOSEN, REJECTED)]
        tokens = [len(ids) for ids in sequences]
        labels = [self._label(ids) for ids in sequences]
        row = {**pair, "input_ids": sequences[0] + sequences[1], "labels": labels[0] + labels[1], PACKED_COLUMN: tokens}
        if pair.get(MARGIN) is not None:
            row[self.column] = np.full(sum(tokens), float(pair[MARGIN]))
        return row

    def _label(self, ids: list[int]) -> list[int]:
        """Return labels of which one is a token; of a sequence of padding alone it is the first."""
        scored = last_token(ids, self.pad_token_id)
        return [token if place == scored else NOT_LEARNED for place, token in enumerate(ids)]


@dataclass(frozen=True, slots=True)
class ContrastedRows(PairRows):
    """`ContrastedRows` makes packed rows of pairs of whole sequences with labels, as TRL's `CPOTrainer` tokenises them.

    `column` has a 1 for each token that is followed by one of a completion, for these are compared; what is learned of
    a chosen sequence may be more.

    Args:
        learns_prompts: a chosen sequence is learned with its prompt.
    """

    learns_prompts: bool = False

    def row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Return a pair's columns, and those of the packed row that it is.

        Raises:
            BadSample: a sequence is missing.
        """
        names = [f"{which}_{what}" for which in ("chosen", "rejected") for what in ("input_ids", "labels")]
        if missing := [name for name in names if name not in pair]:
            raise BadSample(f"A row has no {', '.join(missing)}, only {sorted(pair)}. Have CPOTrainer tokenise it.")
        chosen, of_chosen, rejected, of_rejected = (list(pair[name]) for name in names)
        compared = [
            int(label != NOT_LEARNED) for labels in (of_chosen, of_rejected) for label in [*labels[1:], NOT_LEARNED]
        ]
        return {
            **pair,
            "input_ids": chosen + rejected,
            "labels": (chosen if self.learns_prompts else of_chosen) + of_rejected,
            PACKED_COLUMN: [len(chosen), len(rejected)],
            self.column: np.asarray(compared),
        }


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
                "both. Plan pairs as items, as hf_hetero.trainer.pairs.plans.PlansOfPairs does."
            )
