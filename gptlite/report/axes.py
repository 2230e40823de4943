"""Axes to draw on, as SVG: where a number goes, which are written, what a pointer is told.

Units are about pixels. Colours are CSS variables of the page around the drawing, so that one serves
light and dark. A tip is hidden until a pointer or a finger is on its place; that needs no script.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from gptlite.report.series import shorten

COLORS = tuple(f"var(--c{number})" for number in range(1, 7))
INK, SOFT, GRID, CARD = "var(--ink)", "var(--soft)", "var(--line)", "var(--card)"
FONT, ROW, CHARACTER = 12, 16, 6.5
"""Sizes of a text: of its letters, from one line to the next, and about how wide a letter is."""
SMALL, TALL, WIDE = (360.0, 236.0), (360.0, 300.0), (1080.0, 400.0)
"""Width and height: of a drawing for a third of a desk, for all of a phone, and for all of a desk.
"""
TIP_ROWS, TIP_CHARACTERS = 9, 50
"""That a tip has room for."""
LEGEND_CHARACTERS = 48
Spot = tuple[float, float]
Words = tuple[str, str]
"""A colour, empty for none, and what is said."""


class Scale(NamedTuple):
    """From a number to a place."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


def find_range(values: Sequence[float], *, zero: bool = False, pad: float = 0.06) -> Spot:
    """Lowest and highest, with some room around; `zero`: 0 is among them."""
    low, high = min(values), max(values)
    room = pad * (high - low) or abs(high) * 0.1 or 1.0
    if zero:
        return (min(0.0, low - room if low < 0 else 0.0), max(0.0, high + room))
    return low - room, high + room


def nice_ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, at most about so many."""
    raw = ((high - low) or 1.0) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_words(ticks: Sequence[float]) -> list[str]:
    """All with as many digits as the closest two need."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if digits > 5 or max(map(abs, ticks), default=0.0) >= 1e7:
        return [f"{tick:.3g}" for tick in ticks]
    return [f"{tick + 0.0:,.{digits}f}" for tick in ticks]


def value_words(value: float) -> str:
    """A value at which something was measured, on an axis that has marks only there."""
    if abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value / 1000:.3g}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"


def keep_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved as little as lets neighbours be `gap` apart between low and high."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    floor = low
    for place in order:
        moved[place] = floor = max(moved[place], floor)
        floor += gap
    ceiling = high
    for place in reversed(order):
        moved[place] = ceiling = min(moved[place], ceiling)
        ceiling -= gap
    return moved


def text_width(words: str) -> float:
    return CHARACTER * len(words)


