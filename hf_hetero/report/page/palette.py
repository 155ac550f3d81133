"""Colours of degrees, from one rank to all of them, that also those can tell apart who see fewer colours.

The order is in the lightness: the more ranks share a sample, the more its colour stands out from the ground, be that
light or dark. Hues run from green over blue to violet, as in ColorBrewer's "YlGnBu" (Brewer, 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

STOPS = 12
"""Colours of a ramp; a run of more degrees shows two of them alike."""
LIGHT = ("#d3e9cd", "#93d1c1", "#4eb3c6", "#2c8bbf", "#2b62ab", "#31398f", "#1b1a55")
DARK = ("#2b3f78", "#2f63a3", "#3289b8", "#4fb0bf", "#8ccfb8", "#c8e6b2", "#f5f6cf")
INK, PAPER = "#000000", "#ffffff"


def colour_of(degree: int, degrees: Sequence[int]) -> str:
    """Return the class of a degree, among those of the run, ascending; few of them keep away from the ramp's ends."""
    if len(degrees) == 1:
        return f"ramp-{STOPS // 3}"
    first, last = (0, STOPS - 1) if len(degrees) > 4 else (1, 2 + 2 * len(degrees))
    return f"ramp-{first + round(degrees.index(degree) * (last - first) / (len(degrees) - 1))}"


def ramp_css(anchors: Sequence[str]) -> str:
    """Return the colours as variables of a style sheet, `--ramp-0` to `--ramp-11`, and of text upon them."""
    variables: list[str] = []
    for number in range(STOPS):
        colour = _between(anchors, number / (STOPS - 1))
        variables.append(f"--ramp-{number}:{_hex(colour)};--on-{number}:{_text_on(colour)}")
    return ";".join(variables)


def contrast(one: str, other: str) -> float:
    """Return how well two colours can be told apart, 1 to 21 (WCAG 2, "contrast ratio")."""
    low, high = sorted((_luminance(_rgb(one)), _luminance(_rgb(other))))
    return (high + 0.05) / (low + 0.05)


def _between(anchors: Sequence[str], share: float) -> tuple[float, ...]:
    """Return the colour at this share of the way along the anchors."""
    place = share * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    rest = place - low
    return tuple(a + rest * (b - a) for a, b in zip(_rgb(anchors[low]), _rgb(anchors[low + 1]), strict=True))


def _text_on(colour: tuple[float, ...]) -> str:
    """Return ink or paper, whichever can be read on a colour."""
    return max((INK, PAPER), key=lambda text: contrast(text, _hex(colour)))


def _luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of a colour (WCAG 2)."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _rgb(text: str) -> tuple[float, ...]:
    return tuple(int(text[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)
