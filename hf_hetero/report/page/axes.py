"""Axes of a chart: where values stand, which of them are named, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_hetero.report.page.markup import Html, element, joined

WIDTH, HEIGHT = 460.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 24.0, 34.0
"""Of a chart, in units that are pixels on a screen of medium width; what is outside the axes is for their names."""
MOST_TICKS = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """A `Scale` says where values stand: `low` at `start`, `high` at `end`, in units of the chart."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return where a value stands; outside the scale it stands at its end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def across(low: float, high: float) -> Scale:
    """Make a scale from left to right."""
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def upwards(high: float, low: float = 0.0) -> Scale:
    """Make a scale from the bottom, which is 0 or below, to the top; both are round numbers around the values."""
    return around(min(low, 0.0), max(high, 0.0))


def around(low: float, high: float) -> Scale:
    """Make a scale from the bottom to the top, both round numbers around the values, wherever 0 is."""
    ticks = round_ticks(low, high if high > low else low + 1.0)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    bottom = ticks[0] if ticks[0] <= low else ticks[0] - step
    return Scale(bottom, ticks[-1] if ticks[-1] >= high else ticks[-1] + step, HEIGHT - BOTTOM, TOP)


def round_ticks(low: float, high: float, most: int = MOST_TICKS, least_step: float = 0.0) -> list[float]:
    """List round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten, at most `most`."""
    if not high > low:
        return [low]
    rough = max((high - low) / max(most - 1, 1), least_step, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough * (1 - 1e-9))
    if least_step:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Write a number shortly, to three digits: 12.1K, 3.4M, 0.012; in thousands of 1000."""
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if size >= limit * 0.9995:
            return f"{_digits(value / limit)}{unit}"
    return _digits(value)


def tokens(count: float) -> str:
    """Write a length: 1536 as 1.5K, in thousands of 1024, as models' contexts are."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size:
            return f"{_digits(count / size)}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Write seconds: 830 ms, 12.3 s, 4:05 min, 7:12 h."""
    if seconds < 1:
        return f"{_digits(1000 * seconds)} ms"
    if seconds < 100:
        return f"{_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def frame(x: Scale, y: Scale, x_ticks: Sequence[tuple[float, str]], x_name: str, y_name: str) -> Html:
    """Draw axes: lines across at round numbers, names of both, and ticks below.

    Args:
        x, y: the scales.
        x_ticks: values and what is written below them.
        x_name, y_name: with their units.
    """
    parts: list[Html] = []
    for value in round_ticks(y.low, y.high):
        at = y.at(value)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid" if value else "base"))
        parts.append(element("text", number(value), x=x.start - 6, y=at + 3.5, class_="tick end"))
    for value, words in x_ticks:
        parts.append(element("text", words, x=x.at(value), y=y.start + 14, class_="tick middle"))
    parts.append(element("text", x_name, x=x.end, y=HEIGHT - 4, class_="axis end"))
    parts.append(element("text", y_name, x=0.0, y=10.0, class_="axis"))
    return joined(*parts)


def step_ticks(x: Scale) -> list[tuple[float, str]]:
    """Name whole steps on a scale of steps."""
    return [(value, f"{value:,.0f}") for value in round_ticks(x.low, x.high, 6, least_step=1.0)]


def _digits(value: float) -> str:
    """Write three digits."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
