"""A chart's SVG is read back: what stands where, for figures of any size."""

import itertools
import math
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.plots import LETTER, SMALL, Chart, Series, chart_grid, line_chart, log_ticks, nice_ticks

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6)


def parts(svg: str, tag: str) -> list[xml.Element]:
    return list(xml.fromstring(svg).iter(SVG + tag))


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """Drawn lines in pixels, the legend's samples left out."""
    places = [line.get("points").split() for line in parts(svg, "polyline")]
    lines = [[tuple(map(float, place.split(","))) for place in line] for line in places]
    return [line for line in lines if not (len(line) == 2 and line[0][1] == line[1][1] < 60)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.03, 0.98, [0.2, 0.4, 0.6, 0.8]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0, 20_000, [0, 5_000, 10_000, 15_000, 20_000]),
        (0, 1e-6, [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]),
    ],
)
def test_ticks_are_one_two_or_five_times_a_power_of_ten(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks, abs=1e-15)


def test_widened_ticks_enclose_the_range():
    assert nice_ticks(0.03, 0.98, widen=True) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e-3, 1, [1e-3, 1e-2, 1e-1, 1]),
        (1e-12, 1, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1]),
        (0.3, 4, [0.5, 1, 2]),
        (0.31, 0.38, [0.32, 0.34, 0.36, 0.38]),
    ],
)
def test_a_logarithmic_axis_has_powers_of_ten_or_what_lies_between(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_a_value_stands_where_it_belongs():
    """Halfway between 0 and 10, and between 1 and 100 on a logarithmic axis: 10."""
    ((start, middle, end),) = lines_of(line_chart("t", "x", "y", [Series("a", [(0, 0), (5, 5), (10, 10)])]))
    assert middle[0] == pytest.approx((start[0] + end[0]) / 2, abs=0.1)
    assert middle[1] == pytest.approx((start[1] + end[1]) / 2, abs=0.1)
    assert start[1] > end[1]  # up is more
    points = [(1, 1), (10, 10), (100, 100)]
    ((start, middle, end),) = lines_of(line_chart("t", "x", "y", [Series("a", points)], log_x=True, log_y=True))
    assert middle[0] == pytest.approx((start[0] + end[0]) / 2, abs=0.1)
    assert middle[1] == pytest.approx((start[1] + end[1]) / 2, abs=0.1)


def test_what_is_no_number_is_a_gap_and_what_a_logarithm_cannot_show_too():
    broken = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 3.0), (5, math.inf), (6, 9.0)]
    svg = line_chart("t", "x", "y", [Series("a", broken)])
    assert [len(line) for line in lines_of(svg)] == [2, 2]
    assert len(parts(svg, "circle")) == 1  # one value between gaps is a dot
    positive = line_chart("t", "x", "y", [Series("a", [(0, 1), (1, 1), (10, 0), (100, 2), (1000, 3)])], True, True)
    assert [len(line) for line in lines_of(positive)] == [2]


def test_the_smallest_number_there_is_stands_at_0():
    (dot,) = parts(line_chart("t", "x", "y", [Series("a", [(0, 5e-324)], "dots")]), "circle")[1:]
    (same,) = parts(line_chart("t", "x", "y", [Series("a", [(0, 0)], "dots")]), "circle")[1:]
    assert (dot.get("cx"), dot.get("cy")) == (same.get("cx"), same.get("cy"))


def test_dots_and_dashes_and_a_colour_shared_by_theory_and_measurement():
    points = [(1, 1), (2, 2), (3, 5)]
    svg = line_chart("t", "x", "y", [Series("theory", points), Series("seen", points, "dots", colour=0)])
    assert len(parts(svg, "circle")) == 1 + len(points)  # and one in the legend
    assert {dot.get("fill") for dot in parts(svg, "circle")} == {line.get("stroke") for line in parts(svg, "polyline")}
    assert 'stroke-dasharray="6 3"' in line_chart("t", "x", "y", [Series("bound", points, "dashed")])
    styles = {
        (line.get("stroke"), line.get("stroke-dasharray"))
        for line in parts(line_chart("t", "x", "y", [Series(str(n), points) for n in range(14)]), "polyline")
    }
    assert len(styles) == 14


def test_text_is_text():
    svg = line_chart("a < b & \x00c", "<x>", "y'\"", [Series("<script>", [(0, 0), (1, 1)])])
    words = [text.text for text in parts(svg, "text")]
    assert {"a < b &  c", "<x>", "y'\"", "<script>"} <= set(words)


def test_a_full_row_of_the_legend_is_followed_by_another():
    names = [f"a run with a long name, {number}" for number in range(9)]
    svg = line_chart("t", "x", "y", [Series(name, [(0, 0), (1, 1)]) for name in names], width=560)
    places = [(float(t.get("x")), float(t.get("y")), t.text) for t in parts(svg, "text") if t.text in names]
    assert len({y for _, y, _ in places}) > 2
    for (x, y, name), (next_x, next_y, _) in itertools.pairwise(places):
        end = x + LETTER * SMALL * len(name)
        assert end < 560
        assert next_y > y or next_x > end
    lowest = max(y for _, y, _ in places)
    assert all(y > lowest for line in lines_of(svg)[-9:] for _, y in line)


def test_numbers_of_an_axis_do_not_touch():
    svg = line_chart("t", "step", "y", [Series("a", [(0, 0), (9_500_000, 1)])], width=260)
    bottom = max(float(text.get("y")) for text in parts(svg, "text") if text.text != "step")
    labels = [(float(t.get("x")), t.text) for t in parts(svg, "text") if float(t.get("y")) == bottom]
    assert len(labels) >= 2
    for (x, text), (next_x, next_text) in itertools.pairwise(labels):
        assert next_x - x > LETTER * SMALL * (len(text) + len(next_text)) / 2


@settings(max_examples=100, deadline=None)
@given(st.lists(POINTS, max_size=3), st.booleans(), st.booleans())
def test_any_figures_make_a_chart_that_stays_inside_its_frame(lines, log_x, log_y):
    svg = line_chart("t", "x", "y", [Series(f"s{n}", points) for n, points in enumerate(lines)], log_x, log_y)
    assert "nan" not in svg
    assert "inf" not in svg
    places = [place for line in lines_of(svg) for place in line]
    places += [(float(dot.get("cx")), float(dot.get("cy"))) for dot in parts(svg, "circle")]
    assert all(0 <= x <= 560 and 0 <= y <= 340 for x, y in places)


def test_a_grid_holds_every_chart_in_a_place_of_its_own():
    charts = [Chart(f"chart {number}", "x", "y", [Series("a", [(0, number), (1, 2)])]) for number in range(5)]
    svg = chart_grid(charts, columns=2, width=300, height=200)
    root = xml.fromstring(svg)
    assert (root.get("width"), root.get("height")) == ("600", "600")
    assert len({group.get("transform") for group in parts(svg, "g")}) == 5
    assert svg == chart_grid(charts, columns=2, width=300, height=200)
