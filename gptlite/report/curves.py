"""Curves over a common axis: their bands, what is between two of them, the best place, the values.

Every value that was measured is said where a pointer or a finger is on it (axes.py).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptlite.report.axes import (
    CARD,
    COLORS,
    INK,
    SMALL,
    SOFT,
    Drawing,
    Spot,
    find_range,
    keep_apart,
    text_width,
)
from gptlite.report.series import (
    Line,
    choose_places,
    finite_points,
    format_ends,
    format_x,
    lowest_place,
    name_line,
    name_x,
)
from gptlite.runs.results import format_cell, format_difference, spread

CURVE_POINTS = 500
"""Of a curve; more cannot be seen."""
TIPS, WIDE_TIPS = 24, 48
"""Places of a drawing that say their values, about."""
LABEL_SHARE = 0.3
"""Of the width, at most for labels beside the ends of curves; longer ones go below."""
DASHES = ' stroke-dasharray="5 4"'
"""Of a line that is no measurement of its own."""
BAND, GAP_BAND = 0.15, 0.14
"""How strong an interval, and the gap between two curves, is filled."""


class Curve(NamedTuple):
    """A line that has something to draw."""

    label: str
    color: str
    dash: str
    column: dict[float, float]
    """y by x."""
    ends: dict[float, Spot]
    """Of the interval of y, by x."""


class Mark(NamedTuple):
    """A place with a word."""

    x: float
    y: float
    word: str


def curves_of(series: Sequence[Line], y_label: str) -> list[Curve]:
    """Raises ValueError if nothing is to be drawn."""
    found = []
    for place, line in enumerate(series):
        points = list(finite_points(line))
        color = COLORS[(place if line.color is None else line.color) % len(COLORS)]
        column = {x: y for x, y, _, _ in points}
        known = ((x, low, high) for x, _, low, high in points)
        ends = {x: (a, b) for x, a, b in known if a is not None and b is not None}
        if column:
            found.append(Curve(name_line(line, y_label), color, DASHES * line.dashed, column, ends))
    if not found:
        raise ValueError("nothing to draw")
    return found


def lines(
    name: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    size: Spot = SMALL,
    epochs_per_step: float | None = None,
    best: Mark | None = None,
    between: tuple[str, str] | None = None,
    sides: tuple[str, str] | None = None,
    zero: bool = False,
    whole_x: bool = False,
    log_x: bool = False,
    marked: bool = False,
) -> str:
    """Curves over a common x, each with a band if it has one.

    `between` are the labels of two curves whose distance is filled, `sides` words for what is above
    and what is below zero; `marked` shows where each value was measured.
    """
    curves = curves_of(series, y_label)
    labelled = len(curves) > 1 or bool(series[0].label)
    canvas = frame_curves(name, curves, size, log_x=log_x, zero=zero, sides=sides)
    direct = labelled and make_room_for_labels(canvas, curves)
    canvas.y_axis(y_label, 6 if size[1] > 290 else 4)
    measured = sorted({x for curve in curves for x in curve.column}) if log_x else None
    canvas.x_axis(axis_words(x_label, epochs_per_step), measured, whole=whole_x)
    if sides:
        draw_sides(canvas, sides)
    named = {curve.label: curve for curve in curves}
    filled = [named[label] for label in between or () if label in named]
    if len(filled) == 2:
        fill_between(canvas, *filled)
    for curve in curves:
        draw_curve(canvas, curve, marked or len(curve.column) == 1)
    if best is not None:
        draw_best(canvas, best)
    if direct:
        label_ends(canvas, curves)
    tell_curves(canvas, curves, x_label, filled, epochs_per_step)
    if labelled and not direct:
        canvas.legend([(c.color, c.dash, c.label) for c in curves])
    return canvas.svg()


def frame_curves(
    name: str,
    curves: Sequence[Curve],
    size: Spot,
    *,
    log_x: bool,
    zero: bool,
    sides: tuple[str, str] | None,
) -> Drawing:
    """Axes that hold the curves with their intervals."""
    xs = [x for curve in curves for x in curve.column]
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else find_range(xs)
    heights = [y for curve in curves for y in curve.column.values()]
    heights += [end for curve in curves for ends in curve.ends.values() for end in ends]
    y_range = find_range([*heights, 0.0] if sides else heights, zero=zero)
    return Drawing(name, size, x_range, y_range, log_x=log_x)


def make_room_for_labels(canvas: Drawing, curves: Sequence[Curve]) -> bool:
    """Whether the labels are short enough to be beside the ends of the curves."""
    beside = max(text_width(curve.label) for curve in curves)
    if fits := beside < LABEL_SHARE * canvas.width:
        canvas.right -= beside + 8
    return fits


def axis_words(x_label: str, epochs_per_step: float | None) -> str:
    if not epochs_per_step:
        return x_label
    return f"{x_label} ({format_x(100)} are {100 * epochs_per_step:.2g} epochs)"


def draw_curve(canvas: Drawing, curve: Curve, marked: bool) -> None:
    if curve.ends:
        upper = [(canvas.x(x), canvas.y(high)) for x, (_, high) in curve.ends.items()]
        lower = [(canvas.x(x), canvas.y(low)) for x, (low, _) in curve.ends.items()]
        canvas.fill([*upper, *reversed(lower)], curve.color, BAND)
    points = list(curve.column.items())
    kept = [points[place] for place in spread(len(points), CURVE_POINTS)]
    spots = [(canvas.x(x), canvas.y(y)) for x, y in kept]
    canvas.draw(spots, curve.color, more=curve.dash)
    for spot in spots if marked else ():
        canvas.dot(spot, curve.color)


def fill_between(canvas: Drawing, upper: Curve, lower: Curve) -> None:
    """The distance of two curves, with its word where it is widest enough at the end."""
    shared = [x for x in upper.column if x in lower.column]
    if len(shared) < 2:
        return
    above = [(canvas.x(x), canvas.y(upper.column[x])) for x in shared]
    below = [(canvas.x(x), canvas.y(lower.column[x])) for x in shared]
    canvas.fill([*above, *reversed(below)], upper.color, GAP_BAND)
    (x, y), (_, other) = above[-1], below[-1]
    if other - y > 20:
        canvas.write(x - 8, (y + other) / 2 + 4, "gap", "end", INK)


def draw_best(canvas: Drawing, best: Mark) -> None:
    x, y = canvas.x(best.x), canvas.y(best.y)
    canvas.rule((x, canvas.top), (x, canvas.bottom), SOFT, DASHES)
    canvas.dot((x, y), INK, 4.5, f' stroke="{CARD}" stroke-width="1.5"')
    left = x + 8 + text_width(best.word) > canvas.right
    near = x - 8 if left else x + 8
    canvas.write(near, canvas.top + 10, best.word, "end" if left else "start", INK)


def draw_sides(canvas: Drawing, sides: tuple[str, str]) -> None:
    zero = canvas.y(0)
    canvas.rule((canvas.left, zero), (canvas.right, zero), INK, ' style="stroke-width:1.5"')
    canvas.write(canvas.left + 4, canvas.top + 8, f"↑ {sides[0]}", color=INK)
    canvas.write(canvas.left + 4, canvas.bottom - 6, f"↓ {sides[1]}", color=INK)


def label_ends(canvas: Drawing, curves: Sequence[Curve]) -> None:
    """The name of each curve beside its last point."""
    last = [canvas.y(curve.column[max(curve.column)]) for curve in curves]
    places = keep_apart(last, 15, canvas.top, canvas.bottom)
    for curve, y in zip(curves, places, strict=True):
        canvas.write(canvas.right + 8, y + 4, curve.label, color=curve.color)


def tell_curves(
    canvas: Drawing,
    curves: Sequence[Curve],
    x_label: str,
    gap: Sequence[Curve],
    epochs_per_step: float | None,
) -> None:
    """At some places, the values of all curves there."""
    columns = [curve.column for curve in curves]
    most = TIPS if canvas.width < 600 else WIDE_TIPS
    at = choose_places(columns, most, [lowest_place(column) for column in columns])
    for x, hit in zip(at, strips(canvas, [canvas.x(x) for x in at]), strict=True):
        head = f"{name_x(x_label)} {format_x(x)}"
        if epochs_per_step:
            head += f", epoch {x * epochs_per_step:.2f}"
        there = [curve for curve in curves if x in curve.column]
        rows = [(curve.color, curve_words(curve, x)) for curve in there]
        if len(gap) == 2 and all(curve in there for curve in gap):
            rows.append(("", f"gap {format_difference(gap[0].column[x] - gap[1].column[x])}"))
        marks = [((canvas.x(x), canvas.y(c.column[x])), c.color) for c in there]
        canvas.tip(hit, canvas.x(x), [("", head), *rows], marks, guide=True)


def curve_words(curve: Curve, x: float) -> str:
    low, high = curve.ends.get(x, (None, None))
    return f"{curve.label} {format_cell(curve.column[x])}{format_ends(low, high)}"


def strips(canvas: Drawing, at: Sequence[float]) -> Iterator[tuple[Spot, Spot]]:
    """The part of the axes that is nearest to each place, from left to right."""
    bounds = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
    for left, right in zip([canvas.left - 8, *bounds], [*bounds, canvas.right + 8], strict=True):
        yield (left, canvas.top), (right, canvas.bottom + 8)
