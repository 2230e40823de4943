"""Figures as SVG that takes its colours from the page around it: one drawing for light and dark.

matplotlib draws with colours that nobody would choose; they are then replaced by CSS variables.
The same numbers give the same bytes: no date, no random names. A point says its value where a
pointer rests on it; that needs no script.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from gptlite.runs.results import format_cell, number, spread

INK, GRID = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
VARIABLES = {INK: "var(--ink)", GRID: "var(--line)"} | {
    color: f"var(--c{number})" for number, color in enumerate(SERIES, 1)
}
SIZE = 4.1, 2.8
"""Inches: readable on a phone, two or three beside each other on a desk."""
LONGEST_LABEL = 36
LEGEND_ROW = 0.17
"""Inches."""
LINE_POINTS, FIGURE_POINTS = 30, 150
"""That say their value, about; with 30 of them a curve leaves no gap for a pointer."""
POINT_RADIUS = 5
"""Of 72 to an inch: about 6 pixels on a page."""
ONE_OF = {"updates": "step"}
"""What a single value on an axis is called, where that is not the name of the axis."""
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


class Point(NamedTuple):
    """What is said about a place in a drawing."""

    color: str
    x: float
    y: float
    words: str


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


class Canvas:
    """Axes to draw on, and the SVG when it is done."""

    def __init__(self, name: str, size: tuple[float, float]) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.label = name
        self.figure = Figure(size, layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes: Any = self.figure.add_subplot()
        self.points: list[Point] = []
        self.svg = ""

    def describe_line(self, line: Line, color: str, x_label: str, y_label: str, most: int) -> None:
        """Let points of the line say where they are."""
        label = name_line(line, y_label)
        for x, y, low, high in notable_points(line, most):
            words = f"{name_x(x_label)} {format_x(x)}: {label} {format_cell(y)}"
            self.points.append(Point(color, x, y, words + format_ends(low, high)))

    def draw_points(self) -> str:
        """A transparent circle with its words at each point that is on the axes.

        To be called when the figure has been drawn: only then is its layout known.
        """
        if not self.points:
            return ""
        scale, height = 72 / self.figure.dpi, 72 * self.figure.get_size_inches()[1]
        drawn = []
        for color, points in groupby(self.points, key=lambda point: point.color):
            drawn.append(f'<g fill="{VARIABLES[color]}">')
            for point in points:
                x, y = self.axes.transData.transform((point.x, point.y))
                if self.axes.bbox.padded(1).contains(x, y):
                    drawn.append(
                        f'<circle cx="{x * scale:.1f}" cy="{height - y * scale:.1f}" '
                        f'r="{POINT_RADIUS}"><title>{escape(point.words)}</title></circle>'
                    )
            drawn.append("</g>")
        within = "".join(drawn)
        return f'<g class="points" fill-opacity="0" pointer-events="all">{within}</g>'

    def legend(self) -> None:
        """Below the axes, where it covers no curve; the figure grows by its height."""
        labels = self.axes.get_legend_handles_labels()[1]
        rows = sum(label.count("\n") + 1 for label in labels)
        width, height = self.figure.get_size_inches()
        self.figure.set_size_inches(width, height + LEGEND_ROW * rows)
        self.figure.legend(loc="outside lower left")

    def finish(self) -> None:
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
        # Several figures share a page: every name in one gets the figure's before it.
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        for color, variable in VARIABLES.items():
            svg = svg.replace(color, variable)
        svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)
        about = f'<svg role="img" aria-label="{escape(self.label)}"'
        before, end, after = svg.replace("<svg", about, 1).rpartition("</svg>")
        self.svg = before + self.draw_points() + end + after


@contextmanager
def drawing(name: str, x_label: str = "", y_label: str = "", size: Any = SIZE) -> Iterator[Canvas]:
    import matplotlib
    from cycler import cycler

    style: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "lines.linewidth": 1.6},
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **{"axes.edgecolor": GRID, "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True},
        "text.parse_math": False,  # a label may have a dollar in it
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"legend.frameon": False, "legend.fontsize": 9, "axes.prop_cycle": cycler(color=SERIES)},
        **{"xtick.major.size": 0, "ytick.major.size": 0},
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has its own fonts
        canvas = Canvas(name, size)
        canvas.axes.set_xlabel(x_label)
        canvas.axes.set_ylabel(y_label)
        yield canvas
        canvas.finish()


def shorten(text: str, most: int = LONGEST_LABEL) -> str:
    """A name that leaves room for the figure, or any text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def name_line(line: Line, y_label: str) -> str:
    """In one line of text; one that has no label is the only one, and is called as its axis."""
    return shorten(" ".join(line.label.split())) or y_label


