"""Words that came from data, files or models are shown as they are: they steer no terminal."""

from __future__ import annotations

import unicodedata

STEERING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of Unicode: controls, halves of letters, ends of lines and of paragraphs."""
TURNING = frozenset(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""Marks that turn the direction of what follows, so that it reads as something else."""


def literal(text: str, encoding: str = "utf-8") -> str:
    r"""Write text so that it steers nothing: ends of lines and tabs as blanks, all other control as escapes (`\x1b`).

    Args:
        text: whatever it holds.
        encoding: of the terminal; a letter that it lacks is an escape, too.
    """
    shown = "".join(" " if sign in "\n\t" else _escape(sign) if _steers(sign) else sign for sign in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _steers(sign: str) -> bool:
    return sign in TURNING or unicodedata.category(sign) in STEERING


def _escape(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) <= 0xFF else f"\\u{ord(sign):04x}"
