"""The numbers of a drawing of lines as a small table: for fingers, and for who sees no drawing."""

from collections.abc import Sequence
from typing import NamedTuple

from gptlite.report.charts import Line, finite_points, format_x, name_line, name_x
from gptlite.runs.results import format_cell, spread

TABLE_LINES, TABLE_ROWS = 6, 10
"""Of lines a narrow page has room for no more; of rows the lowest values come on top."""


class Values(NamedTuple):
    head: list[str]
    rows: list[list[str]]


def values_of(
    series: Sequence[Line], x_label: str, y_label: str, *, lowest: bool = False
) -> Values | None:
    """A row per value of x, a column per line; None where there are too many lines, or no numbers.

    With `lowest` the lowest value of each line is shown too, and named.
    """
    columns = [{x: y for x, y, _, _ in finite_points(line)} for line in series]
    if not any(columns) or len(series) > TABLE_LINES:
        return None
    best = [min(c, key=c.__getitem__) if lowest and c else None for c in columns]
    head = [name_x(x_label), *(name_line(line, y_label) for line in series)]
    rows = []
    for x in chosen_places(columns, best):
        cells = [
            format_cell(column.get(x)) + " (lowest)" * (x == at)
            for column, at in zip(columns, best, strict=True)
        ]
        rows.append([format_x(x), *cells])
    return Values(head, rows)


def chosen_places(
    columns: Sequence[dict[float, float]], best: Sequence[float | None]
) -> list[float]:
    """Values of x: the first and the last of all, the best, and some evenly spaced between.

    Those between are taken where most lines have a value: training is logged more often than
    anything is evaluated.
    """
    every = sorted({x for column in columns for x in column})
    shared = [x for x in every if sum(x in column for column in columns) > 1]
    among = shared if len(shared) > 2 else every
    between = {among[place] for place in spread(len(among), TABLE_ROWS)}
    return sorted({every[0], every[-1]} | between | {x for x in best if x is not None})
