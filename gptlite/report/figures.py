"""Which figures a page has: numbers of runs and studies → charts with a word about each.

A figure whose numbers are missing or damaged is left out.
"""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gptlite.report import charts
from gptlite.report.charts import Line
from gptlite.report.network import network
from gptlite.report.values import Values, values_of
from gptlite.runs.results import DAMAGED, RunFiles, number

KINDS = {"head": "heads", "neuron": "neurons", "layer": "layers", "dimension": "dimensions"}
Group = tuple[str, list["Figure"]]
Figures = Iterator["Figure"]


class Figure(NamedTuple):
    title: str
    svg: str
    caption: str
    values: Values | None = None
    """The numbers drawn, where they are lines and not too many."""


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
    **options: Any,
) -> Figure:
    """A figure of curves, with the options of `charts.lines`."""
    svg = charts.lines(title, series, x_label, y_label, **options)
    return Figure(title, svg, caption, values_of(series, x_label, y_label, lowest=lowest))


def run_figures(run: RunFiles) -> list[Group]:
    network_figure = make_figures([draw_network], run)
    if not charts.available():
        return [("Dropout", network_figure)]
    training = make_figures([losses, rate_and_norm, throughput], run)
    dropout = [*network_figure, *make_figures([rates_over_time, rates_over_depth], run)]
    measured = make_figures([knockouts, importances, positions, draw_calibration, passes], run)
    if len(measured) < 3:
        hint = "More is measured by: gptlite eval --suite all, and gptlite report again."
        measured.append(Figure("Not measured yet", "", hint))
    return [("Training", training), ("Dropout", dropout), ("The trained model", measured)]


def column(rows: list[dict[str, Any]], name: str) -> tuple[list[float | None], list[float | None]]:
    """Steps and values of the rows that have this number."""
    kept = [row for row in rows if number(row.get(name)) is not None]
    return [float(row["step"]) for row in kept], [number(row[name]) for row in kept]


def losses(run: RunFiles) -> Figures:
    names = {
        "training, dropout on": "train/loss",
        "training, dropout off": "train/loss_dropout_off",
        "validation": "val/loss",
    }
    series = [Line(label, *column(run.rows, name)) for label, name in names.items()]
    best = run.best
    marks = [(best["step"], best["val/loss"], f"{best['val/loss']:.3f}")] if best else []
    yield draw_lines(
        "Losses",
        [line for line in series if line.x],
        "updates",
        "nats per token",
        "The gap is validation minus training with dropout off. Training with dropout on is "
        "another quantity: the loss of the model with parts missing.",
        lowest=True,
        epochs_per_step=run.epochs_per_step,
        marks=marks,
    )


def rate_and_norm(run: RunFiles) -> Figures:
    for title, name, caption in (
        ("Learning rate", "lr", "Of each update."),
        ("Gradient norm", "grad_norm", "Before clipping."),
    ):
        line = Line(title, *column(run.rows, name))
        yield draw_lines(title, [line], "updates", title.lower(), caption, zero=True)


def throughput(run: RunFiles) -> Figures:
    x, y = column(run.rows, "tokens_per_second")
    y = [None if value is None else value / 1000 for value in y]
    caption = "Training alone, without evaluating, sampling and saving."
    line = Line("", x, y)
    yield draw_lines("Throughput", [line], "updates", "1000 tokens/s", caption, zero=True)


def draw_network(run: RunFiles) -> Figures:
    rates = {site["site"]: number(site.get("rate")) or 0.0 for site in run.sites}
    n_layer = (run.config.get("model") or {}).get("n_layer", 0)
    live = sum(rate > 0 for rate in rates.values())
    caption = f"{live} of {len(rates)} sites live; filled the more, the higher the full rate."
    if rates:
        yield Figure("The network and its dropout sites", network(rates, n_layer), caption)


def rates_over_time(run: RunFiles) -> Figures:
    names = dict.fromkeys(name for row in run.rows for name in row if name.startswith("dropout/"))
    series = [Line(name.partition("/")[2], *column(run.rows, name)) for name in names]
    series = merge_equal_lines(series)
    if series:
        title, caption = "Dropout rates over the run", "As the schedule moved them."
        yield draw_lines(title, series, "updates", "rate", caption, zero=True)


def merge_equal_lines(series: list[Line]) -> list[Line]:
    """Curves that lie on each other as one, with all their names."""
    found: dict[str, Line] = {}
    for line in series:
        shape = repr((line.x, line.y))
        named = f"{found[shape].label}, {line.label}" if shape in found else line.label
        found[shape] = line._replace(label=named)
    # A long list of names would hide the curve.
    return [line._replace(label=textwrap.fill(line.label, 36)) for line in found.values()]


def rates_over_depth(run: RunFiles) -> Figures:
    series = [
        Line(site["site"], list(range(len(site["by_layer"]))), site["by_layer"])
        for site in run.sites
        if site.get("rate") and len(site["by_layer"]) > 1
    ]
    series = merge_equal_lines(series)
    if series:
        title, caption = "Dropout rates over depth", "At the full strength of the schedule."
        yield draw_lines(title, series, "layer", "full rate", caption, zero=True)


