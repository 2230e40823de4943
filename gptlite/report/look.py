"""What `measure/look.py` found, as lines for a terminal and as figures for a page."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from gptlite.config.dropout import SITES
from gptlite.measure.marks import FALLEN, KEPT, marks_of, marks_of_mask
from gptlite.report.figures import Figure

MOST_LINES, MOST_COLUMNS = 12, 24
"""Tokens of a square in the terminal and on a page."""
FEATURES = 32
"""Of each token, in the terminal."""
CELL, LABEL, SUM = 27, 70, 46
"""Pixels of a square's cells, of the tokens beside them and of the sums behind them."""
DOT = 7
"""Pixels of a feature."""


def lines_of(look: dict[str, Any]) -> Iterator[str]:
    """For a terminal of 80 columns."""
    n, layer = len(look["tokens"]), look["layer"]
    yield title_of(look)
    yield mask_names(look)
    yield ""
    yield from square_lines(look, "before")
    rate, scale = rate_of(look, "attention_weights"), scale_of(look, "attention_weights")
    yield ""
    if rate:
        what = f"{FALLEN} fell, the rest × {scale:.4g}"
        yield f"after dropout at attention_weights, rate {rate:g}: {what}"
        yield from square_lines(look, "after")
    else:
        hint = "" if look["rate"] is not None else "; --rate 0.5 shows what would"
        yield f"nothing falls at attention_weights here{hint}"
    yield ""
    yield from context_lines(look)
    yield ""
    if look.get("picked"):  # looks of earlier versions have none
        yield from picked_lines(look)
        yield ""
    yield f"what falls in layer {layer}, and what is in no layer:"
    yield from site_lines(look)
    yield ""
    yield from outcome_lines(look)
    if n > MOST_LINES:
        yield f"rows and columns: the first {MOST_LINES} of {n} tokens; a page (--page) shows more"


def title_of(look: dict[str, Any]) -> str:
    n, layer, head = len(look["tokens"]), look["layer"], look["head"]
    size = f"T × T = {n} × {n}"
    return f"attention weights A, layer {layer}, head {head}: {size}; row = query, column = key"


def mask_names(look: dict[str, Any]) -> str:
    """What names the masks."""
    rate, picked = look["rate"], look.get("picked")
    where = f"at {picked['site']} alone" if picked else "instead of the run's"
    tried = "" if rate is None else f"Rate {rate:g} {where}. "
    return f"{tried}Masks of seed {look['seed']}, step {look['step']}, row 0"


def square_lines(look: dict[str, Any], which: str) -> Iterator[str]:
    tokens = [name_of(token, 5) for token in look["tokens"][:MOST_LINES]]
    yield " " * 7 + "".join(f"{token:>5}" for token in tokens) + "   sum"
    before, values = look["attention"]["before"], look["attention"][which]
    sums = look["attention"]["row_sums"][which == "after"]
    for i, token in enumerate(tokens):
        cells = [show_weight(before[i][j], values[i][j], j > i) for j in range(len(tokens))]
        yield f"{token:<7}" + "".join(f"{cell:>5}" for cell in cells) + f"{sums[i]:6.2f}"


def show_weight(before: float, after: float, future: bool) -> str:
    if future:
        return "·"
    return FALLEN if before and not after else f"{after:.2f}"


def context_lines(look: dict[str, Any]) -> Iterator[str]:
    """Context vectors, value by value and with one mask for all positions."""
    context, n = look["context"], len(look["tokens"])
    shown = min(FEATURES, len(context["before"][0]))
    yield (
        f"context vectors Z = A V, heads joined: T × C = {n} × {context['width']}, "
        f"the first {shown} features"
    )
    if not look["locked"]:
        yield "nothing falls at attention_context here"
        return
    marks = marks_of(context["before"], context["after"])
    locked = marks_of_mask(look["locked"]["locked"])
    yield f"{'':7}{'element: each by itself':<{shown + 2}}locked: one mask for all positions"
    for i, token in enumerate(look["tokens"][:MOST_LINES]):
        yield f"{name_of(token, 6):<7}{marks[i][:shown]}  {locked[i][:shown]}".rstrip()


def picked_lines(look: dict[str, Any]) -> Iterator[str]:
    """The site that was asked for: a row of marks for each token, head or layer."""
    picked = look["picked"]
    yield picked_title(look)
    yield f"mask ({picked['mask']}), {fall_words(picked)}"
    yield axis_words(picked)
    for name, marks in zip(picked["rows"][:MOST_LINES], picked["marks"], strict=False):
        yield f"{name_of(name, 8):<9}{marks}".rstrip()


