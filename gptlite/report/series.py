"""The curves of a drawing as numbers, and the words for them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptlite.runs.results import format_cell, number, spread

LONGEST_LABEL = 36
ONE_OF = {"updates": "step"}
"""What a single value on an axis is called, where that is not the name of the axis."""
RATE_COLORS = ((0.0, 5), (0.05, 4), (0.1, 0), (0.2, 2), (0.3, 3), (0.5, 1))
"""A dropout rate and the number of its colour, the same in every drawing."""
N_COLORS = 6
Numbers = Sequence[float | None]
Place = tuple[float, float, float | None, float | None]
"""x and y, and the ends of the interval of y."""


class Line(NamedTuple):
    label: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False
    color: int | None = None
    """Number of the colour; None: the next."""


def shorten(text: str, most: int = LONGEST_LABEL) -> str:
    """A name that leaves room for the figure, or any text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def name_line(line: Line, y_label: str) -> str:
    """In one line of text; a line without a label is the only one, and is called as its axis."""
    return shorten(" ".join(line.label.split())) or y_label


def name_x(x_label: str) -> str:
    """What one value on the x axis is called."""
    return ONE_OF.get(x_label, x_label)


def format_x(x: float) -> str:
    return f"{x:,.0f}" if abs(x) < 1e15 and x == int(x) else f"{x:.4g}"


def format_ends(low: float | None, high: float | None) -> str:
    """An interval, behind its value."""
    return "" if low is None or high is None else f" ({format_cell(low)} to {format_cell(high)})"


def finite_points(line: Line) -> Iterator[Place]:
    """The places of a line at which something is drawn."""
    nothing = [None] * len(line.x)
    for values in zip(line.x, line.y, line.low or nothing, line.high or nothing, strict=True):
        x, y, low, high = map(number, values)
        if x is not None and y is not None:
            yield x, y, low, high


def lowest_place(column: dict[float, float]) -> float | None:
    return min(column, key=column.__getitem__) if column else None


def choose_places(
    columns: Sequence[dict[float, float]], most: int, extremes: Sequence[float | None] = ()
) -> list[float]:
    """Values of x: the first and the last of all, the extremes, and some evenly spaced between.

    Those between are taken where most lines have a value: training is logged more often than
    anything is evaluated.
    """
    every = sorted({x for column in columns for x in column})
    shared = [x for x in every if sum(x in column for column in columns) > 1]
    among = shared if len(shared) > 2 else every
    between = {among[place] for place in spread(len(among), most)}
    return sorted({every[0], every[-1]} | between | {x for x in extremes if x is not None})


def rate_color(rate: float) -> int:
    """The number of the colour of a dropout rate: that of the nearest one that has its own."""
    return min(RATE_COLORS, key=lambda known: abs(known[0] - rate))[1]


def colors_of(values: Sequence[object], rates: bool) -> list[int]:
    """A colour for each value of an axis; for rates their own, as long as no two share one."""
    numbers = [number(value) for value in values]
    if rates and None not in numbers:
        found = [rate_color(value) for value in numbers if value is not None]
        if len(set(found)) == len(found):
            return found
    return [place % N_COLORS for place in range(len(values))]