def knockouts(run: RunFiles) -> Figures:
    found = run.evals["knockout"]
    for kind, name in KINDS.items():
        of_kind, series = found["kinds"][kind], []
        for color, ablation in enumerate(("mean", "zero")):
            random = of_kind[ablation]["random"]
            low, high = random["low"], random["high"]
            label = f"to {ablation}, random"
            fractions = found["fractions"]
            series.append(Line(label, fractions, random["loss"], low, high, color=color))
            for place, order in enumerate(("most_first", "least_first")):
                label = f"to {ablation}, {order.replace('_', ' ')}"
                y = of_kind[ablation][order]["loss"]
                series.append(Line(label, fractions, y, dashed=True, color=2 + place))
        unigram = [found["unigram_loss"]] * len(found["fractions"])
        shown = [s for s in series if "random" in s.label or "mean" in s.label]
        shown.append(Line("unigrams", found["fractions"], unigram, dashed=True, color=5))
        title = f"Without some of its {name}"
        x_label = f"fraction of {of_kind['n_units']} removed"
        caption = "95 % intervals over rows of text and random masks."
        random = of_kind["mean"]["random"]
        if (without := random.get("contribution", {}).get("value")) is not None:
            caption += f" All of them together are worth {without:.2f} nats"
            area = random["contribution_area"]["value"]
            caption += "." if area is None else f"; area of what is left of that: {area:.2f}."
        yield draw_lines(title, shown, x_label, "nats per token", caption)


def importances(run: RunFiles) -> Figures:
    kinds = run.evals["importance"]["kinds"]
    heads = kinds["head"]["mean"]
    title = "Importance of heads"
    svg = charts.heat_map(title, heads["loss_increase"], "head", "layer")
    gini = heads["gini"]["value"]
    caption = "What the loss rises by without each, in nats"
    yield Figure(title, svg, f"{caption}; Gini {gini:.2f}." if gini is not None else f"{caption}.")


def positions(run: RunFiles) -> Figures:
    y = run.evals["loss"]["loss_by_position"]
    line = Line("", list(range(len(y))), y)
    caption = "How much context helps."
    yield draw_lines("Loss by position", [line], "tokens seen before", "nats per token", caption)


def draw_calibration(run: RunFiles) -> Figures:
    found = run.evals["calibration"]
    ece = found["ece"]["value"]
    svg = charts.reliability("Reliability", found["reliability"])
    caption = "Dots are as large as their bin"
    error = "." if ece is None else f"; expected calibration error {ece:.4f}."
    line = charts.reliability_line(found["reliability"])
    values = values_of([line], "confidence", "accuracy")
    yield Figure("Reliability", svg, caption + error, values)


def passes(run: RunFiles) -> Figures:
    found = run.evals["mc-dropout"]
    if "passes" not in found:
        return
    x, plain = found["passes"], found["deterministic_loss"]["value"]
    title = "Averaging passes with dropout on"
    series = [
        Line("averaged", x, found["loss"]),
        Line("dropout off", x, [plain] * len(x), dashed=True),
    ]
    difference = found["averaged_minus_deterministic"]["value"]
    caption = f"All passes together: {difference:+.4f} nats against dropout off."
    yield draw_lines(title, series, "passes", "nats per token", caption)


def runs_figures(runs: list[RunFiles]) -> list[Group]:
    return [("Training", make_figures([overlay_runs], runs))] if charts.available() else []


def overlay_runs(runs: list[RunFiles]) -> Figures:
    for title, name in (
        ("Validation loss", "val/loss"),
        ("Training loss, dropout off", "train/loss_dropout_off"),
    ):
        series = [Line(run.name, *column(run.rows, name)) for run in runs]
        series = [line for line in series if line.x]
        caption = "Over the same axis for all runs."
        yield draw_lines(title, series, "updates", "nats per token", caption, lowest=True)


def study_figures(study: dict[str, Any]) -> list[Group]:
    if not charts.available():
        return []
    return [
        (metric, make_figures([metric_over_axes, baseline_differences], study, metric))
        for metric in study.get("table", [])
    ]


def metric_over_axes(study: dict[str, Any], metric: str) -> Figures:
    """The metric over each axis of numbers; the other axes are colours."""
    for axis in study["axes"]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for point in study["points"]:
            x, value = point["point"].get(axis), point["metrics"].get(metric)
            if number(x) is None or value is None:
                continue
            others = {key: v for key, v in point["point"].items() if key != axis}
            label = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in others.items())
            groups.setdefault(label, []).append({"x": float(x), **value})
        if groups and max(map(len, groups.values())) > 1:
            for points in groups.values():
                points.sort(key=lambda point: point["x"])
            title = f"{metric} over {axis}"
            drawn = list(groups.items())
            svg = charts.dots(title, drawn, axis, metric)
            values = values_of(charts.dot_lines(drawn), axis, metric, lowest="loss" in metric)
            caption = "Mean and 95 % interval over seeds; small dots are the seeds."
            yield Figure(title, svg, caption, values)


def baseline_differences(study: dict[str, Any], metric: str) -> Figures:
    rows = [row for row in study["comparisons"] if row["metric"] == metric]
    if rows:
        title = f"{metric}: difference to the baseline"
        svg = charts.forest(title, rows, "difference")
        yield Figure(
            title, svg, "Paired by seed, with 95 % intervals; filled where above seed noise."
        )
