"""What a drawing says where a pointer rests on it, and the table of its numbers."""

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from gptlite.report import charts
from gptlite.report.axes import CARD, SMALL, keep_apart, nice_ticks, tick_words
from gptlite.report.charts import Dots
from gptlite.report.curves import TIPS, Mark, lines
from gptlite.report.series import Line, colors_of, rate_color, shorten
from gptlite.report.values import TABLE_LINES, values_of

SVG = "{http://www.w3.org/2000/svg}"
NASTY = """</title><script>alert("1")</script> & 'x' \u202e $\\frac{"""
LOSS = Line("validation", [0, 250, 500, 750], [5.25, 4.837, 4.5, 4.625])
RATE = Line("rate", [0, 250, 500, 750], [0.0, 0.1, 0.2, 0.3])


def tips(svg: str) -> list[list[str]]:
    """What is said, place by place."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return [
        [str(text.text) for text in group.iter(f"{SVG}text")]
        for group in groups
        if group.get("class") == "tip"
    ]


def marks(svg: str) -> list[tuple[float, float]]:
    """Where the dots on the curves are, tip by tip."""
    return [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
        if group.get("class") == "tip"
        for dot in group.iter(f"{SVG}circle")
        if dot.get("stroke") == CARD
    ]


def corners(svg: str, color: str) -> list[tuple[float, float]]:
    """Of the curve in this colour."""
    (curve,) = (
        line
        for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline")
        if line.get("stroke") == f"var({color})" and line.get("stroke-width") == "2"
    )
    pairs = (pair.split(",") for pair in curve.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def words(svg: str) -> list[str]:
    """All that is written in a drawing, tips apart."""
    root = ElementTree.fromstring(svg)
    return [str(text.text) for text in root.findall(f"{SVG}text")]


@pytest.mark.parametrize(
    "options",
    [{}, {"zero": True}, {"epochs_per_step": 0.01}, {"best": Mark(500, 4.5, "best")}],
)
def test_a_tip_says_the_values_where_the_curves_pass(options: dict[str, Any]) -> None:
    svg = lines("Losses", [LOSS, RATE], "updates", "nats per token", **options)
    said = tips(svg)
    assert [tip[0].partition(",")[0] for tip in said] == [
        "step 0",
        "step 250",
        "step 500",
        "step 750",
    ]
    assert said[1][1:] == ["validation 4.8370", "rate 0.1000"]
    drawn = zip(corners(svg, "--c1"), corners(svg, "--c2"), strict=True)
    assert marks(svg) == [corner for both in drawn for corner in both]


def test_every_place_of_the_axes_is_nearest_to_one_tip() -> None:
    """Whatever is pointed at between the axes says something, and one thing alone."""
    svg = lines("Losses", [LOSS], "updates", "nats")
    boxes = [
        (float(box.attrib["x"]), float(box.attrib["x"]) + float(box.attrib["width"]))
        for box in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if box.get("pointer-events") == "all"
    ]
    assert len(boxes) == 4
    for (_, end), (start, _) in zip(boxes, boxes[1:], strict=False):
        assert start == pytest.approx(end, abs=0.11)
    first, *_, last = corners(svg, "--c1")
    assert boxes[0][0] < first[0] < last[0] < boxes[-1][1]


def test_no_tip_leaves_the_drawing() -> None:
    series = [Line(f"a run with a long name {n}", [0, 1, 2], [1, 2, n]) for n in range(12)]
    for svg in (
        lines("A", series, "updates", "nats"),
        charts.heat_map("B", [[0.1] * 12], "head", "layer"),
    ):
        root = ElementTree.fromstring(svg)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        boxes = [box for box in root.iter(f"{SVG}rect") if box.get("rx") == "6"]
        assert boxes
        for box in boxes:
            x, y, wide, high = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
            assert min(x, y) >= 0
            assert x + wide <= width + 0.1
            assert y + high <= height + 0.1


def test_a_point_on_a_logarithmic_axis_is_on_the_curve() -> None:
    line = Line("", [1, 10, 1000], [3.0, 2.0, 1.5])
    svg = lines("Epochs", [line], "epochs", "nats", log_x=True)
    assert tips(svg) == [
        ["epochs 1", "nats 3.0000"],
        ["epochs 10", "nats 2.0000"],
        ["epochs 1,000", "nats 1.5000"],
    ]
    assert marks(svg) == corners(svg, "--c1")
    (a, _), (b, _), (c, _) = corners(svg, "--c1")
    assert (c - a) / (b - a) == pytest.approx(3, abs=0.01)


def test_a_long_curve_keeps_its_ends_and_its_lowest_point() -> None:
    y = [1.0] * 1000
    y[777] = 0.5
    found = tips(lines("Norm", [Line("", list(range(1000)), y)], "updates", "norm"))
    assert len(found) <= TIPS + 2
    assert found[0] == ["step 0", "norm 1.0000"]
    assert ["step 777", "norm 0.5000"] in found
    assert found[-1] == ["step 999", "norm 1.0000"]


def test_the_gap_between_two_curves_is_filled_and_said() -> None:
    train = Line("training", [0, 250, 750], [5.0, 4.5, 3.5])
    svg = lines("A", [train, LOSS], "updates", "nats", between=("validation", "training"))
    assert "<polygon" in svg
    assert ["step 750", "training 3.5000", "validation 4.6250", "gap +1.1250"] in tips(svg)
    assert ["step 500", "validation 4.5000"] in tips(svg)
    assert "gap" in words(svg)


def test_zero_has_its_line_and_its_sides() -> None:
    line = Line("rate 0.1", [1, 10], [0.2, 0.1])
    svg = lines("A", [line], "epochs", "nats", sides=("hurts", "helps"))
    assert {"↑ hurts", "↓ helps"} <= set(words(svg))
    assert max(y for _, y in corners(svg, "--c1")) < float(zero_line(svg))


def zero_line(svg: str) -> str:
    """Where it is."""
    (line,) = (
        line
        for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline")
        if line.get("stroke") == "var(--ink)"
    )
    return line.attrib["points"].split()[0].split(",")[1]


def test_what_is_not_drawn_says_nothing() -> None:
    line = Line("a", [0, 1, 2, 3], [1.0, None, math.nan, math.inf])
    assert tips(lines("A", [line], "layer", "a", zero=True)) == [["layer 0", "a 1.0000"]]
    with pytest.raises(ValueError, match="nothing to draw"):
        lines("A", [Line("a", [1], [None])], "layer", "a")


def test_intervals_are_said() -> None:
    line = Line("random", [0, 0.5], [1, 2], [0.5, None], [1.5, None])
    assert tips(lines("Knock-out", [line], "fraction", "nats")) == [
        ["fraction 0", "random 1.0000 (0.5000 to 1.5000)"],
        ["fraction 0.5", "random 2.0000"],
    ]


def test_every_kind_of_drawing_says_its_values() -> None:
    mean = {"x": 0.1, "mean": 2.0, "low": 1.9, "high": 2.1, "values": [1.95, 2.05]}
    groups = [Dots("a", [mean]), Dots("b", [{**mean, "low": None}], 1)]
    both = ["rate 0.1", "a 2.0000 (1.9000 to 2.1000)", "b 2.0000"]
    assert tips(charts.dots("Dots", groups, "rate", "loss")) == [both]
    row = {"label": "rate=0.1", "difference": 0.1, "low": 0.05, "high": 0.15}
    other = {**row, "label": "rate=0.2", "low": None, "high": None}
    rows = [{**row, "above_seed_noise": True}, {**other, "above_seed_noise": None}]
    assert tips(charts.forest("Forest", rows, "difference")) == [
        ["rate=0.1", "+0.1000 (0.0500 to 0.1500)"],
        ["rate=0.2", "+0.1000"],
    ]
    bins = [{"confidence": 0.25, "accuracy": 0.5, "count": 3}]
    (said,) = tips(charts.reliability("Reliability", bins))
    assert said == ["confidence 0.250", "accuracy 0.500", "3 tokens, 100.0%"]
    squares = charts.heat_map("Heads", [[0.1, None], [-0.00001, 0.3]], "head", "layer")
    assert tips(squares) == [
        ["layer 0, head 0: +0.1000"],
        ["layer 1, head 0: +0.0000"],
        ["layer 1, head 1: +0.3000"],
    ]
    assert "-0.000" not in words(squares)


def test_labels_are_escaped() -> None:
    mean = {"x": 0.1, "mean": 2.0, "low": 1.9, "high": 2.1, "values": []}
    row = {"label": NASTY, "difference": 0, "low": None, "high": None, "above_seed_noise": True}
    shown = shorten(" ".join(NASTY.split()))
    for svg in (
        lines(NASTY, [Line(NASTY, [0, 1], [1, 2])], NASTY, NASTY),
        charts.dots("B", [Dots(NASTY, [mean])], NASTY, NASTY),
        charts.forest("C", [row], NASTY),
    ):
        assert "<script" not in svg
        assert all(any(shown in line for line in tip) for tip in tips(svg))
        assert tips(svg)


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert len({lines("A", [LOSS, RATE], "updates", "nats") for _ in range(3)}) == 1


@pytest.mark.parametrize("n_layer", [1, 2, 3, 4, 12])
def test_layers_are_counted_in_whole_numbers(n_layer: int) -> None:
    line = Line("site", list(range(n_layer)), [0.1] * n_layer)
    svg = lines("Rates", [line], "layer", "rate", whole_x=True, zero=True)
    below = [text for text in words(svg) if text.isdecimal()]
    assert below == [text for text in below if 0 <= int(text) < max(2, n_layer)]
    assert len(below) == len(set(below)) > 0
    assert not any(
        "." in text for text in words(svg) if text not in ("0.05", "0.10", "0.00", "0.15")
    )


def test_numbers_on_an_axis_are_round_and_few() -> None:
    for low, high in ((0, 1), (-0.3, 0.7), (1.23, 1.27), (0, 12_345), (3, 3.0001)):
        ticks = nice_ticks(low, high, 5)
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        assert len(set(tick_words(ticks))) == len(ticks)
    assert tick_words([-0.5, -0.0, 0.5]) == ["-0.5", "0.0", "0.5"]


def test_labels_beside_curves_do_not_cover_each_other() -> None:
    moved = keep_apart([50, 51, 52, 99], 15, 0, 100)
    in_order = sorted(moved)
    assert all(b - a >= 15 for a, b in zip(in_order, in_order[1:], strict=False))
    assert in_order == moved
    assert max(moved) <= 100
    assert keep_apart([10, 50, 90], 15, 0, 100) == [10, 50, 90]


def test_short_labels_are_beside_their_curves_and_long_ones_below() -> None:
    short = [LOSS._replace(label="a"), RATE._replace(label="b")]
    assert lines("A", short, "x", "y").count(f'viewBox="0 0 {SMALL[0]:g} {SMALL[1]:g}"') == 1
    long = [LOSS._replace(label="a" * 30), RATE._replace(label="b" * 30)]
    svg = lines("A", long, "x", "y")
    assert float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3]) > SMALL[1]
    assert {"a" * 30, "b" * 30} <= set(words(svg))


def test_a_rate_has_one_colour_everywhere() -> None:
    usual = [0, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert len({rate_color(rate) for rate in usual}) == len(usual)
    assert colors_of([0.2, 0], rates=True) == [rate_color(0.2), rate_color(0)]
    assert colors_of([0.1, 0.11], rates=True) == [0, 1]  # both cannot have that of 0.1
    assert colors_of(["a", "b"], rates=False) == [0, 1]


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
