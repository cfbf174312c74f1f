"""Pictures hold what they should: labels, scales, places; texts are escaped."""

import math
import re
from xml.etree import ElementTree

import pytest

from hybrid_train.tracking import svg
from hybrid_train.tracking.svg import Axes, Curve, Row, Span

AXES = Axes(show="{:g}".format, show_x="{:g}".format)


def paths(picture: str, style: str) -> list[str]:
    return re.findall(rf'<path class="line {style}" d="([^"]*)"', picture)


def test_a_curve_goes_from_corner_to_corner() -> None:
    picture = svg.curves([Curve([0.0, 10.0], [0.0, 1.0], "c0")], AXES, "rise")
    ElementTree.fromstring(picture)
    (path,) = paths(picture, "c0")
    (x0, y0), (x1, y1) = [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]
    assert (x0, x1) == (50, 530)
    assert y0 > y1  # upwards on the screen
    assert all(10 <= y <= 206 for y in (y0, y1))


def test_a_curve_is_broken_where_it_is_not_finite() -> None:
    picture = svg.curves([Curve([1, 2, 3, 4], [1.0, 2.0, math.nan, 3.0], "c0")], AXES, "broken")
    assert paths(picture, "c0")[0].count("M") == 2


def test_nothing_to_draw_is_no_picture() -> None:
    assert svg.curves([Curve([1.0], [math.nan], "c0")], AXES, "") == ""
    assert svg.heat_map([Row("a", [1.0], [math.nan])], str, str, "") == ""


def test_a_curve_with_a_spike_is_drawn_by_decades() -> None:
    ys = [1.0] * 50 + [1000.0]
    labels = re.findall(r">([^<]+)</text>", svg.curves([Curve(range(51), ys, "c0")], AXES, ""))
    assert {"1", "10", "100", "1000"} <= set(labels)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x>', "a & b"])
def test_texts_are_escaped(text: str) -> None:
    axes = Axes(show=lambda _: text, show_x=lambda _: text, marks=[(1.5, "attempt", text)])
    pictures = [
        svg.curves([Curve([1, 2], [1, 2], "c0")], axes, text),
        svg.heat_map([Row(text, [1, 2], [1, 2])], lambda _: text, lambda _: text, text),
        svg.time_line([Span(0, 9, "failed", "1", text)], lambda _: text, text),
    ]
    for picture in pictures:
        tags = {element.tag for element in ElementTree.fromstring(picture).iter()}
        assert tags <= {"svg", "path", "text", "title", "rect", "circle"}
        assert text in "".join(ElementTree.fromstring(picture).itertext())


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.29, [0.15, 0.2, 0.25]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert svg.ticks(low, high, 5) == pytest.approx(found)


def test_equal_neighbours_of_a_heat_map_are_one_cell() -> None:
    rows = [Row("a", list(range(100)), [1.0] * 50 + [2.0] * 50)]
    picture = svg.heat_map(rows, str, str, "")
    cells = re.findall(r'class="h(\d+)" d="(M[^"]*)"', picture)
    starts = ("M70 0", "M575 0")  # of the row; the scale below it has cells of its own
    in_row = {level: path.count("M") for level, path in cells if path.startswith(starts)}
    assert in_row == {"0": 1, str(svg.LEVELS - 1): 1}


def test_a_short_attempt_can_still_be_seen() -> None:
    spans = [Span(0, 1, "failed", "1", ""), Span(10, 1e6, "running", "2", "")]
    widths = re.findall(r'width="([\d.]+)"', svg.time_line(spans, str, ""))
    assert min(map(float, widths)) == 1.5
