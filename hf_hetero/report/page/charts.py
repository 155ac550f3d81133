"""Charts of a run, as SVG inside the page: lines over steps, planned against measured, bars.

Each is a `Chart`: its picture, the numbers behind it as a table for those who do not see it, and what the script needs
to say the values under the pointer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hf_hetero.report.page import axes
from hf_hetero.report.page.axes import HEIGHT, LEFT, RIGHT, WIDTH, Scale, across, frame, number, upwards
from hf_hetero.report.page.markup import Html, element, joined
from hf_hetero.report.page.palette import colour_of
from hf_hetero.report.rows import Key, bin_start

MOST_POINTS = 300
"""Of a line: neighbouring steps beyond are drawn as their mean, and the range that they cover."""
MOST_DOTS = 1000
MOST_TABLE_ROWS = 20


@dataclass(frozen=True, slots=True)
class Chart:
    """A `Chart` is a picture with its words.

    Args:
        name: of the element.
        title, words: above it; `words` are a sentence of what it shows.
        picture: what is inside the SVG.
        table: its numbers, head first.
        stops: where the pointer may rest: position in the chart, and what is said there.
        legend: classes and words.
        width, height: in units of the chart.
    """

    name: str
    title: str
    words: str
    picture: Html
    table: Sequence[Sequence[str]]
    stops: Sequence[tuple[float, str]] = ()
    legend: Sequence[tuple[str, str]] = ()
    width: float = WIDTH
    height: float = HEIGHT

    def to_html(self) -> Html:
        """Return the figure."""
        svg = element(
            "svg",
            self.picture,
            element("line", class_="cursor", x1=0.0, x2=0.0, y1=axes.TOP, y2=self.height - axes.BOTTOM),
            viewBox=f"0 0 {self.width:.0f} {self.height:.0f}",
            role="img",
            aria_label=f"{self.title}. {self.words}",
        )
        return element(
            "figure",
            element(
                "figcaption",
                element("h3", self.title),
                element("p", self.words),
                *([legend_of(self.legend)] if self.legend else []),
            ),
            element("div", svg, class_="chart", data_chart=self.name if self.stops else None),
            table_of(self.table),
            id=self.name,
            class_="wide" if self.width > WIDTH else None,
        )

    def data(self) -> dict[str, Any]:
        """Return what the script needs."""
        return {"at": [round(at, 1) for at, _ in self.stops], "say": [words for _, words in self.stops]}


@dataclass(frozen=True, slots=True)
class Line:
    """A `Line` is values over steps.

    Args:
        name: for people.
        kind: its class in the style sheet.
        points: steps and values, ascending.
    """

    name: str
    kind: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A `_Bucket` is neighbouring steps that are drawn as one: their mean, and the range of their values."""

    first: int
    last: int
    mean: float
    low: float = field(default=0.0)
    high: float = field(default=0.0)

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2

    @property
    def words(self) -> str:
        return f"step {self.first:,}" if self.first == self.last else f"steps {self.first:,} to {self.last:,}"