def name_x(x_label: str) -> str:
    """What one value on the x axis is called."""
    return ONE_OF.get(x_label, x_label)


def format_x(x: float) -> str:
    return f"{x:,.0f}" if abs(x) < 1e15 and x == int(x) else f"{x:.4g}"


def format_ends(low: float | None, high: float | None) -> str:
    """An interval, behind its value."""
    return "" if low is None or high is None else f" ({format_cell(low)} to {format_cell(high)})"


def points_of_each(n_lines: int) -> int:
    """How many of a line say their value where there are so many lines."""
    return max(2, min(LINE_POINTS, FIGURE_POINTS // max(1, n_lines)))


def finite_points(line: Line) -> Iterator[Place]:
    """The places of a line at which something is drawn."""
    nothing = [None] * len(line.x)
    for values in zip(line.x, line.y, line.low or nothing, line.high or nothing, strict=True):
        x, y, low, high = map(number, values)
        if x is not None and y is not None:
            yield x, y, low, high


def notable_points(line: Line, most: int) -> list[Place]:
    """About so many, evenly spaced, among them the first, the last, the lowest and the highest."""
    points = list(finite_points(line))
    if not points:
        return []
    by_height = sorted(range(len(points)), key=lambda at: points[at][1])
    chosen = {*spread(len(points), most), by_height[0], by_height[-1]}
    return [points[at] for at in sorted(chosen)]


def use_log_x(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis that is marked where the values are."""
    axes.set_xscale("log")
    at = sorted(set(values))
    axes.set_xticks(at, [f"{x:.2g}" if x < 1000 else f"{x / 1000:g}k" for x in at])
    axes.minorticks_off()


def to_floats(values: Numbers) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def lines(
    name: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    epochs_per_step: float | None = None,
    marks: Sequence[tuple[float, float, str]] = (),
    zero: bool = False,
    log_x: bool = False,
) -> str:
    """Curves over a common x, each with a band if it has one; `marks` are points with a word."""
    most = points_of_each(len(series))
    with drawing(name, x_label, y_label) as canvas:
        axes = canvas.axes
        for line in series:
            xs, style = to_floats(line.x), "--" if line.dashed else "-"
            chosen: dict[str, Any] = {"marker": "o"} if len(xs) == 1 else {}
            if line.color is not None:
                chosen["color"] = SERIES[line.color]
            label = "\n".join(map(shorten, line.label.splitlines()))
            (curve,) = axes.plot(xs, to_floats(line.y), style, label=label, **chosen)
            if line.low is not None and line.high is not None:
                low, high = to_floats(line.low), to_floats(line.high)
                axes.fill_between(xs, low, high, color=curve.get_color(), alpha=0.15, lw=0)
            canvas.describe_line(line, curve.get_color(), x_label, y_label, most)
        for x, y, word in marks:
            axes.plot([x], [y], "o", color=INK, markersize=4)
            axes.annotate(word, (x, y), xytext=(-3, 6), textcoords="offset points", ha="right")
        if zero:
            axes.set_ylim(bottom=0)
        if log_x:
            use_log_x(axes, [x for line in series for x in to_floats(line.x)])
        if len(series) > 1 or "," in series[0].label:
            canvas.legend()
        if epochs_per_step:
            factor = epochs_per_step
            second = axes.secondary_xaxis(
                "top", functions=(lambda x: x * factor, lambda x: x / factor)
            )
            second.set_xlabel("epochs")
            second.spines["top"].set_visible(False)
    return canvas.svg


def heat_map(name: str, rows: Sequence[Numbers], x_label: str, y_label: str) -> str:
    """One square per value, the darker the larger, with the number in it."""
    from matplotlib.patches import Rectangle

    values = [to_floats(row) for row in rows]
    most = max((value for row in values for value in row if value == value), default=0.0) or 1.0
    n_rows, n_columns = len(values), max(map(len, values), default=0)
    height = 0.75 + min(6.0, 0.42 * n_rows)
    with drawing(name, x_label, y_label, (SIZE[0], max(1.5, height))) as canvas:
        axes = canvas.axes
        for row, of_row in enumerate(values):
            for column, value in enumerate(of_row):
                share = min(1.0, max(0.0, value / most)) if value == value else 0.0
                corner = column - 0.48, row - 0.46
                axes.add_patch(
                    Rectangle(
                        corner, 0.96, 0.92, facecolor=SERIES[0], alpha=0.06 + 0.6 * share, lw=0
                    )
                )
                if n_columns <= 12:
                    axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8)
        axes.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5))
        axes.set_xticks(range(n_columns), range(n_columns))
        axes.set_yticks(range(n_rows), range(n_rows))
        axes.grid(False)
    return canvas.svg


def reliability_line(points: Sequence[dict[str, Any]]) -> Line:
    x, y = ([point[key] for point in points] for key in ("confidence", "accuracy"))
    return Line("accuracy", x, y)


def reliability(name: str, points: Sequence[dict[str, Any]]) -> str:
    """Accuracy over confidence; on the diagonal a model means what it says."""
    total = sum(point["count"] for point in points) or 1
    with drawing(name, "confidence", "accuracy") as canvas:
        axes = canvas.axes
        axes.plot([0, 1], [0, 1], "--", color=GRID, lw=1.2)
        line = reliability_line(points)
        axes.plot(line.x, line.y, "-", color=SERIES[0])
        sizes = [12 + 240 * point["count"] / total for point in points]
        axes.scatter(line.x, line.y, s=sizes, color=SERIES[0], alpha=0.6, lw=0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        canvas.describe_line(line, SERIES[0], "confidence", "accuracy", len(points))
    return canvas.svg


def forest(name: str, rows: Sequence[dict[str, Any]], x_label: str) -> str:
    """Differences with their intervals, filled where they are above seed noise."""
    with drawing(name, x_label, "", (SIZE[0], 0.8 + 0.27 * len(rows))) as canvas:
        axes = canvas.axes
        axes.axvline(0, color=INK, lw=0.8)
        for place, row in enumerate(rows):
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=SERIES[0])
            face = SERIES[0] if row["above_seed_noise"] else "none"
            axes.plot([row["difference"]], [place], "o", color=SERIES[0], markerfacecolor=face)
            ends = format_ends(row["low"], row["high"])
            words = f"{shorten(row['label'])}: {row['difference']:+.4f}{ends}"
            canvas.points.append(Point(SERIES[0], row["difference"], place, words))
        axes.set_yticks(range(len(rows)), [shorten(row["label"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
    return canvas.svg


def dot_lines(groups: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[Line]:
    """The means of each group, with their intervals."""
    found = []
    for label, points in groups:
        x, y, low, high = ([point[key] for point in points] for key in ("x", "mean", "low", "high"))
        found.append(Line(label, x, y, low, high))
    return found


def dots(name: str, groups: Sequence[tuple[str, Sequence[dict[str, Any]]]], x: str, y: str) -> str:
    """Points over one axis: means with intervals, single seeds as dots, one colour per group."""
    means = dot_lines(groups)
    most = points_of_each(len(groups))
    with drawing(name, x, y) as canvas:
        axes = canvas.axes
        for place, (line, (_, points)) in enumerate(zip(means, groups, strict=True)):
            color = SERIES[place % len(SERIES)]
            axes.plot(line.x, line.y, "-", color=color, label=shorten(line.label))
            for point in points:
                if point["low"] is not None:
                    axes.plot([point["x"]] * 2, [point["low"], point["high"]], color=color)
                values = point["values"]
                axes.plot([point["x"]] * len(values), values, "o", color=color, ms=3, alpha=0.5)
            canvas.describe_line(line, color, x, y, most)
        every = [point["x"] for _, points in groups for point in points]
        if min(every) > 0 and max(every) > 30 * min(every):
            use_log_x(axes, every)
        if len(groups) > 1:
            canvas.legend()
    return canvas.svg