def picked_title(look: dict[str, Any]) -> str:
    picked, sizes = look["picked"], " × ".join(map(str, look["picked"]["shape"]))
    kind, parts = SITES[picked["site"]], [picked["site"]]
    if kind.per_layer and picked["site"] != "layer":
        parts.append(f"layer {look['layer']}")
    if "S" in kind.tensor:
        parts.append(f"head {look['head']}")
    return f"{', '.join(parts)}: tensor ({picked['tensor']}) = {sizes}"


def fall_words(picked: dict[str, Any]) -> str:
    least, most = min(picked["rates"]), max(picked["rates"])
    rates = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    rest = "stayed" if picked["scale"] is None else f"stayed, times {picked['scale']:.4g}"
    return f"rate {rates}: {FALLEN} fell ({picked['share']:.3f} of all), {KEPT} {rest}"


def axis_words(picked: dict[str, Any]) -> str:
    """What the rows and columns of the marks are."""
    if picked["rows"] == picked["columns"]:
        return "row = query, column = key"
    if picked["columns"]:
        return f"row = {picked['site']}, column = token"
    shown, width = len(picked["marks"][0]), picked["shape"][-1]
    if shown == 1:
        return "row = token, which falls whole"
    return "row = token, column = feature" + f" (the first {shown} of {width})" * (shown < width)


def site_lines(look: dict[str, Any]) -> Iterator[str]:
    for site in look["sites"]:
        shape = ", ".join(site["mask"])
        scale = "–" if site["scale"] is None else f"{site['scale']:.4g}"
        yield (
            f"  {site['site']:<18} mask ({shape}){'':{14 - len(shape)}}rate {site['rate']:<6.3g}"
            f"fell {site['share']:<7.3f}the rest × {scale}"
        )
    if not look["sites"] and look["rate"] is None:
        yield "  nothing: this run has no dropout; --rate 0.5 shows what it would do"
    elif not look["sites"]:
        yield "  nothing: the rate is 0"
    if padding := look["padding"]:
        held = padding["padding_untouched"] and padding["text_the_same"]
        yield (
            f"  {padding['rows']} rows of padding before the text: left as they are, and the same "
            f"values of the text fall: {'yes' if held else 'NO'}"
        )


def outcome_lines(look: dict[str, Any]) -> Iterator[str]:
    for name, what in (("training", "dropout on"), ("evaluation", "dropout off")):
        found = look[name]
        following = ", ".join(f"{name_of(t, 12)} {p:.2f}" for t, p in found["next"][:4])
        yield f"{name:<11} ({what:<11})  loss {found['loss']:.3f}  next: {following}"
    yield f"values that evaluation let fall: {look['evaluation_drops']}"