def buckets(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[_Bucket]:
    """Join neighbouring points into at most so many buckets of as many points each."""
    size = max(1, -(-len(points) // most))
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [
        _Bucket(
            part[0][0],
            part[-1][0],
            sum(value for _, value in part) / len(part),
            min(value for _, value in part),
            max(value for _, value in part),
        )
        for part in parts
    ]


def lines_chart(
    name: str,
    title: str,
    words: str,
    lines: Sequence[Line],
    unit: str,
    limit: tuple[float, str] | None = None,
    has_zero: bool = True,
) -> Chart:
    """Draw lines over steps, each with the range of the steps that one of its points stands for.

    Args:
        name, title, words: of the chart.
        lines: at least one, with a point at least.
        unit: of the values.
        limit: a level that is drawn across, and its name.
        has_zero: 0 is on the axis, so that heights can be compared.
    """
    steps = [step for line in lines for step, _ in line.points]
    joint = [buckets(line.points) for line in lines]
    top = max(bucket.high for line in joint for bucket in line)
    lowest = min(bucket.low for line in joint for bucket in line)
    shown = limit if limit and limit[0] < 2 * top else None  # one far above would press the values to the ground
    highest = max(top, shown[0]) if shown else top
    x = across(min(steps), max(steps))
    y = upwards(highest, lowest) if has_zero else axes.around(lowest, highest)
    parts = [frame(x, y, axes.step_ticks(x), "step", unit)]
    for line, points in zip(lines, joint, strict=True):
        if any(bucket.low < bucket.high for bucket in points):
            above = [f"{x.at(b.middle):.1f},{y.at(b.high):.1f}" for b in points]
            below = [f"{x.at(b.middle):.1f},{y.at(b.low):.1f}" for b in reversed(points)]
            parts.append(element("path", d=f"M{' '.join(above + below)}Z", class_=f"band {line.kind}"))
        path = " ".join(f"{x.at(bucket.middle):.1f},{y.at(bucket.mean):.1f}" for bucket in points)
        parts.append(element("path", d=f"M{path}", class_=f"line {line.kind}"))
        if len(points) <= 60:
            dots = [
                element("circle", cx=x.at(b.middle), cy=y.at(b.mean), r=2.2, class_=f"dot {line.kind}") for b in points
            ]
            parts.extend(dots)
    if shown:
        at = y.at(shown[0])
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="limit"))
        parts.append(element("text", shown[1], x=x.end, y=at - 4, class_="tick end"))
    said = [
        (x.at(own[0].middle), f"{own[0].words}\n" + "\n".join(_value(line, b, unit) for line, b in zip(lines, own)))  # noqa: B905
        for own in zip(*joint, strict=False)
    ]
    table = [["steps", *(", ".join(filter(None, (line.name, unit))) for line in lines)]]
    for own in zip(*(buckets(line.points, MOST_TABLE_ROWS) for line in lines), strict=False):
        table.append([own[0].words.partition(" ")[2], *(number(bucket.mean) for bucket in own)])
    legend = [(f"stroke {line.kind}", line.name) for line in lines] if len(lines) > 1 else []
    return Chart(name, title, words, joined(*parts), table, said, legend)


def _value(line: Line, bucket: _Bucket, unit: str) -> str:
    """Say a value, and its range where there is one."""
    spread = f" ({number(bucket.low)} to {number(bucket.high)})" if bucket.low < bucket.high else ""
    return f"{line.name} {number(bucket.mean)} {unit}".rstrip() + spread


def dots_chart(name: str, title: str, words: str, points: Sequence[tuple[float, float]], slope: float) -> Chart:
    """Draw predicted (across) and measured seconds (upwards) of steps, and the line of their ratio."""
    every = -(-len(points) // MOST_DOTS)
    right = upwards(max(planned for planned, _ in points)).high
    x, y = across(0.0, right), upwards(max(measured for _, measured in points))
    ticks = [(value, number(value)) for value in axes.round_ticks(0.0, right)]
    parts = [frame(x, y, ticks, "planned, s", "measured, s")]
    for ratio, kind in ((1.0, "even"), (slope, "slope")):
        if 0 < ratio < 1e9:
            end = min(right, y.high / ratio)
            parts.append(
                element("line", x1=x.at(0), y1=y.at(0), x2=x.at(end), y2=y.at(end * ratio), class_=f"line {kind}")
            )
    parts += [
        element("circle", cx=x.at(planned), cy=y.at(measured), r=2.2, class_="dot measured")
        for planned, measured in points[::every]
    ]
    table = [["planned, s", "measured, s"], *([number(a), number(b)] for a, b in _few(points))]
    legend = [("stroke slope", f"measured is {slope:.2f} x planned, the median"), ("stroke even", "as planned")]
    return Chart(name, title, words, joined(*parts), table, legend=legend)


def lengths_chart(
    name: str, title: str, words: str, counts: Mapping[Key, int], what: str, all_degrees: Sequence[int]
) -> Chart:
    """Draw counts by length, stacked by degree, each in the colour that it has among all degrees of the run."""
    degrees = sorted({degree for degree, _ in counts})
    bins = range(min(b for _, b in counts), max(b for _, b in counts) + 1)
    stacks = {b: [(d, counts.get((d, b), 0)) for d in degrees] for b in bins}
    y = upwards(max(sum(count for _, count in stack) for stack in stacks.values()))
    x = Scale(bins.start, bins.stop, LEFT, WIDTH - RIGHT)
    every = max(1, -(-len(bins) // 12)) * 2
    ticks = [(b, axes.tokens(bin_start(b))) for b in range(bins.start, bins.stop + 1) if b % every == 0]
    parts = [frame(x, y, ticks, "tokens of a sample", what)]
    said: list[tuple[float, str]] = []
    for b, stack in stacks.items():
        left, right, below = x.at(b) + 0.75, x.at(b + 1) - 0.75, 0
        for degree, count in stack:
            if count:
                top = y.at(below + count)
                parts.append(
                    element(
                        "rect",
                        x=left,
                        y=top,
                        width=right - left,
                        height=y.at(below) - top,
                        class_=f"bar {colour_of(degree, all_degrees)}",
                    )
                )
            below += count
        range_words = f"{axes.tokens(bin_start(b))} to {axes.tokens(bin_start(b + 1))} tokens: {below:,} {what}"
        of_each = [f"degree {degree}: {count / below:.0%}" for degree, count in stack if count]
        said.append(((left + right) / 2, "\n".join([range_words, *of_each])))
    table = [["tokens of a sample", *(f"degree {degree}" for degree in degrees)]]
    table += [[f"from {axes.tokens(bin_start(b))}", *(f"{count:,}" for _, count in s)] for b, s in stacks.items()]
    legend = [(f"block {colour_of(degree, all_degrees)}", f"degree {degree}") for degree in degrees]
    return Chart(name, title, words, joined(*parts), table, said, legend)


def bars_chart(
    name: str,
    title: str,
    words: str,
    bars: Sequence[tuple[str, str, float]],
    unit: str,
    reference: float,
    is_wide: bool = True,
) -> Chart:
    """Draw a bar for each name, with its value, and by how much that is more than a reference.

    Args:
        name, title, words: of the chart.
        bars: names, classes and values.
        unit: of the values.
        reference: value that the others are compared with.
        is_wide: it takes the place of two charts beside each other.
    """
    width, row, top, left = 2 * WIDTH + 40 if is_wide else WIDTH, 24.0, 6.0, 80.0
    high = max(value for _, _, value in bars)
    x = Scale(0.0, high or 1.0, left, width - 110.0)
    parts: list[Html] = []
    for place, (label, kind, value) in enumerate(bars):
        y = top + row * place
        ratio = f"   {value / reference:.2f}x" if reference > 0 and value != reference else ""
        parts += [
            element("text", label, x=left - 8, y=y + 14, class_="bar-name end"),
            element("rect", x=left, y=y + 3, width=max(x.at(value) - left, 0.5), height=row - 8, class_=f"bar {kind}"),
            element("text", f"{number(value)} {unit}{ratio}", x=x.at(value) + 6, y=y + 14, class_="bar-value"),
        ]
    table = [["", unit], *([label, number(value)] for label, _, value in bars)]
    return Chart(name, title, words, joined(*parts), table, width=width, height=top + row * len(bars) + 4)


def legend_of(keys: Sequence[tuple[str, str]]) -> Html:
    """Write a legend: the class of each sign, and what it stands for."""
    return element(
        "div",
        *(element("span", element("span", class_=f"key {kind}"), words) for kind, words in keys),
        class_="legend",
    )


def table_of(rows: Sequence[Sequence[str]], summary: str = "Numbers") -> Html:
    """Write a table that opens when asked for; the first row is its head."""
    head = element("tr", *(element("th", cell, scope="col") for cell in rows[0]))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows[1:]]
    table = element("table", element("thead", head), element("tbody", *body))
    return element("details", element("summary", summary), element("div", table, class_="scroll"))


def _few(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Choose some points evenly, the first and the last among them."""
    if len(points) <= MOST_TABLE_ROWS:
        return list(points)
    places = [k * (len(points) - 1) // (MOST_TABLE_ROWS - 1) for k in range(MOST_TABLE_ROWS)]
    return [points[a] for a, b in pairwise([*places, len(points)]) if a != b]
