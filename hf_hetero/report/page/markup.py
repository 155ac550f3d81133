"""Elements of HTML and SVG, made so that text cannot become markup: whatever is not an element already is escaped."""

from __future__ import annotations

import json
from html import escape

VOID = {"meta", "br"}
"""Elements of HTML without an end."""
EMPTY = {"circle", "line", "path", "rect"}
"""Elements of SVG that end where they begin; HTML would take what follows for their content."""


class Html(str):
    """An `Html` is markup; any other text is not."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: object) -> Html:
    """Make an element.

    Args:
        tag: its name.
        content: elements as they are, and text, which is escaped.
        attributes: by name, `_` for `-` (so that `class_` is `class`); numbers are rounded to hundredths; None: left
            out.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID or tag in EMPTY:
        return Html(f"<{tag}{named}{'/' if tag in EMPTY else ''}>")
    return Html(f"<{tag}{named}>{joined(*content)}</{tag}>")


def joined(*content: str) -> Html:
    """Put elements and text one after the other; text is escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content))


def data_block(name: str, data: object) -> Html:
    """Hold data for a script, as JSON that no parser of HTML can take for the end of the block."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _value(value: object) -> str:
    """Write an attribute: floats without the digits that no screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
