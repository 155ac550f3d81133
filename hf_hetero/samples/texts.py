"""A row of several texts that belong together, such as a query and a passage, becomes a packed row: a sample a text.

No text sees another, and each may be planned anywhere: what they have to do with each other is known by their places in
the row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_hetero.errors import BadSample
from hf_hetero.samples.rows import PACKED_COLUMN, as_array

FIRST, SECOND, OTHERS = ("anchor", "query"), ("positive", "passage"), "negative"
"""What columns of texts are called, where nobody says otherwise; of others there may be none, or several."""


@dataclass(frozen=True, slots=True)
class TextRows:
    """`TextRows` make packed rows of rows of texts.

    Args:
        columns: of the texts, in order; empty: found by their names.
        tokenise: makes tokens of a text; None: rows have tokens.
    """

    columns: tuple[str, ...] = ()
    tokenise: Callable[[str], Sequence[int]] | None = None

    def row(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the packed row that a row of texts is.

        Raises:
            BadSample: a text is missing, has no tokens, or cannot be tokenised.
        """
        columns = self.columns or found_columns(given)
        texts = [self._tokens(given, column) for column in columns]
        return {"input_ids": [token for text in texts for token in text], PACKED_COLUMN: [len(text) for text in texts]}

    def of(self, dataset: Any) -> Any:
        """Return a view of a dataset, whose rows are packed ones, made when read."""
        is_stream = not hasattr(dataset, "__getitem__")
        return dataset.map(self.row, remove_columns=dataset.column_names) if is_stream else ViewedRows(dataset, self)

    def _tokens(self, given: Mapping[str, Any], column: str) -> list[int]:
        text = given.get(column)
        if isinstance(text, str) and self.tokenise is not None:
            text = self.tokenise(text)
        if text is None or isinstance(text, str):
            what = "no" if text is None else "text in its"
            raise BadSample(
                f"A row has {what} column {column!r}, of {sorted(given)}. Give each row the tokens of its texts, or "
                "their words, and the trainer a processing_class; name the columns where they are called otherwise."
            )
        tokens = as_array(text).tolist()
        if not tokens:
            raise BadSample(f"A row has no tokens in its column {column!r}. Leave such rows out.")
        return tokens


@dataclass(frozen=True, eq=False)
class ViewedRows:
    """`ViewedRows` are rows of a map-style dataset as packed rows."""

    dataset: Any
    rows: TextRows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows.row(self.dataset[number])


def found_columns(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of a row of texts, by their names: the anchor, what is to be near it, what is not.

    Raises:
        BadSample: there is no anchor, or nothing that is to be near it.
    """
    two = [next((name for name in names if name in given), None) for names in (FIRST, SECOND)]
    if None in two:
        raise BadSample(
            f"A row has the columns {sorted(given)}: one of {' or '.join(FIRST)}, one of {' or '.join(SECOND)}, and "
            f"any whose names begin with {OTHERS!r} are expected. Name them: columns=[...]."
        )
    return (*(name for name in two if name is not None), *sorted(name for name in given if name.startswith(OTHERS)))