def name_of(token: str, most: int) -> str:
    """A token so that it can be told where it begins and ends."""
    shown = token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    shown = "".join(c if c.isprintable() else "�" for c in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def rate_of(look: dict[str, Any], site: str) -> float:
    return next((s["rate"] for s in look["sites"] if s["site"] == site), 0.0)


def scale_of(look: dict[str, Any], site: str) -> float:
    return next((s["scale"] for s in look["sites"] if s["site"] == site), None) or 1.0


def figures_of(look: dict[str, Any]) -> list[Figure]:
    """For a page: what attention does to the text before and after, and what falls of Z."""
    n, rate = len(look["tokens"]), rate_of(look, "attention_weights")
    place = f"layer {look['layer']}, head {look['head']}"
    sums = "Each row is where one token looks; its weights sum to 1."
    figures = [Figure(f"Attention weights A, {n} × {n}, {place}", square(look, "before"), sums)]
    if rate:
        figures.append(
            Figure(f"A after dropout, rate {rate:g}", square(look, "after"), after_words(look))
        )
    if look["locked"]:
        context = look["context"]
        width, marks = context["width"], marks_of(context["before"], context["after"])
        each = f"Z = A V, {n} × {width}, the first features of each token. Filled fell; where "
        each += "nothing is drawn A had let all fall before."
        one = "The same rate with one mask for all positions (granularity: locked)."
        locked = grid(look["tokens"], marks_of_mask(look["locked"]["locked"]))
        figures += [
            Figure("Context vectors Z, each value by itself", grid(look["tokens"], marks), each),
            Figure("Z, locked", locked, one),
        ]
    if picked := look.get("picked"):
        mask = f"mask ({picked['mask']}), {fall_words(picked)}"
        drawn = grid(picked["rows"], picked["marks"], len(picked["marks"][0]))
        figures.append(Figure(picked_title(look), drawn, f"{axis_words(picked)}; {mask}."))
    if (padding := look["padding"]) and any(map(any, padding["fallen"])):
        names = ["(pad)"] * padding["rows"] + look["tokens"]
        kept = "Padding is left as it is; of the text the same values fall as without it."
        drawn = grid(names, marks_of_mask(padding["fallen"]))
        figures.append(Figure("Embeddings behind padding", drawn, kept))
    return figures


def after_words(look: dict[str, Any]) -> str:
    scale = scale_of(look, "attention_weights")
    alone = "it fell" if look["attention"]["row_sums"][1][0] == 0 else "it stayed"
    return (
        f"{FALLEN} fell; what stayed is multiplied by {scale:.4g}, so rows no longer sum to 1. The "
        f"first row has one weight: all or nothing, and here {alone}. {mask_names(look)}."
    )


def square(look: dict[str, Any], which: str) -> str:
    """SVG of T × T weights; darker is more, a cross fell, the sum of each row behind it."""
    tokens = look["tokens"][:MOST_COLUMNS]
    before, values = look["attention"]["before"], look["attention"][which]
    sums = look["attention"]["row_sums"][which == "after"]
    n = len(tokens)
    width, height = LABEL + n * CELL + SUM, LABEL + n * CELL + 6
    parts = [svg_head(width, height, f"Attention weights, {which} dropout, {n} by {n}")]
    for j, token in enumerate(tokens):
        x = LABEL + j * CELL + CELL / 2 + 4
        parts.append(
            label(x, LABEL - 8, name_of(token, 8), f' transform="rotate(-60 {x} {LABEL - 8})"')
        )
    for i, token in enumerate(tokens):
        y = LABEL + i * CELL
        parts.append(label(LABEL - 6, y + CELL * 0.66, name_of(token, 8), ' text-anchor="end"'))
        for j in range(i + 1):
            fell = before[i][j] != 0 and values[i][j] == 0
            parts += cell(LABEL + j * CELL, y, values[i][j], fell)
        parts.append(label(LABEL + n * CELL + 8, y + CELL * 0.66, f"{sums[i]:.2f}", ""))
    parts.append(label(LABEL + n * CELL + 8, LABEL - 8, "sum", ""))
    return "".join([*parts, "</svg>"])


def cell(x: float, y: float, value: float, fell: bool) -> Iterator[str]:
    size, shade = CELL - 2, min(1.0, 0.06 + 0.94 * min(1.0, value))
    color = "var(--c2)" if fell else "var(--c1)"
    opacity = 0.10 if fell else shade
    yield (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="3" fill="{color}" '
        f'fill-opacity="{opacity:.2f}"><title>{"fell" if fell else f"{value:.3f}"}</title></rect>'
    )
    if fell:
        yield label(x + size / 2, y + size * 0.7, FALLEN, ' text-anchor="middle"', "var(--c2)")


def grid(tokens: list[str], marks: Sequence[str], most: int = FEATURES) -> str:
    """SVG of values in rows, a character of `marks` for each; what fell is filled."""
    tokens, features = tokens[:MOST_COLUMNS], min(most, len(marks[0]))
    step = DOT + 1
    width, height = LABEL + max(features, FEATURES) * step, len(tokens) * 2 * step + 4
    parts = [svg_head(width, height, f"What fell, {len(tokens)} by {features}")]
    for i, (token, row) in enumerate(zip(tokens, marks, strict=False)):
        y = i * 2 * step
        parts.append(label(LABEL - 6, y + 12, name_of(token, 8), ' text-anchor="end"'))
        for mark, look in (
            (KEPT, 'fill="var(--c1)" fill-opacity="0.16"'),
            (FALLEN, 'fill="var(--c2)"'),
        ):
            at = [LABEL + j * step for j in range(features) if row[j] == mark]
            boxes = "".join(f"M{x} {y + 1}h{DOT}v{2 * DOT - 1}h-{DOT}z" for x in at)
            parts.append(f'<path d="{boxes}" {look}/>')
    return "".join([*parts, "</svg>"])


def svg_head(width: float, height: float, what: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(what)}" '
        'xmlns="http://www.w3.org/2000/svg" font-size="12">'
    )


def label(x: float, y: float, text: str, more: str, color: str = "var(--ink)") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}"{more}>{escape(text)}</text>'
