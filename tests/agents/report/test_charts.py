"""Charts of the pages: what they show, in inks of the page, as text that stays text."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from diffusion_gym.agents.report.charts import (
    Curve,
    Interval,
    density_chart,
    interval_chart,
    line_chart,
    map_chart,
    share_chart,
)
from diffusion_gym.agents.report.numbers import running_mean
from diffusion_gym.agents.report.render import breakable, render

NAN = float("nan")
PLACES = np.random.default_rng(0).normal(size=(12, 2))
CHARTS = {
    "lines": lambda: line_chart(
        "a & <b>",
        "x",
        "y",
        [
            Curve("one", [0, 64], [1, 2], level=1.5, band=[(0, 2), (1, 4)]),
            Curve("$x$", [0, 64], [2, 1], "series-2", True),
        ],
    ),
    "intervals": lambda: interval_chart("s", "u", [Interval("$a < b$", 0.5, 0.4, 0.6), Interval("c", 1.0, NAN, NAN)]),
    "shares": lambda: share_chart("shares", "unit", ["no", "yes"], [("model", [0.25, 0.75])]),
    "density": lambda: density_chart("d", np.abs(PLACES), Curve("m", [0, 1], [0, 1], "series-3"), (0.0, 3.0)),
    "map": lambda: map_chart("m", PLACES, PLACES / 2, np.array([[-3.0, -3.0], [3.0, 3.0]]), "series-4"),
}


def texts(chart):
    return re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)


@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_is_the_same_each_time_and_a_document_of_its_own_in_light_and_dark(name):
    chart = CHARTS[name]()
    assert chart == CHARTS[name]()
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|url\(|xmlns", chart.svg)  # inks are the page's, and fonts too
    document = render("chart.svg.j2", chart=chart)
    root = ElementTree.fromstring(document)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", document))
    light, dark = document.partition("prefers-color-scheme: dark")[::2]
    assert used and all(f"{ink}:" in light and f"{ink}:" in dark for ink in used)
    words = ["".join(entry.itertext()) for entry in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {chart.title, chart.label, *(key.name for key in chart.keys)} <= set(words)
    assert float(root.get("height")) > chart.height
    drawn = re.findall(r"[xy]=\"(-?[\d.]+)\"", chart.svg)
    assert drawn and all(-10 <= float(place) <= max(chart.width, chart.height) for place in drawn)


def test_names_of_agents_stay_what_they_are():
    """No markup, and no formula of matplotlib's."""
    assert "$a &lt; b$" in CHARTS["intervals"]().svg
    assert "0.500 (0.400 to 0.600)" in texts(CHARTS["intervals"]()) and "1.000" in texts(CHARTS["intervals"]())


def test_points_lines_and_bands_are_where_the_values_are():
    svg = line_chart(
        "t", "x", "y", [Curve("c", [0, 1, 2], [0.0, 1.0, 4.0], band=[(0, 0), (0, 2), (4, 4)], smooth=False)]
    ).svg
    line = re.search(r'd="(M[^"]*)" style="fill: none; stroke: var\(--series-1\); stroke-width: 2"', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split()) for pair in re.split("[ML]", line)[1:])
    assert (x1 - x0) == pytest.approx(x2 - x1, abs=0.2) and (y0 - y2) == pytest.approx(4 * (y0 - y1), abs=0.3)
    dots = re.search(r'd="(M[^"]*)"[^>]*opacity: 0.4', svg)[1]
    assert dots == " ".join(f"M{x} {y} L{x} {y}" for x, y in re.findall(r"([\d.]+) ([\d.]+)", line))


def test_whole_numbers_have_whole_ticks_and_others_a_power_of_ten():
    counted = texts(line_chart("t", "queries", "y", [Curve("c", [0, 3], [0.0, 2.5e-5])]))
    assert {"0", "1", "2", "3"} <= set(counted) and "queries" in counted and "1e−5" in counted
    assert "1,000" in texts(line_chart("t", "queries", "y", [Curve("c", [0, 2000], [0, 1])]))
    assert "0.5" in texts(line_chart("t", "seconds", "y", [Curve("c", [0, 1.25], [0, 1])]))


@pytest.mark.parametrize("value", [-3.0, 0.0, 2e-5, 7.0, 3e9])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e6])
def test_axes_of_any_size_have_ticks_that_differ(value, spread):
    found = texts(line_chart("t", "x", "y", [Curve("c", [0, 1], [value, value + spread])]))
    y = found[found.index("x") + 1 :]
    assert 2 <= len(y) <= 8 and len(set(y)) == len(y)


def test_charts_leave_out_what_is_not_finite():
    chart = line_chart("t", "x", "y", [Curve("c", [1, 2, 3], [0.5, NAN, 0.7], level=0.6)])
    assert (
        chart.svg.count(" L") >= 2
        and "nan" not in chart.svg
        and [key.line for key in chart.keys] == ["solid", "dotted"]
    )
    assert line_chart("t", "x", "y", [Curve("c", [1], [NAN])]).spoken == "t: no finite value."
    assert not line_chart("t", "x", "y", [Curve("c", [1], [NAN])]).svg
    assert "M" in line_chart("t", "x", "y", [Curve("c", [64], [0.5])]).svg


def test_shares_divide_a_row():
    svg, keys = CHARTS["shares"]().svg, CHARTS["shares"]().keys
    edges = [tuple(map(float, re.findall(r"[ML]([\d.]+)", d))) for d in re.findall(r'<path d="([^"]*z)"', svg)]
    first, second = (max(bar) - min(bar) for bar in edges)
    assert second == pytest.approx(3 * first, rel=0.01) and max(edges[0]) == pytest.approx(min(edges[1]), abs=0.2)
    assert "yes 75.0\xa0%" in texts(CHARTS["shares"]()) and [key.opacity for key in keys] == [0.15, 1.0]


def test_running_mean():
    assert running_mean([1.0, 3.0, 8.0], 2) == [1.0, 2.0, 5.5]


BAR = r'd="M([\d.]+) [\d.]+ L\1 [\d.]+" style="fill: none; stroke: var\(--series'


def banded(number, points=4):
    x = [float(index) for index in range(points)]
    return [
        Curve(
            f"agent-{index}", x, [float(index)] * points, f"series-{index + 1}", band=[(index - 1, index + 2)] * points
        )
        for index in range(number)
    ]


@pytest.mark.parametrize(("number", "filled"), [(1, 1), (3, 3), (4, 0), (6, 0)])
def test_intervals_of_many_curves_are_bars_in_place_of_bands_that_hide_each_other(number, filled):
    svg = line_chart("t", "x", "y", banded(number)).svg
    assert len(re.findall(r"<use[^>]*fill: var\(--series-\d\); fill-opacity", svg)) == filled
    bars = [float(x) for x in re.findall(BAR, svg)]
    assert len(bars) == (0 if filled else 4 * number) and len(set(bars)) == len(bars)  # none covers another


def test_of_curves_with_many_points_some_intervals_are_shown_in_turns():
    svg = line_chart("t", "x", "y", banded(4, points=31), from_zero=False).svg
    bars = [float(x) for x in re.findall(BAR, svg)]
    assert len(bars) == 31 and len(set(bars)) == len(bars)


def test_a_long_name_breaks_between_its_parts_alone():
    assert breakable("ddpo_is") == "ddpo_is"
    name = "my_agents.running_mean:RunningMean<b>"
    assert breakable(name) == "my_<wbr>agents.<wbr>running_<wbr>mean:<wbr>RunningMean&lt;b&gt;"
