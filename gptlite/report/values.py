"""The numbers of a drawing of lines as a small table: for fingers, and for who sees no drawing."""

from collections.abc import Sequence
from typing import NamedTuple

from gptlite.report.series import (
    Line,
    choose_places,
    finite_points,
    format_x,
    lowest_place,
    name_line,
    name_x,
)
from gptlite.runs.results import format_cell

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
    best = [lowest_place(column) if lowest else None for column in columns]
    head = [name_x(x_label), *(name_line(line, y_label) for line in series)]
    rows = []
    for x in choose_places(columns, TABLE_ROWS, best):
        cells = [
            format_cell(column.get(x)) + " (lowest)" * (x == at)
            for column, at in zip(columns, best, strict=True)
        ]
        rows.append([format_x(x), *cells])
    return Values(head, rows)
