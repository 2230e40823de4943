"""Figures as SVG that takes its colours from the page around it: one drawing for light and dark.

matplotlib draws with colours that nobody would choose; they are then replaced by CSS variables.
The same numbers give the same bytes: no date, no random names.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

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
Numbers = Sequence[float | None]


class Line(NamedTuple):
    label: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False
    color: int | None = None
    """Number of the colour; None: the next."""


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
        self.svg = ""

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
        self.svg = svg.replace("<svg", about, 1)


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


def shorten_label(label: str) -> str:
    """A name that leaves room for the figure."""
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


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
    with drawing(name, x_label, y_label) as canvas:
        axes = canvas.axes
        for line in series:
            xs, style = to_floats(line.x), "--" if line.dashed else "-"
            chosen: dict[str, Any] = {"marker": "o"} if len(xs) == 1 else {}
            if line.color is not None:
                chosen["color"] = SERIES[line.color]
            label = "\n".join(map(shorten_label, line.label.splitlines()))
            (curve,) = axes.plot(xs, to_floats(line.y), style, label=label, **chosen)
            if line.low is not None and line.high is not None:
                low, high = to_floats(line.low), to_floats(line.high)
                axes.fill_between(xs, low, high, color=curve.get_color(), alpha=0.15, lw=0)
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


def reliability(name: str, points: Sequence[dict[str, Any]]) -> str:
    """Accuracy over confidence; on the diagonal a model means what it says."""
    total = sum(point["count"] for point in points) or 1
    with drawing(name, "confidence", "accuracy") as canvas:
        axes = canvas.axes
        axes.plot([0, 1], [0, 1], "--", color=GRID, lw=1.2)
        x, y = ([point[key] for point in points] for key in ("confidence", "accuracy"))
        axes.plot(x, y, "-", color=SERIES[0])
        sizes = [12 + 240 * point["count"] / total for point in points]
        axes.scatter(x, y, s=sizes, color=SERIES[0], alpha=0.6, lw=0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
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
        axes.set_yticks(range(len(rows)), [shorten_label(row["label"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
    return canvas.svg


def dots(name: str, groups: Sequence[tuple[str, Sequence[dict[str, Any]]]], x: str, y: str) -> str:
    """Points over one axis: means with intervals, single seeds as dots, one colour per group."""
    with drawing(name, x, y) as canvas:
        axes = canvas.axes
        for (label, points), color in zip(groups, SERIES * (1 + len(groups)), strict=False):
            at = [point["x"] for point in points]
            axes.plot(
                at,
                [point["mean"] for point in points],
                "-",
                color=color,
                label=shorten_label(label),
            )
            for point in points:
                if point["low"] is not None:
                    axes.plot([point["x"]] * 2, [point["low"], point["high"]], color=color)
                values = point["values"]
                axes.plot([point["x"]] * len(values), values, "o", color=color, ms=3, alpha=0.5)
        every = [point["x"] for _, points in groups for point in points]
        if min(every) > 0 and max(every) > 30 * min(every):
            use_log_x(axes, every)
        if len(groups) > 1:
            canvas.legend()
    return canvas.svg
