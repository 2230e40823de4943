"""What a drawing says where a pointer rests on it, and the table of its numbers."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from gptlite.report import charts
from gptlite.report.charts import Line
from gptlite.report.values import TABLE_LINES, values_of

SVG = "{http://www.w3.org/2000/svg}"
NASTY = """</title><script>alert("1")</script> & 'x' \u202e $\\frac{"""
LOSS = Line("validation", [0, 250, 500, 750], [5.25, 4.837, 4.5, 4.625])
RATE = Line("rate", [0, 250, 500, 750], [0.0, 0.1, 0.2, 0.3])


def points(svg: str) -> dict[str, tuple[float, float]]:
    """Where each is, by its words."""
    circles = ElementTree.fromstring(svg).iter(f"{SVG}circle")
    return {
        str(circle.findtext(f"{SVG}title")): (
            float(circle.attrib["cx"]),
            float(circle.attrib["cy"]),
        )
        for circle in circles
    }


def corners(svg: str, color: str) -> list[tuple[float, float]]:
    """Of the curve in this colour, as matplotlib drew it."""
    look = rf'clip-path="[^"]*" style="fill: none; stroke: var\({color}\)'
    (path,) = re.findall(rf'<path d="([^"]*)" {look}', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


@pytest.mark.parametrize(
    "options", [{}, {"zero": True}, {"epochs_per_step": 0.01}, {"marks": [(500, 4.5, "4.500")]}]
)
def test_a_point_says_its_value_where_its_curve_passes(options: dict[str, Any]) -> None:
    svg = charts.lines("Losses", [LOSS, RATE], "updates", "nats per token", **options)
    found = points(svg)
    assert list(found)[:5] == [
        *("step 0: validation 5.2500", "step 250: validation 4.8370"),
        *("step 500: validation 4.5000", "step 750: validation 4.6250", "step 0: rate 0"),
    ]
    drawn = [*corners(svg, "--c1"), *corners(svg, "--c2")]
    for place, corner in zip(found.values(), drawn, strict=True):
        assert place == pytest.approx(corner, abs=0.06)


def test_a_point_on_a_logarithmic_axis_is_on_the_curve() -> None:
    line = Line("", [1, 10, 1000], [3.0, 2.0, 1.5])
    svg = charts.lines("Epochs", [line], "epochs", "nats", log_x=True)
    found = points(svg)
    assert list(found) == [
        "epochs 1: nats 3.0000",
        "epochs 10: nats 2.0000",
        "epochs 1,000: nats 1.5000",
    ]
    for place, corner in zip(found.values(), corners(svg, "--c1"), strict=True):
        assert place == pytest.approx(corner, abs=0.06)


def test_a_long_curve_keeps_its_ends_and_extremes() -> None:
    y = [1.0] * 1000
    y[333], y[777] = 9.0, 0.5
    found = points(charts.lines("Norm", [Line("norm", list(range(1000)), y)], "updates", "norm"))
    assert len(found) <= charts.LINE_POINTS + 2
    for words in ("step 0: norm 1", "step 333: norm 9", "step 777: norm 0.5", "step 999: norm 1"):
        assert any(point.startswith(words) for point in found)


def test_many_curves_share_the_points() -> None:
    series = [Line(f"run {n}", list(range(100)), [float(n)] * 100) for n in range(30)]
    svg = charts.lines("Runs", series, "updates", "nats")
    assert 30 * 2 <= svg.count("<circle") <= charts.FIGURE_POINTS + 30 * 2


def test_what_is_not_drawn_says_nothing() -> None:
    line = Line("a", [0, 1, 2, 3], [1.0, None, float("nan"), -2.0])
    assert list(points(charts.lines("A", [line], "layer", "a", zero=True))) == ["layer 0: a 1.0000"]


def test_intervals_are_said() -> None:
    line = Line("random", [0, 0.5], [1, 2], [0.5, None], [1.5, None])
    found = points(charts.lines("Knock-out", [line], "fraction", "nats"))
    assert list(found) == [
        "fraction 0: random 1.0000 (0.5000 to 1.5000)",
        "fraction 0.5: random 2.0000",
    ]


def test_every_kind_of_drawing_says_its_values() -> None:
    mean = {"x": 0.1, "mean": 2.0, "low": 1.9, "high": 2.1, "values": [1.95, 2.05]}
    dots = charts.dots("Dots", [("a", [mean]), ("b", [{**mean, "low": None}])], "rate", "loss")
    assert list(points(dots)) == ["rate 0.1: a 2.0000 (1.9000 to 2.1000)", "rate 0.1: b 2.0000"]
    row = {"label": "rate=0.1", "difference": 0.1, "low": 0.05, "high": 0.15}
    other = {**row, "label": "rate=0.2", "low": None, "high": None}
    rows = [{**row, "above_seed_noise": True}, {**other, "above_seed_noise": None}]
    forest = points(charts.forest("Forest", rows, "difference"))
    assert list(forest) == ["rate=0.1: +0.1000 (0.0500 to 0.1500)", "rate=0.2: +0.1000"]
    (_, above), (_, below) = forest.values()
    assert above < below
    bins = [{"confidence": 0.25, "accuracy": 0.5, "count": 3}]
    ((words, (x, _)),) = points(charts.reliability("Reliability", bins)).items()
    assert words == "confidence 0.25: accuracy 0.5000"
    assert 0 < x < 72 * charts.SIZE[0] / 2


def test_labels_in_points_are_escaped() -> None:
    mean = {"x": 0.1, "mean": 2.0, "low": 1.9, "high": 2.1, "values": []}
    row = {"label": NASTY, "difference": 0, "low": None, "high": None, "above_seed_noise": True}
    shown = charts.shorten(" ".join(NASTY.split()))
    for svg in (
        charts.lines("A", [Line(NASTY, [0, 1], [1, 2])], NASTY, NASTY),
        charts.dots("B", [(NASTY, [mean])], NASTY, NASTY),
        charts.forest("C", [row], NASTY),
    ):
        assert "<script" not in svg
        assert all(shown in words for words in points(svg))
        assert points(svg)


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert len({charts.lines("A", [LOSS, RATE], "updates", "nats") for _ in range(3)}) == 1


def test_a_table_has_the_rows_that_most_curves_have() -> None:
    logged = Line("logged", list(range(0, 1001, 10)), [float(x) for x in range(0, 1001, 10)])
    lowest = Line("lowest", [0, 250, 500, 1000], [3.0, 2.0, 1.0, 2.0])
    found = values_of([logged, lowest], "updates", "nats", lowest=True)
    assert found is not None
    assert found.head == ["step", "logged", "lowest"]
    assert found.rows == [
        ["0", "0 (lowest)", "3.0000"],
        ["250", "250.0000", "2.0000"],
        ["500", "500.0000", "1.0000 (lowest)"],
        ["1,000", "1000", "2.0000"],
    ]


def test_a_table_is_short_and_has_the_ends_and_the_lowest() -> None:
    y = [1.0] * 500
    y[123] = 0.5
    found = values_of([Line("", list(range(500)), y)], "layer", "nats", lowest=True)
    assert found is not None
    assert found.head == ["layer", "nats"]
    assert len(found.rows) == 11
    assert found.rows[0] == ["0", "1.0000"]
    assert ["123", "0.5000 (lowest)"] in found.rows
    assert found.rows[-1] == ["499", "1.0000"]


def test_there_is_no_table_of_many_curves_or_of_nothing() -> None:
    assert values_of([LOSS] * TABLE_LINES, "updates", "nats") is not None
    assert values_of([LOSS] * (TABLE_LINES + 1), "updates", "nats") is None
    assert values_of([Line("a", [0], [None])], "updates", "nats") is None
