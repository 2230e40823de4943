"""Which figures the page of a run has: its numbers → drawings, each with a word on what it shows.

A caption is made of the numbers that are drawn. A figure whose numbers are missing or damaged is
left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from gptlite.report import charts
from gptlite.report.axes import SMALL, TALL, WIDE
from gptlite.report.curves import Mark, lines
from gptlite.report.network import network
from gptlite.report.series import Line
from gptlite.report.values import Values, values_of
from gptlite.report.verdict import compare_with_training, largest_rate, nats
from gptlite.runs.results import DAMAGED, Row, RunFiles, generalisation_gap, number

KINDS = {"head": "heads", "neuron": "neurons", "layer": "layers", "dimension": "dimensions"}
CLEAR = 0.02
"""Nats from which on a caption calls a difference one."""
Group = tuple[str, list["Figure"]]
Figures = Iterator["Figure"]


class Figure(NamedTuple):
    title: str
    svg: str
    caption: str
    values: Values | None = None
    """The numbers drawn, where they are lines and not too many."""
    wide_svg: str = ""
    """The same for all the width of a desk."""


def make_figures(makers: list[Callable[..., Figures]], *about: Any) -> list[Figure]:
    """The figures of each maker; of one whose numbers are not what they should be, none."""
    figures: list[Figure] = []
    for make in makers:
        try:
            figures += make(*about)
        except DAMAGED:
            continue
    return figures


def draw_lines(
    title: str,
    series: list[Line],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    lowest: bool = False,
    wide: bool = False,
    **options: Any,
) -> Figure:
    """A figure of curves, with the options of `curves.lines`."""
    size = TALL if wide else SMALL
    svg = lines(title, series, x_label, y_label, size=size, **options)
    larger = lines(title, series, x_label, y_label, size=WIDE, **options) if wide else ""
    return Figure(title, svg, caption, values_of(series, x_label, y_label, lowest=lowest), larger)


def run_figures(run: RunFiles) -> list[Group]:
    return [
        ("Loss", make_figures([losses], run)),
        ("Training", make_figures([learning_rate, gradient_norm, throughput], run)),
        ("Dropout", make_figures([draw_network, rates_over_time, rates_over_depth], run)),
        (
            "The trained model",
            make_figures([positions, draw_calibration, passes, importances, knockouts], run),
        ),
    ]


def column(rows: list[Row], name: str) -> tuple[list[float | None], list[float | None]]:
    """Steps and values of the rows that have this number."""
    kept = [row for row in rows if number(row.get(name)) is not None]
    return [float(row["step"]) for row in kept], [number(row[name]) for row in kept]


def drops(run: RunFiles) -> bool:
    """Whether anything was dropped at any time."""
    return any(largest_rate(row) > 0 for row in run.rows)


def losses(run: RunFiles) -> Figures:
    as_trained, evaluated = (
        ("training, dropout on", "training, dropout off")
        if drops(run)
        else ("training, each update", "training, evaluated")
    )
    names = {
        as_trained: ("train/loss", 0),
        evaluated: ("train/loss_dropout_off", 2),
        "validation": ("val/loss", 1),
    }
    series = [
        Line(label, *column(run.rows, name), color=color) for label, (name, color) in names.items()
    ]
    best = run.best
    word = f"best {best['val/loss']:.3f} at step {best['step']:,}" if best else ""
    yield draw_lines(
        "Loss over the run",
        [line for line in series if line.x],
        "updates",
        "nats per token",
        " ".join(losses_words(run)),
        lowest=True,
        wide=True,
        epochs_per_step=run.epochs_per_step,
        best=Mark(best["step"], best["val/loss"], word) if best else None,
        between=("validation", evaluated),
    )


def losses_words(run: RunFiles) -> Iterator[str]:
    """What the curves show, and what is on the axis."""
    evaluated, best = run.evaluations, run.best
    if best is None:
        yield "Nothing has been evaluated yet; this is the loss of each update on its own batch."
    else:
        last, loss = evaluated[-1], best["val/loss"]
        rise = last["val/loss"] - loss
        yield f"The validation loss is lowest at step {best['step']:,}: {loss:.3f} nats per token."
        if last is not best:
            yield f"At the last evaluation, step {last['step']:,}, it is {nats(rise)} higher."
        if (gap := generalisation_gap(last)) is not None:
            yield f"There it is {compare_with_training(gap)}: the gap, shaded."
        yield (
            f"Nats measure surprise: at {loss:.3f} the right token had a probability of "
            f"{math.exp(-loss):.1%} in the geometric mean."
        )
    if drops(run):
        yield (
            "With dropout on, parts of the network are missing, so that curve is the loss of "
            "another, weaker network; the gap compares the two curves with dropout off."
        )


def learning_rate(run: RunFiles) -> Figures:
    steps, rates = column(run.rows, "lr")
    known = [rate for rate in rates if rate is not None]
    top = known.index(max(known))
    caption = f"How far an update moves the weights. Highest at step {steps[top]:,.0f}"
    caption += f" ({known[top]:.3g}), {known[-1]:.3g} at the last."
    line = Line("", steps, rates)
    yield draw_lines("Learning rate", [line], "updates", "learning rate", caption, zero=True)


def gradient_norm(run: RunFiles) -> Figures:
    steps, norms = column(run.rows, "grad_norm")
    clip = number((run.config.get("optim") or {}).get("grad_clip"))
    caption = "The length of the gradient of an update, before clipping."
    if clip:
        above = sum(norm is not None and norm > clip for norm in norms)
        caption += f" {above} of {len(norms)} logged updates were above {clip:g}, and scaled down."
    line = Line("", steps, norms)
    yield draw_lines("Gradient norm", [line], "updates", "gradient norm", caption, zero=True)


def throughput(run: RunFiles) -> Figures:
    steps, speeds = column(run.rows, "tokens_per_second")
    y = [None if speed is None else speed / 1000 for speed in speeds]
    middle = median(speed for speed in y if speed is not None)
    caption = (
        f"Training alone, without evaluations, samples and checkpoints; the median is {middle:.3g}."
    )
    line = Line("", steps, y)
    yield draw_lines("Throughput", [line], "updates", "1000 tokens/s", caption, zero=True)


def draw_network(run: RunFiles) -> Figures:
    rates = {site["site"]: number(site.get("rate")) or 0.0 for site in run.sites}
    model = run.config.get("model") or {}
    live = sum(rate > 0 for rate in rates.values())
    caption = f"{live} of {len(rates)} sites drop, filled the more, the higher the rate."
    if not live:
        caption = f"The {len(rates)} places where something could be dropped; here nothing is."
    if "n_embd" in model:
        caption += f" B samples, T and S positions (at most {model.get('context_length')}), "
        caption += f"C {model['n_embd']} features, H {model.get('n_head')} heads of D features, "
        caption += "Z features of all heads, F features in the MLP, V tokens."
    if rates:
        yield Figure(
            "The network and its dropout sites", network(rates, model.get("n_layer", 0)), caption
        )


def rates_over_time(run: RunFiles) -> Figures:
    """Where a schedule moves them."""
    names = dict.fromkeys(name for row in run.rows for name in row if name.startswith("dropout/"))
    series = [Line(name.partition("/")[2], *column(run.rows, name)) for name in names]
    moving = [line for line in series if len(set(line.y)) > 1]
    if moving:
        ends = [y for line in moving for y in (line.y[0], line.y[-1]) if y is not None]
        caption = (
            f"As the schedule moved them: between {min(ends):g} and {max(ends):g} at the ends."
        )
        title, series = "Dropout rates over the run", merge_equal_lines(series)
        yield draw_lines(title, series, "updates", "rate", caption, zero=True)


def merge_equal_lines(series: list[Line]) -> list[Line]:
    """Curves that lie on each other as one, with all their names."""
    found: dict[str, Line] = {}
    for line in series:
        shape = repr((line.x, line.y))
        named = f"{found[shape].label}, {line.label}" if shape in found else line.label
        found[shape] = line._replace(label=named)
    return list(found.values())


def rates_over_depth(run: RunFiles) -> Figures:
    """Where they differ between layers."""
    by_layer = {site["site"]: site["by_layer"] for site in run.sites if site.get("rate")}
    series = [
        Line(site, list(range(len(rates))), rates)
        for site, rates in by_layer.items()
        if len(rates) > 1
    ]
    if any(len(set(line.y)) > 1 for line in series):
        title, caption = "Dropout rates over depth", "At the full strength of the schedule."
        series = merge_equal_lines(series)
        yield draw_lines(
            title, series, "layer", "rate", caption, zero=True, whole_x=True, marked=True
        )


def knockouts(run: RunFiles) -> Figures:
    found = run.evals["knockout"]
    for kind, name in KINDS.items():
        of_kind, series = found["kinds"][kind], []
        fractions = found["fractions"]
        for color, ablation in enumerate(("mean", "zero")):
            random = of_kind[ablation]["random"]
            label = f"random, to {ablation}"
            series.append(
                Line(label, fractions, random["loss"], random["low"], random["high"], color=color)
            )
        for color, order in ((2, "most_first"), (3, "least_first")):
            label = f"{order.split('_')[0]} important first"
            y = of_kind["mean"][order]["loss"]
            series.append(Line(label, fractions, y, dashed=True, color=color))
        unigram = [found["unigram_loss"]] * len(fractions)
        series.append(Line("knowing only frequencies", fractions, unigram, dashed=True, color=5))
        caption = f"The loss when a share of the {of_kind['n_units']} {name} is replaced by its "
        caption += (
            "mean, or by zero; bands are 95 % intervals over rows of text and random choices."
        )
        caption += contribution_words(of_kind["mean"]["random"], name)
        title, x_label = f"Without some of its {name}", f"share of {name} removed"
        yield draw_lines(title, series, x_label, "nats per token", caption, marked=True)


def contribution_words(random: dict[str, Any], name: str) -> str:
    """What all units of a kind are worth together, and how much of that is left on the way."""
    whole = (random.get("contribution") or {}).get("value")
    if whole is None:
        return ""
    words = f" All {name} together are worth {nats(whole)} nats"
    area = random["contribution_area"]["value"]
    if area is None:
        return words + "."
    return words + f"; averaged over all shares, {area:.0%} of that is left."


def importances(run: RunFiles) -> Figures:
    heads = run.evals["importance"]["kinds"]["head"]["mean"]
    rows = [[number(value) for value in row] for row in heads["loss_increase"]]
    most, layer, head = max(
        (value, i, j)
        for i, row in enumerate(rows)
        for j, value in enumerate(row)
        if value is not None
    )
    title = "Importance of heads"
    caption = "By how many nats the loss rises without each head. "
    caption += f"Most by {most:.3f}, without head {head} of layer {layer}."
    if (gini := number(heads["gini"]["value"])) is not None:
        caption += f" Gini {gini:.2f}: 0 if all matter alike, near 1 if one does all."
    yield Figure(title, charts.heat_map(title, rows, "head", "layer"), caption)


def positions(run: RunFiles) -> Figures:
    y = [number(value) for value in run.evals["loss"]["loss_by_position"]]
    line = Line("", list(range(len(y))), y)
    caption = position_words([value for value in y if value is not None])
    yield draw_lines(
        "Loss by position",
        [line],
        "tokens before it in the window",
        "nats per token",
        caption,
        whole_x=True,
    )


def position_words(y: Sequence[float]) -> str:
    """Whether more text before a token helps to tell it."""
    part = max(1, len(y) // 4)
    quarters = [fmean(y[at : at + part]) for at in range(0, part * (len(y) // part), part)]
    first, last, best = y[0], quarters[-1], min(quarters)
    ends = f"{first:.2f} nats for the first token, {last:.2f} in the last quarter of the window"
    if first - last <= CLEAR:
        rise = last - first
        more = f"The loss rises with more context, by {rise:.2f} nats"
        return f"{more if rise > CLEAR else 'Context makes no difference'}: {ends}."
    words = f"Context helps by {first - last:.2f} nats: {ends}."
    if last - best <= CLEAR:
        return words
    where = f"the quarter that ends at token {part * (quarters.index(best) + 1):,}"
    return f"{words} It is lowest in {where}, {best:.2f}: more than that helps no further."


def draw_calibration(run: RunFiles) -> Figures:
    found = run.evals["calibration"]
    svg = charts.reliability("Reliability", found["reliability"])
    sure, right = found["confidence"], found["accuracy"]
    caption = (
        f"The likeliest token had a probability of {sure:.1%} on average and came {right:.1%} "
    )
    caption += f"of the time: {calibration_words(sure - right)}."
    if (ece := number(found["ece"]["value"])) is not None:
        caption += f" Expected calibration error {ece:.4f}: the mean distance from the diagonal."
    line = charts.reliability_line(found["reliability"])
    values = values_of([line], "confidence", "accuracy")
    yield Figure("Reliability", svg, f"{caption} Dots are as large as their share.", values)


def calibration_words(excess: float) -> str:
    if abs(excess) < 0.005:
        return "as sure as it is right"
    return "surer than it is right" if excess > 0 else "less sure than it is right"


def passes(run: RunFiles) -> Figures:
    found = run.evals["mc-dropout"]
    if "passes" not in found:
        return
    x, plain = found["passes"], found["deterministic_loss"]["value"]
    series = [
        Line("passes averaged", x, found["loss"]),
        Line("dropout off", x, [plain] * len(x), dashed=True, color=5),
    ]
    gain = -found["averaged_minus_deterministic"]["value"]
    what = "better" if gain > 0 else "worse"
    caption = f"The probabilities of {max(x)} passes with dropout on, averaged, are "
    caption += f"{abs(gain):.4f} nats {what} than one pass with dropout off."
    title = "Averaging passes with dropout on"
    yield draw_lines(title, series, "passes", "nats per token", caption, whole_x=True, marked=True)
