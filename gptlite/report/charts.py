"""Drawings of numbers that are no curves over time: means over an axis, differences, squares,
reliability. The same numbers give the same bytes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptlite.report.axes import (
    CARD,
    COLORS,
    INK,
    SMALL,
    SOFT,
    Drawing,
    Spot,
    find_range,
)
from gptlite.report.curves import (
    DASHES,
    curves_of,
    label_ends,
    make_room_for_labels,
    strips,
    tell_curves,
)
from gptlite.report.series import (
    Line,
    format_ends,
    shorten,
)
from gptlite.runs.results import format_difference

DASH_PATTERNS = ("", DASHES, ' stroke-dasharray="1.5 3"', ' stroke-dasharray="9 3 2 3"')
"""That tell lines apart whose points have the colours."""
SIDE = 0.25
"""Of the width that is drawn, for the word on one side of zero."""
NUMBERED_COLUMNS = 8
"""Of a map at most, for a number to have room in a square."""


def heat_map(name: str, rows: Sequence[Sequence[float | None]], x_label: str, y_label: str) -> str:
    """One square per value, the darker the larger."""
    known = [value for row in rows for value in row if value is not None]
    most = max(known) if max(known) > 0 else 1.0
    n_rows, n_columns = len(rows), max(map(len, rows))
    left, top = 34.0, 40.0
    side = (SMALL[0] - left - 8) / n_columns
    step = min(side, 34.0)
    canvas = Drawing(name, (SMALL[0], top + n_rows * step + 6), (0, 1), (0, 1))
    canvas.write(2, 13, y_label)
    canvas.write(canvas.width - 8, 13, x_label, "end")
    for column in range(0, n_columns, max(1, -(-n_columns // 16))):
        canvas.write(left + (column + 0.5) * side, top - 6, f"{column}", "middle")
    for row, values in enumerate(rows):
        y = top + row * step
        canvas.write(left - 8, y + step / 2 + 4, f"{row}", "end")
        for column, value in enumerate(values):
            if value is None:
                continue
            x, share = left + column * side, min(1.0, max(0.0, value / most))
            canvas.parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{side - 2:.1f}" rx="3" '
                f'height="{step - 2:.1f}" fill="{COLORS[0]}" '
                f'fill-opacity="{0.06 + 0.6 * share:.2f}"/>'
            )
            if n_columns <= NUMBERED_COLUMNS:
                words = f"{value:.3f}".replace("-0.000", "0.000")
                canvas.write(x + side / 2, y + step / 2 + 4, words, "middle", INK)
            words = f"{y_label} {row}, {x_label} {column}: {format_difference(value)}"
            canvas.tip(((x, y), (x + side, y + step)), x + side / 2, [("", words)], y=y)
    return canvas.svg()


def reliability_line(points: Sequence[dict[str, Any]]) -> Line:
    x, y = ([point[key] for point in points] for key in ("confidence", "accuracy"))
    return Line("accuracy", x, y)


def reliability(name: str, points: Sequence[dict[str, Any]]) -> str:
    """Accuracy over confidence; on the diagonal a model means what it says."""
    (curve,) = curves_of([reliability_line(points)], "accuracy")
    total = sum(point["count"] for point in points) or 1
    canvas = Drawing(name, SMALL, (0, 1), (0, 1))
    canvas.y_axis("accuracy")
    canvas.x_axis("confidence")
    canvas.rule((canvas.left, canvas.bottom), (canvas.right, canvas.top), SOFT, DASHES)
    canvas.draw([(canvas.x(x), canvas.y(y)) for x, y in curve.column.items()], curve.color)
    spots = [canvas.x(point["confidence"]) for point in points]
    for point, hit in zip(points, strips(canvas, spots), strict=True):
        x, y = canvas.x(point["confidence"]), canvas.y(point["accuracy"])
        share = point["count"] / total
        canvas.dot((x, y), curve.color, 2.5 + 9 * share**0.5, ' fill-opacity="0.6"')
        rows = [
            ("", f"confidence {point['confidence']:.3f}"),
            (curve.color, f"accuracy {point['accuracy']:.3f}"),
            ("", f"{point['count']:,} tokens, {share:.1%}"),
        ]
        canvas.tip(hit, x, rows, [((x, y), curve.color)], guide=True)
    return canvas.svg()


def forest(
    name: str, rows: Sequence[dict[str, Any]], x_label: str, sides: tuple[str, str] | None = None
) -> str:
    """Differences with their intervals, filled where they are above seed noise.

    `sides` are words for what is below and what is above zero. A row may name its `color`.
    """
    ends = [row[key] for row in rows for key in ("low", "difference", "high")]
    known = [end for end in ends if end is not None]
    step, top = 36.0, 34.0 if sides else 14.0
    size = (SMALL[0], top + step * len(rows) + 44)
    margin = SIDE * (max(known, default=0.0) - min(known, default=0.0)) if sides else 0.0
    low, high = find_range([*known, -margin, margin])
    canvas = Drawing(name, size, (low, high), (0, 1))
    canvas.top = top
    zero = canvas.x(0)
    canvas.rule((zero, top), (zero, canvas.bottom), INK)
    if sides:
        canvas.write(zero - 8, 16, f"← {sides[0]}", "end", INK)
        canvas.write(zero + 8, 16, f"{sides[1]} →", color=INK)
    canvas.x_axis(x_label)
    for place, row in enumerate(rows):
        y = top + step * place + 27
        color = COLORS[row.get("color", 0)]
        canvas.write(canvas.left, y - 12, shorten(row["label"], 54), color=INK)
        if row["low"] is not None and row["high"] is not None:
            canvas.draw([(canvas.x(row["low"]), y), (canvas.x(row["high"]), y)], color)
        face = color if row["above_seed_noise"] else CARD
        spot = (canvas.x(row["difference"]), y)
        canvas.dot(spot, face, 4.5, f' stroke="{color}" stroke-width="2"')
        words = f"{format_difference(row['difference'])}{format_ends(row['low'], row['high'])}"
        hit = (canvas.left, y - 24), (canvas.right, y + 12)
        canvas.tip(hit, spot[0], [("", shorten(row["label"])), (color, words)], y=y)
    return canvas.svg()


class Dots(NamedTuple):
    """Means over an axis; a point has x, mean, low, high and values, and may have a color."""

    label: str
    points: Sequence[dict[str, Any]]
    color: int | None = None
    """Of all points; None: each has its own."""


def dot_lines(groups: Sequence[Dots]) -> list[Line]:
    """The means of each group, with their intervals."""
    found = []
    for label, points, color in groups:
        x, y, low, high = ([point[key] for point in points] for key in ("x", "mean", "low", "high"))
        found.append(Line(label, x, y, low, high, color=color))
    return found


def dots(name: str, groups: Sequence[Dots], x_label: str, y_label: str) -> str:
    """Means with intervals over an axis, the single seeds as small dots, a line per group."""
    curves = [
        curve._replace(color=SOFT, dash=DASH_PATTERNS[place % len(DASH_PATTERNS)])
        if group.color is None
        else curve
        for place, (group, curve) in enumerate(
            zip(groups, curves_of(dot_lines(groups), y_label), strict=True)
        )
    ]
    every = [point for group in groups for point in group.points]
    xs = sorted({point["x"] for point in every})
    heights = [value for point in every for value in point["values"]]
    heights += [
        point[key] for point in every for key in ("mean", "low", "high") if point[key] is not None
    ]
    log_x = xs[0] > 0 and xs[-1] > 30 * xs[0]
    canvas = Drawing(name, SMALL, find_dots_range(xs, log_x), find_range(heights), log_x=log_x)
    direct = len(groups) > 1 and make_room_for_labels(canvas, curves)
    canvas.y_axis(y_label, 4)
    canvas.x_axis(x_label, xs)
    for group, curve in zip(groups, curves, strict=True):
        spots = [(canvas.x(x), canvas.y(y)) for x, y in curve.column.items()]
        canvas.draw(spots, curve.color, 1.5, curve.dash)
        for point in group.points:
            draw_point(canvas, point, COLORS[point.get("color", group.color or 0)])
    if direct:
        label_ends(canvas, curves)
    tell_curves(canvas, curves, x_label, (), None)
    if len(groups) > 1 and not direct:
        canvas.legend([(curve.color, curve.dash, curve.label) for curve in curves])
    return canvas.svg()


def find_dots_range(xs: Sequence[float], log_x: bool) -> Spot:
    """Of an axis with some room beside the outermost points."""
    return (xs[0] / 1.15, xs[-1] * 1.15) if log_x else find_range(xs, pad=0.08)


def draw_point(canvas: Drawing, point: dict[str, Any], color: str) -> None:
    x = canvas.x(point["x"])
    if point["low"] is not None and point["high"] is not None:
        canvas.draw([(x, canvas.y(point["low"])), (x, canvas.y(point["high"]))], color)
    for value in point["values"]:
        canvas.dot((x, canvas.y(value)), color, 2, ' fill-opacity="0.5"')
    canvas.dot((x, canvas.y(point["mean"])), color, 4.5)
