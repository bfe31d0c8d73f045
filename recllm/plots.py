"""Line charts as SVG text: no dependency, the same bytes for the same figures, legible on any background.

    Path("chart.svg").write_text(line_chart("Reward", "step", "reward", [Series("grpo", [(1, 0.1), (2, 0.3)])]))

What is not a finite number leaves a gap in its line.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#b58900",
    "#444444",
)  # told apart by colour-blind eyes
DASHES = ("", "6 3", "2 2", "8 2 2 2")  # of the eighth, the fifteenth … series
INK, GRID, PAPER = "#222222", "#dddddd", "#ffffff"  # the paper is painted, so a dark page changes nothing
SMALL, LARGE = 11, 13  # letters of labels, of the title
LETTER = 0.6  # width of a letter by its size: an upper estimate for most words, since nothing is measured here
TICKS = 5
LEAST = 1e-300  # below it a difference of two figures, divided, may be no number any more
LEGEND_ROW, SAMPLE = 16, 22  # height of a row of the legend; length of a line shown in it


@dataclass(frozen=True)
class Series:
    """One line, or one set of dots."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "dashed", "dots"] = "line"
    colour: int | None = None  # number of the colour; None: the place among the chart's series


@dataclass(frozen=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], log_x: bool = False, log_y: bool = False,
    width: int = 560, height: int = 340,
) -> str:  # fmt: skip
    """One chart as an SVG document. A logarithmic axis shows what is above 0."""
    return chart_grid([Chart(title, x_label, y_label, series, log_x, log_y)], 1, width, height)


