"""Figures hold what they should, and plotly takes them; texts from outside stay texts."""

import html
import json
import math

import plotly.graph_objects as go
import pytest

from hybrid_train.tracking import metrics, plotly
from hybrid_train.tracking.plotly import (
    AS_REPORTED,
    EACH_STEP,
    SMOOTHINGS,
    Axes,
    Curve,
    Figure,
    Row,
    Span,
)

AXES = Axes(".4f", log=True)


def curve(values: list[float], **more: object) -> Curve:
    steps = [float(n + 1) for n in range(len(values))]
    return Curve(steps, values, "train", "train", "c0", **more)  # type: ignore[arg-type]


def check(figure: Figure) -> None:
    """Raise where plotly knows no such setting."""
    go.Figure(data=figure["data"], layout=figure["layout"])


def drawn(*lines: Curve, axes: Axes = AXES, columns: int = 100) -> Figure:
    figure = plotly.curves(lines, axes, columns)
    assert figure is not None
    check(figure)
    json.dumps(figure, allow_nan=False)
    return figure


def by_smoothing(figure: Figure) -> dict[str, Figure]:
    return {trace["meta"]["smoothing"]: trace for trace in figure["data"]}


def test_a_curve_has_a_trace_for_each_way_to_smooth_it() -> None:
    losses = [8.0 / step + 0.1 * math.sin(step) for step in range(1, 301)]
    traces = by_smoothing(drawn(curve(losses, smooths=True), columns=1000))
    assert tuple(traces) == SMOOTHINGS
    assert traces[EACH_STEP]["y"] == pytest.approx(losses, rel=1e-4)
    assert traces[AS_REPORTED]["y"] == pytest.approx(metrics.smoothed_curve(losses), rel=1e-4)
    assert traces[AS_REPORTED]["x"] == list(range(1, 301))


def test_a_curve_without_its_beginning_is_smoothed_with_it() -> None:
    losses = [8.0 / step for step in range(1, 301)]
    whole = by_smoothing(drawn(curve(losses, smooths=True), columns=1000))
    later = by_smoothing(drawn(curve(losses, smooths=True, first=30), columns=1000))
    for name in SMOOTHINGS:
        assert later[name]["y"] == whole[name]["y"][30:]


def test_long_curves_are_thinned_and_keep_their_spike() -> None:
    values = [1.0] * 20_000
    values[7_777] = 50.0
    traces = by_smoothing(drawn(curve(values, smooths=True), columns=100))
    assert max(len(trace["x"]) for trace in traces.values()) <= 200
    assert 50 in traces[EACH_STEP]["y"]


def test_a_curve_is_broken_where_it_is_not_finite() -> None:
    (trace,) = drawn(curve([1.0, 2.0, math.nan, 3.0]))["data"]
    assert trace["y"] == [1, 2, None, 3]


def test_nothing_to_draw_is_no_figure() -> None:
    assert plotly.curves([curve([math.nan])], AXES, 100) is None
    assert plotly.heat_map([Row("a", [1.0], [math.nan])]) is None
    assert plotly.heat_map([]) is None


def test_a_curve_with_a_spike_begins_on_a_logarithmic_axis() -> None:
    spike = [1.0] * 50 + [1000.0]
    assert drawn(curve(spike))["layout"]["yaxis"]["type"] == "log"
    assert drawn(curve([1.0, 2.0]))["layout"]["yaxis"]["type"] == "linear"
    assert drawn(curve([0.0, *spike]))["layout"]["yaxis"]["type"] == "linear"  # 0 has no logarithm
    assert drawn(curve(spike), axes=Axes(".4f"))["layout"]["yaxis"]["type"] == "linear"


def test_marks_stand_where_the_curves_are() -> None:
    marks = [(2.0, "bad", "skipped: <b>"), (3.0, "soft", "attempt 2"), (99.0, "soft", "far")]
    figure = drawn(curve([1.0, 2.0, 3.0]), axes=Axes(".4f", marks=marks))
    bad, soft = (trace for trace in figure["data"] if trace.get("yaxis") == "y2")
    assert (bad["x"], bad["y"]) == ([2.0, 2.0, None], [0, 1, None])
    assert bad["text"][0] == "skipped: &lt;b&gt;"
    assert soft["x"] == [3.0, 3.0, None]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x>', "a & b"])
def test_texts_hold_no_tags(text: str) -> None:
    axes = Axes(".4f", marks=[(1.0, "soft", text)])
    line = Curve([1.0, 2.0], [1.0, 2.0], text, "key", "c0")
    figures = [
        plotly.curves([line], axes, 100),
        plotly.heat_map([Row(text, [1.0, 2.0], [1.0, 2.0])]),
        plotly.time_line([Span(0, 9, "bad", "1", text)], lambda _: "0s"),
    ]
    for figure in figures:
        assert "<script" not in json.dumps(figure)
        assert "<img" not in json.dumps(figure)
        assert html.escape(text, quote=False) in json.dumps(figure, ensure_ascii=False).replace(
            '\\"', '"'
        )


def test_a_heat_map_has_the_highest_of_each_column_and_colours_by_factors() -> None:
    steps = [float(n) for n in range(1000)]
    rows = [Row("layer 2", steps, [1.0] * 999 + [2.0]), Row("layer 4", steps, [1.5] * 1000)]
    figure = plotly.heat_map(rows)
    assert figure is not None
    check(figure)
    (trace,) = figure["data"]
    assert trace["y"] == ["layer 2", "layer 4"]
    assert (trace["customdata"][0][0], trace["customdata"][0][-1]) == (1, 2)
    assert len(trace["x"]) == len(trace["z"][0]) == 160
    assert trace["z"][0][0] == 0
    assert trace["z"][0][-1] == pytest.approx(math.log(2), rel=1e-4)
    assert trace["colorbar"]["ticktext"] == ["1.00", "1.25", "1.50", "2.00"]


def test_attempts_stand_on_one_line_by_the_clock() -> None:
    spans = [Span(0, 1, "bad", "1", "killed"), Span(10, 1e6, "run", "2", "runs")]
    figure = plotly.time_line(spans, lambda seconds: f"{seconds:.0f}s")
    check(figure)
    (trace,) = figure["data"]
    assert (trace["base"], trace["x"]) == ([0, 10], [1, 999990])
    assert trace["marker"]["line"]["width"] > 1  # so that a second among days can be seen
    assert trace["meta"]["colours"] == ["bad", "run"]


@pytest.mark.parametrize(
    ("end", "times"),
    [(0.5, [0]), (12, [0, 2, 4, 6, 8, 10, 12]), (7000, [0, 1800, 3600, 5400])],
)
def test_times_are_round(end: float, times: list[float]) -> None:
    assert plotly.round_times(end) == times


def test_the_library_is_one_script_that_no_tag_ends() -> None:
    text = plotly.library()
    assert "plotly.js" in text[:500]
    assert "</script" not in text
    assert "\r" not in text  # a browser would hash it as another text
