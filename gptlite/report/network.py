"""A drawing of the network with every place where something can drop, how much does, and the shape.

Top to bottom, as the text flows. The line at the left is the residual stream: attention and MLP
read it, and add to it what they make. A site sits on the line that it drops from; it is filled, the
stronger the higher its rate. Colours are the page's; nothing else of a page is needed.
"""

from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from gptlite.config.dropout import SITES

ROW, TOP = 27, 40
"""Height of a row, and where the first one is."""
WIDTH = 372
STREAM, BRANCH = 24, 148
"""Where the residual stream runs, and what leaves it."""
PILL, PILL_WIDTH, SHAPE = 138, 162, 358
"""Where a site's box begins, how wide it is, and where the shapes end."""
BEND = 8


class Row(NamedTuple):
    operation: str
    site: str
    shape: str = ""
    """A letter per dimension; of a site, that of its tensor."""
    place: str = "branch"
    """On the `stream`, on the `branch` from it, where that `leaves` it or `joins` it again."""


BEFORE = (
    Row("embedding", "token", place="stream"),
    Row("+ position", "embedding", place="stream"),
)
ATTENTION = (
    Row("norm", "", "BTC", "leaves"),
    Row("Q Kᵀ / √d", "key"),
    Row("softmax: A", "attention_weights"),
    Row("A · V", "head"),
    Row("heads joined: Z", "attention_context"),
    Row("Z · W_o", "attention_output"),
    Row("", "layer"),
    Row("added to the stream", "", "BTC", "joins"),
)
MLP = (
    Row("norm", "", "BTC", "leaves"),
    Row("W₁, activation", "mlp_activation"),
    Row("W₂", "mlp_output"),
    Row("", "layer"),
    Row("added to the stream", "", "BTC", "joins"),
)
AFTER = (Row("norm", "final", place="stream"), Row("logits", "", "BTV", "stream"))


def network(rates: Mapping[str, float], n_layer: int) -> str:
    """SVG; `rates` of every site, 0 where it never drops."""
    rows = [*BEFORE, *ATTENTION, *MLP, *AFTER]
    first, last = len(BEFORE), len(BEFORE) + len(ATTENTION) + len(MLP) - 1
    above, below = y_of(first) - 36, y_of(last) + 17
    live = [f"{site} {rate:g}" for site, rate in rates.items() if rate > 0]
    label = f"The network; dropout at {', '.join(live) or 'no site'}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y_of(len(rows)) - 4}" '
        f'role="img" aria-label="{escape(label)}" class="network" font-size="12">',
        text(STREAM - 14, 16, "residual stream", "soft"),
        text(SHAPE, 16, "shape", "soft", "end"),
        f'<rect x="6" y="{above}" width="{WIDTH - 12}" height="{below - above}" rx="10" '
        'fill="none" stroke="var(--line)" stroke-width="1.2"/>',
        text(SHAPE, above + 17, f"{n_layer} × this layer", "soft", "end"),
        line(f"M{STREAM} 24V{y_of(len(rows) - 1) + 8}", 3),
    ]
    for number, row in enumerate(rows):
        parts += draw_flow(row, y_of(number))
    for number, row in enumerate(rows):
        parts += draw_row(row, y_of(number), rates.get(row.site, 0.0))
    return "".join([*parts, "</svg>"])


def y_of(number: int) -> int:
    """Of a row; the frame around a layer needs room above and below."""
    inside = number >= len(BEFORE)
    behind = number >= len(BEFORE) + len(ATTENTION) + len(MLP)
    return TOP + ROW * number + 32 * inside + 14 * behind


def draw_flow(row: Row, y: int) -> Iterator[str]:
    """The lines of a row, which its site covers."""
    if row.place == "leaves":
        yield line(f"M{STREAM} {y - 8}H{BRANCH - BEND}Q{BRANCH} {y - 8} {BRANCH} {y}V{y + ROW}")
    elif row.place == "joins":
        yield line(f"M{BRANCH} {y - ROW}V{y - BEND}Q{BRANCH} {y} {BRANCH - BEND} {y}H{STREAM}")
    elif row.place == "branch":
        yield line(f"M{BRANCH} {y - ROW}V{y + ROW}")
    elif row.site:
        yield line(f"M{STREAM} {y}H{PILL}")


def draw_row(row: Row, y: int, rate: float) -> Iterator[str]:
    if row.place == "joins":
        yield f'<circle cx="{STREAM}" cy="{y}" r="8" fill="var(--card)" stroke="var(--soft)"/>'
        yield text(STREAM, y + 4, "+", "ink", "middle")
    if row.operation:
        yield text(*operation_place(row, y))
    if row.site:
        yield from draw_site(row.site, y, rate)
    if shape := SITES[row.site].tensor if row.site else row.shape:
        yield text(SHAPE, y + 4, " ".join(shape), "soft", "end")


def operation_place(row: Row, y: int) -> tuple[float, float, str, str, str]:
    """Where the words of an operation are: beside the line on which it happens."""
    if row.place == "branch":
        return PILL - 8, y + 4, row.operation, "ink", "end"
    if row.place == "leaves":
        return BRANCH + 10, y + 4, row.operation, "ink", "start"
    if row.place == "joins":
        return BRANCH + 10, y + 4, row.operation, "soft", "start"
    return STREAM + 12, y - 4 if row.site else y + 4, row.operation, "ink", "start"


def draw_site(site: str, y: int, rate: float) -> Iterator[str]:
    """A box and, right behind it, the words; serve/page.html looks for the two."""
    look = 'fill="var(--card)" stroke="var(--soft)" stroke-dasharray="2 3"'
    if rate:
        look = f'fill="var(--c2)" fill-opacity="{0.18 + 0.8 * rate:.2f}" stroke="var(--c2)"'
        yield box(y, 'fill="var(--card)"')
    words = f"{site} {rate:g}" if rate else site
    yield box(y, look)
    yield text(PILL + 12, y + 4, words, "ink" if rate else "soft", weight=600 if rate else 400)


def box(y: int, look: str) -> str:
    return f'<rect x="{PILL}" y="{y - 10}" width="{PILL_WIDTH}" height="20" rx="10" {look}/>'


def line(path: str, width: float = 1.5) -> str:
    return f'<path d="{path}" fill="none" stroke="var(--soft)" stroke-width="{width:g}"/>'


def text(
    x: float, y: float, words: str, color: str, anchor: str = "start", *, weight: int = 400
) -> str:
    more = "" if anchor == "start" else f' text-anchor="{anchor}"'
    more += "" if weight == 400 else f' font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" fill="var(--{color})"{more}>{escape(words)}</text>'