def chart_grid(charts: Sequence[Chart], columns: int = 3, width: int = 400, height: int = 260) -> str:
    """Several in rows of `columns`, each of this width and height, as one SVG document."""
    columns = min(columns, len(charts))
    whole = columns * width, math.ceil(len(charts) / columns) * height
    cells = []
    for number, chart in enumerate(charts):
        row, column = divmod(number, columns)
        body = "\n".join(_chart(chart, width, height))
        cells.append(f'<g transform="translate({column * width},{row * height})">\n{body}\n</g>')
    name = _text_of(charts[0].title if len(charts) == 1 else "; ".join(chart.title for chart in charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole[0]}" height="{whole[1]}" '
        f'viewBox="0 0 {whole[0]} {whole[1]}" font-family="Helvetica, Arial, sans-serif" font-size="{SMALL}" '
        f'fill="{INK}" role="img">\n<title>{name}</title>\n<rect width="100%" height="100%" fill="{PAPER}"/>\n'
        + "\n".join(cells)
        + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Axis:
    """A range with its ticks; `axis(value)` is 0 at its low end and 1 at its high end."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    @classmethod
    def around(cls, values: Sequence[float], log: bool, widen: bool) -> "Axis":
        """`widen`: until a tick stands at both ends."""
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if low == high:  # from 0 to it, or around it where there is no 0
            low, high = (low / 2, high * 2) if log else (min(low, 0.0), max(high, 0.0) or float(low == 0))
        ticks = log_ticks(low, high) if log else nice_ticks(low, high, widen)
        return cls(min(low, *ticks[:1]), max(high, *ticks[-1:]), ticks, log) if widen else cls(low, high, ticks, log)


def nice_ticks(low: float, high: float, widen: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the range, about `TICKS`; `widen`: one more at each end."""
    rough = (high - low) / TICKS
    power = math.floor(math.log10(rough))
    factor = next((factor for factor in (1, 2, 5) if factor * 10.0**power >= rough * 0.999), 10)
    step, slack = factor * 10.0**power, 1e-9
    first, last = low / step, high / step
    if widen:
        first, last = math.floor(first + slack), math.ceil(last - slack)
    else:
        first, last = math.ceil(first - slack), math.floor(last + slack)
    return [round(number * step, max(0, 1 - power)) + 0.0 for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; 2 and 5 times them where these are few, nice multiples where even those are."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [float(f"1e{power}") for power in range(first, last + 1, max(1, (last - first) // TICKS))]
    if len(powers) >= 3:
        return powers
    finer = [float(f"{factor}e{power}") for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
    finer = [tick for tick in finer if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return finer if len(finer) >= 2 else nice_ticks(low, high)


def _chart(chart: Chart, width: int, height: int) -> Iterator[str]:
    shown = [_shown(series, chart) for series in chart.series]
    places = [place for points in shown for place in points if math.isfinite(place[1])]
    across = Axis.around([x for x, _ in places], chart.log_x, False)
    up = Axis.around([y for _, y in places], chart.log_y, True)
    left, right = 34 + max(_width(_number(tick)) for tick in up.ticks), width - 24
    legend = _legend(chart.series, left, right)
    top, bottom = 34 + LEGEND_ROW * (1 + max((row for _, row in legend), default=-1)), height - 44

    def place(x: float, y: float) -> tuple[float, float]:
        return left + across(x) * (right - left), bottom + up(y) * (top - bottom)

    yield _text(left, 18, chart.title, f' font-size="{LARGE}" font-weight="bold"')
    for number, (series, (x, row)) in enumerate(zip(chart.series, legend)):
        y = 36 + row * LEGEND_ROW
        sample = [(x + SAMPLE / 2, y)] if series.kind == "dots" else [(x, y), (x + SAMPLE, y)]
        yield from _drawn(series, number, sample)
        yield _text(x + SAMPLE + 5, y + 4, series.name)
    for tick in up.ticks:
        _, y = place(across.low, tick)
        yield _line(left, y, right, y, GRID)
        yield _text(left - 6, y + 4, _number(tick), ' text-anchor="end"')
    for tick in _apart(across, right - left):
        x, _ = place(tick, up.low)
        yield _line(x, top, x, bottom, GRID)
        yield _text(x, bottom + 16, _number(tick), ' text-anchor="middle"')
    yield _line(left, bottom, right, bottom, INK)
    yield _line(left, top, left, bottom, INK)
    yield _text((left + right) / 2, height - 10, chart.x_label, ' text-anchor="middle"')
    turned = f' text-anchor="middle" transform="rotate(-90 14 {_short((top + bottom) / 2)})"'
    yield _text(14, (top + bottom) / 2, chart.y_label, turned)
    for number, (series, points) in enumerate(zip(chart.series, shown)):
        for whole, run in itertools.groupby(points, key=lambda point: math.isfinite(point[1])):
            if whole:
                yield from _drawn(series, number, [place(x, y) for x, y in run])


def _shown(series: Series, chart: Chart) -> list[tuple[float, float]]:
    """What has no place on an axis becomes a gap; what is as good as nothing stands at 0."""

    def fits(value: float, log: bool) -> bool:
        return LEAST < value < 1e300 if log else abs(value) < 1e300

    return [
        (_or_zero(x), _or_zero(y) if fits(x, chart.log_x) and fits(y, chart.log_y) else math.nan)
        for x, y in series.points
    ]


def _or_zero(value: float) -> float:
    return 0.0 if abs(value) < LEAST else value


def _drawn(series: Series, number: int, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    number = number if series.colour is None else series.colour
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    if series.kind == "dots" or len(points) == 1:
        yield from (f'<circle cx="{_short(x)}" cy="{_short(y)}" r="2.5" fill="{colour}"/>' for x, y in points)
        return
    dash = "6 3" if series.kind == "dashed" else dash
    places = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    yield f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"{dashed}/>'


def _legend(series: Sequence[Series], left: float, right: float) -> list[tuple[float, int]]:
    """Where each name's sample begins, and in which row: names go on in the next row where one is full."""
    places, x, row = [], left, 0
    for one in series:
        wide = SAMPLE + 17 + _width(one.name)
        if x > left and x + wide > right:
            x, row = left, row + 1
        places.append((x, row))
        x += wide
    return places


def _apart(axis: Axis, length: float) -> Sequence[float]:
    """Ticks whose numbers do not touch: all of them, every second, every third …"""
    for every in range(1, len(axis.ticks) + 1):
        kept = axis.ticks[::every]
        wide = max(_width(_number(tick)) for tick in kept) + 8
        if all((axis(after) - axis(before)) * length > wide for before, after in itertools.pairwise(kept)):
            return kept
    return []


def _number(value: float) -> str:
    """20,000, 0.25 or 1e-06"""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 and value == round(value) else f"{value:.6g}"


def _width(text: str) -> float:
    return LETTER * SMALL * len(text)


def _short(value: float) -> str:
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    x1, y1, x2, y2 = map(_short, (x1, y1, x2, y2))
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{_short(x)}" y="{_short(y)}"{more}>{_text_of(text)}</text>'


def _text_of(text: str) -> str:
    """Control characters have no place in XML, escaped or not."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))
