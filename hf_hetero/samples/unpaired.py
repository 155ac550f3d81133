"""An unpaired preference is a prompt, a completion, and whether it is wanted; here it becomes a packed row.

Its first sample is the prompt with its completion, which is learned. The second one, where there is one, is the prompt
with the completion of another row: nothing is learned of it, but how far a model has moved on such mismatched ones is
what its loss is compared with (KTO, arXiv:2402.01306). Columns are those of TRL's `KTOTrainer`, after it has tokenised
a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hf_hetero.errors import BadSample
from hf_hetero.samples.pairs import NOT_LEARNED, PROMPT, PairRows
from hf_hetero.samples.rows import PACKED_COLUMN

COMPLETION, MISMATCHED, LABEL = "completion_ids", "KL_completion_ids", "label"
REFERENCE_COLUMNS = {COMPLETION: "ref_logps", MISMATCHED: "ref_KL_logps"}
"""Log-probabilities of the completions by a reference model, where they were computed before."""
WANTED, UNWANTED, NOTHING = 1, -1, 0


@dataclass(frozen=True, slots=True)
class UnpairedRows(PairRows):
    """`UnpairedRows` makes packed rows of unpaired preferences.

    Attributes:
        sign: column with a number for each token: `WANTED` or `UNWANTED`, or `NOTHING` in a mismatched sample.
    """

    sign: ClassVar[str] = "of_unpaired"
    columns: ClassVar[tuple[str, ...]] = (PairRows.column, sign)
    references: ClassVar[tuple[str, ...]] = tuple(REFERENCE_COLUMNS.values())

    def row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Return a preference's columns, and those of the packed row that it is.

        Raises:
            BadSample: one of them is missing.
        """
        if missing := [name for name in (PROMPT, COMPLETION, LABEL) if name not in pair]:
            raise BadSample(f"A row has no {', '.join(missing)}, only {sorted(pair)}. Have KTOTrainer tokenise it.")
        names, prompt = [name for name in (COMPLETION, MISMATCHED) if name in pair], list(pair[PROMPT])
        kept = [self._kept([*prompt, *pair[name]]) for name in names]
        labels = [self._kept([*[NOT_LEARNED] * len(prompt), *pair[name]]) for name in names]
        tokens, signs = [len(ids) for ids in kept], [WANTED if pair[LABEL] else UNWANTED, NOTHING]
        row = {
            **pair,
            "input_ids": [token for ids in kept for token in ids],
            "labels": [label for one in labels for label in one],
            PACKED_COLUMN: tokens,
            self.sign: np.repeat(signs[: len(names)], tokens),
        }
        if all(REFERENCE_COLUMNS[name] in pair for name in names):
            row[self.column] = np.repeat([float(pair[REFERENCE_COLUMNS[name]]) for name in names], tokens)
        return row