class Drawing:
    """Axes, what is drawn on them, and tips above all of it."""

    def __init__(self, name: str, size: Spot, x: Spot, y: Spot, *, log_x: bool = False) -> None:
        """`x` and `y` are the lowest and the highest number of each axis."""
        self.name, (self.width, self.height) = name, size
        self.parts: list[str] = []
        self.tips: list[str] = []
        self.x_range, self.y_range, self.log_x = x, y, log_x
        self.left, self.right, self.top, self.bottom = 10.0, self.width - 10, 24.0, self.height - 40
        self.place()

    def place(self) -> None:
        """Let the scales follow the margins."""
        self.x = Scale(*self.x_range, self.left, self.right, self.log_x)
        self.y = Scale(*self.y_range, self.bottom, self.top)

    def write(
        self, x: float, y: float, words: str, anchor: str = "start", color: str = SOFT
    ) -> None:
        """On a ground of its own: lines may pass behind."""
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}"{at} fill="{color}" paint-order="stroke" '
            f'stroke="{CARD}" stroke-width="3">{escape(words)}</text>'
        )

    def draw(self, spots: Iterable[Spot], color: str, width: float = 2, more: str = "") -> None:
        """A line through spots."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        self.parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{more}/>'
        )

    def rule(self, start: Spot, end: Spot, color: str = GRID, more: str = "") -> None:
        self.draw([start, end], color, 1, more)

    def fill(self, spots: Iterable[Spot], color: str, opacity: float) -> None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        self.parts.append(f'<polygon points="{points}" fill="{color}" fill-opacity="{opacity:g}"/>')

    def dot(self, spot: Spot, color: str, radius: float = 3, more: str = "") -> None:
        self.parts.append(circle(spot, color, radius, more))

    def y_axis(self, label: str, most: int = 5, *, ticks: bool = True) -> None:
        """Numbers at the left, each with a line; the label lies above, where it can be read."""
        at = nice_ticks(*self.y_range, most) if ticks else []
        words = tick_words(at)
        self.left = 12 + max(map(text_width, words), default=0.0)
        self.place()
        for tick, word in zip(at, words, strict=True):
            y = self.y(tick)
            self.rule((self.left, y), (self.right, y))
            self.write(self.left - 6, y + 4, word, "end")
        self.write(2, 13, label)

    def x_axis(self, label: str, at: Sequence[float] | None = None, *, whole: bool = False) -> None:
        """Numbers below: round ones, or where something was measured; the label under them."""
        most = max(2, int((self.right - self.left) // 78))
        ticks = nice_ticks(*self.x_range, most, whole=whole) if at is None else at
        words = tick_words(ticks) if at is None else [value_words(tick) for tick in ticks]
        free = -math.inf
        for tick, word in zip(ticks, words, strict=True):
            x, half = self.x(tick), text_width(word) / 2
            if x - half >= free:
                self.write(x, self.bottom + 16, word, "middle")
                free = x + half + 5
        self.rule((self.left, self.bottom), (self.right, self.bottom), SOFT)
        self.write(self.right, self.bottom + 32, label, "end")

    def legend(self, entries: Sequence[tuple[str, str, str]]) -> None:
        """A row, or more, per colour, dash and label, below the axes."""
        x, y = self.left, self.height + 8
        for color, dash, label in entries:
            first, *rest = textwrap.wrap(label, LEGEND_CHARACTERS)[:4] or [""]
            if x > self.left and x + 30 + text_width(first) > self.width:
                x, y = self.left, y + ROW
            self.rule((x, y), (x + 16, y), color, f' style="stroke-width:2.5"{dash}')
            self.write(x + 22, y + 4, first, color=INK)
            x += 40 + text_width(first)
            for line in rest:
                y += ROW
                self.write(self.left + 22, y + 4, line, color=INK)
                x = self.width
        self.height = y + ROW

    def tip(
        self,
        hit: tuple[Spot, Spot],
        x: float,
        rows: Sequence[Words],
        marks: Iterable[tuple[Spot, str]] = (),
        *,
        y: float | None = None,
        guide: bool = False,
    ) -> None:
        """What is said while a pointer is between the two corners of `hit`."""
        (left, top), (right, bottom) = hit
        rows = [(color, shorten(words, TIP_CHARACTERS)) for color, words in rows]
        if len(rows) > TIP_ROWS:
            rows = [*rows[: TIP_ROWS - 1], ("", f"and {len(rows) - TIP_ROWS + 1} more")]
        width = 18 + max(text_width(words) + 12 * bool(color) for color, words in rows)
        high = ROW * len(rows) + 8
        at = x + 10 if x + 10 + width < self.width else x - 10 - width
        at = max(1.0, min(at, self.width - width - 1))
        upper = max(1.0, min(self.top if y is None else y - high - 10, self.height - high - 1))
        shown = [f'<path d="M{x:.1f} {self.top:g}V{self.bottom:g}" stroke="{SOFT}"/>'] * guide
        shown += [circle(spot, color, 4, f' stroke="{CARD}"') for spot, color in marks]
        shown.append(
            f'<rect x="{at:.1f}" y="{upper:.1f}" width="{width:.1f}" height="{high}" rx="6" '
            f'fill="{CARD}" stroke="{SOFT}"/>'
        )
        for place, (color, words) in enumerate(rows):
            line = upper + 16 + ROW * place
            shown += [circle((at + 13, line - 4), color, 4)] * bool(color)
            start, ink = at + 9 + 12 * bool(color), INK if color or place else SOFT
            shown.append(
                f'<text x="{start:.1f}" y="{line:.1f}" fill="{ink}">{escape(words)}</text>'
            )
        self.tips.append(
            f'<g class="tip" tabindex="-1"><rect x="{left:.1f}" y="{top:.1f}" '
            f'width="{right - left:.1f}" height="{bottom - top:.1f}" fill="none" '
            f'pointer-events="all"/><g visibility="hidden" pointer-events="none">'
            f"{''.join(shown)}</g></g>"
        )

    def svg(self) -> str:
        tips = f'<g class="tips">{"".join(self.tips)}</g>' if self.tips else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(self.name)}" font-size="{FONT}" '
            f'font-family="system-ui, sans-serif">{"".join(self.parts)}{tips}</svg>'
        )


def circle(spot: Spot, color: str, radius: float, more: str = "") -> str:
    return f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="{radius:g}" fill="{color}"{more}/>'
