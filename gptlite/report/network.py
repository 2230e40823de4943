"""A drawing of the network with every place where something can drop, and how much does.

Top to bottom, as the text flows; a site that drops is filled, the stronger the higher its rate.
"""

from collections.abc import Iterator, Mapping
from html import escape

ROW, PILL = 26, 190
"""Height of a row, and width of a site's box."""
WIDTH, LEFT = 372, 150
"""Of the drawing, and where its line is."""
BEFORE = (("token embedding", "token"), ("+ position", "embedding"))
BLOCK = (
    *(("norm, Q Kᵀ / √d", "key"), ("softmax", "attention_weights"), ("· V", "head")),
    *(("", "attention_context"), ("W_o", "attention_output"), ("", "layer"), ("+ residual", "")),
    *(("norm, W₁, activation", "mlp_activation"), ("W₂", "mlp_output"), ("", "layer")),
    ("+ residual", ""),
)
AFTER = (("norm", "final"), ("logits", ""))


def network(rates: Mapping[str, float], n_layer: int) -> str:
    """SVG; `rates` of every site, 0 where it never drops."""
    rows = [*BEFORE, *BLOCK, *AFTER]
    top, bottom = len(BEFORE), len(BEFORE) + len(BLOCK)
    height = ROW * len(rows) + 44
    live = [f"{site} {rate:g}" for site, rate in rates.items() if rate > 0]
    label = f"The network; dropout at {', '.join(live) or 'no site'}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        'class="network" xmlns="http://www.w3.org/2000/svg">',
        f'<rect x="6" y="{y_of(top, top) - 17}" width="{WIDTH - 12}" '
        f'height="{y_of(bottom - 1, top) - y_of(top, top) + 31}" rx="10" class="frame"/>',
        f'<text x="{WIDTH - 14}" y="{y_of(bottom - 1, top) + 6}" class="times">× {n_layer}</text>',
    ]
    for number, (operation, site) in enumerate(rows):
        parts += row(y_of(number, top, bottom), operation, site, rates.get(site, 0.0))
    return "".join([*parts, "</svg>"])


def y_of(number: int, top: int = 99, bottom: int = 99) -> int:
    """Of a row; a frame needs room above and below."""
    return 24 + ROW * number + 8 * (number >= top) + 8 * (number >= bottom)


def row(y: int, operation: str, site: str, rate: float) -> Iterator[str]:
    if operation:
        yield f'<text x="{LEFT - 12}" y="{y + 4}" class="operation">{escape(operation)}</text>'
    yield f'<circle cx="{LEFT}" cy="{y}" r="2.5" class="dot"/>'
    yield f'<path d="M{LEFT} {y + 4}V{y + ROW - 4}" class="flow"/>'
    if not site:
        return
    kind = "live" if rate else "idle"
    shade = f' style="fill-opacity:{0.18 + 0.8 * rate:.2f}"' if rate else ""
    words = f"{site} {rate:g}" if rate else site
    yield (
        f'<rect x="{LEFT + 16}" y="{y - 10}" width="{PILL}" height="20" rx="10" '
        f'class="{kind}"{shade}/>'
        f'<text x="{LEFT + 28}" y="{y + 4}" class="{kind}-name">{escape(words)}</text>'
    )
