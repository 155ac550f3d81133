"""However narrow a terminal is, a table loses nothing: numbers stay whole, and every column is somewhere."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hetero.terminal.fitting import Cells, fitted

WORDS = st.text("ab- ", max_size=30)
COLUMNS = st.integers(1, 5).flatmap(
    lambda num_rows: st.lists(
        st.builds(
            Cells,
            st.lists(WORDS.filter(str.strip), max_size=2).map(tuple),
            st.lists(WORDS, min_size=num_rows, max_size=num_rows).map(tuple),
            st.booleans(),
        ),
        min_size=1,
        max_size=9,
    )
)


@settings(deadline=None)
@given(COLUMNS, st.integers(1, 160), st.data())
def test_nothing_is_lost(columns: list[Cells], width: int, data: st.DataObject) -> None:
    """Each column is in one part, the key in all; numbers are as wide as their longest; a part fits if it can."""
    key = data.draw(st.integers(0, len(columns) - 1))
    parts = fitted(columns, key, width)
    others = [number for part in parts for number in part.columns[1:]]
    assert others == [number for number in range(len(columns)) if number != key]
    for part in parts:
        assert part.columns[0] == key
        assert part.width <= width or len(part.columns) <= 2
        for number, letters in zip(part.columns, part.widths, strict=True):
            longest = max(map(len, columns[number].cells))
            if not columns[number].is_text:
                assert letters >= longest
            assert letters >= min(longest, 12)


def columns_of(*widths: int, is_text: bool = False) -> list[Cells]:
    return [Cells((f"{'t' * (width // 2)} {'t' * (width // 2)}",), ("1" * (width // 2),), is_text) for width in widths]


def test_what_gives_way_first() -> None:
    """Titles are wrapped, then the frame goes, then words are wrapped, then columns move to a table below."""
    table = [*columns_of(10, 10), Cells(("words",), ("word " * 8,), True)]
    assert [part.is_framed for part in fitted(table, 0, 80)] == [True]
    (whole,) = fitted(table, 0, 11 + 11 + 40 + 10)
    assert whole.widths == (11, 11, 40)
    (wrapped,) = fitted(table, 0, whole.width - 1)
    assert (wrapped.widths, wrapped.is_framed) == ((5, 5, 40), True)
    (bare,) = fitted(table, 0, wrapped.width - 1)
    assert (bare.widths, bare.is_framed) == ((5, 5, 40), False)
    (narrow,) = fitted(table, 0, bare.width - 1)
    assert (narrow.widths[:2], narrow.is_framed) == ((5, 5), True)
    assert narrow.widths[2] < 40
    assert [part.columns for part in fitted(table, 0, 24)] == [(0, 1), (0, 2)]


def test_the_key_may_be_any_column() -> None:
    """It comes first, and again in each part."""
    parts = fitted(columns_of(*[10] * 6), 5, 20)
    assert [part.columns for part in parts] == [(5, 0, 1), (5, 2, 3), (5, 4)]
