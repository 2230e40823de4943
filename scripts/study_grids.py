"""Those tables of docs/dropout-study.md whose study is a grid: rates by passes, widths or decays.

A part of reproduce_dropout_study.py.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from study_cells import (
    DOCS_SIZE,
    Study,
    against_none,
    best_length,
    crossover,
    difference,
    mean,
    mean_of,
    runs_of,
    save,
    table,
)

from gptlite.report.curves import lines
from gptlite.report.series import Line, rate_color

RATE = "dropout.rate"
WIDTH, STEPS = "model.n_embd", "train.max_steps"


def sweep(study: Study, name: str) -> Iterator[str]:
    """Losses by rate and epochs, differences to rate 0, and the crossover."""
    sizes, rates = study["axes"]["data.train_tokens"], study["axes"]["dropout.rate"]

    def label(size: Any, rate: Any) -> str:
        return f"train_tokens={size}, rate={rate:g}"

    epochs = [mean_of(study, label(size, 0), "epochs") for size in sizes]
    head = [
        "rate",
        *(f"{n:.2g} epochs ({size:,} tokens)" for n, size in zip(epochs, sizes, strict=True)),
    ]
    for metric, title in (("best_val_loss", "Best"), ("val_loss", "Last")):
        rows = [[f"{r:g}", *(mean(study, label(s, r), metric) for s in sizes)] for r in rates]
        yield f"{title} validation loss, nats:\n\n{table(head, rows)}"
    rows, series = [], []
    for rate in rates[1:]:
        found = [difference(study, label(s, rate), label(s, 0), "best_val_loss") for s in sizes]
        rows.append([f"{rate:g}", *found, crossover(epochs, found)])
        known = [(n, f) for n, f in zip(epochs, found, strict=True) if f is not None]
        low, high = ([f[key] for _, f in known] for key in ("low", "high"))
        y = [f["difference"] for _, f in known]
        color = rate_color(rate)
        series.append(Line(f"rate {rate:g}", [n for n, _ in known], y, low, high, color=color))
    caption = "Best validation loss minus that of rate 0 with the same seed"
    yield f"{caption}, and the epochs at which it falls below 0:\n\n" + table(
        [*head, "crossover"], rows
    )
    yield draw(name, caption, series)


def annealed(study: Study) -> Iterator[str]:
    """Every length annealed: losses on the test half, and rates at the length that the validation
    half chooses for each."""
    lengths, rates = study["axes"]["train.max_steps"], study["axes"]["dropout.rate"]
    for size in study["axes"]["data.train_tokens"]:

        def label(steps: Any, rate: Any, size: Any = size) -> str:
            return f"train_tokens={size}, max_steps={steps}, rate={rate:g}"

        head = ["rate", *(f"{steps} updates" for steps in lengths)]
        rows = [
            [f"{rate:g}", *(mean(study, label(steps, rate), "loss.loss") for steps in lengths)]
            for rate in rates
        ]
        yield f"Test loss of {size:,} tokens by run length, nats:\n\n{table(head, rows)}"
        chosen = {rate: best_length(study, [label(n, rate) for n in lengths]) for rate in rates}
        rows = []
        for rate in rates:
            own, none, longest = chosen[rate], chosen[rates[0]], label(lengths[-1], rate)
            row = [f"{rate:g}", re.sub(r".*max_steps=(\d+).*", r"\1", own)]
            row += [mean(study, own, metric) for metric in ("loss.loss", "epochs")]
            row.append(difference(study, own, none, "loss.loss") if rate else "–")
            row.append(difference(study, own, longest, "loss.loss"))
            rows.append(row)
        head = ["rate", "best length", "test loss", "epochs", "minus rate 0"]
        head.append(f"minus the best step of {lengths[-1]} updates")
        yield f"Each rate at its own length, {size:,} tokens:\n\n{table(head, rows)}"


def grid(study: Study) -> Iterator[str]:
    """Losses by dropout rate for every combination of the other axes, and each rate minus 0."""
    axes = study["axes"]
    rates, others = axes[RATE], {name: values for name, values in axes.items() if name != RATE}
    places = [dict(zip(others, v, strict=True)) for v in itertools.product(*others.values())]

    def label(place: dict[str, Any], rate: float) -> str:
        values = {**place, RATE: rate}
        return ", ".join(f"{name.rpartition('.')[2]}={values[name]:g}" for name in axes)

    names = [", ".join(f"{n.rpartition('.')[2]} {v:g}" for n, v in p.items()) for p in places]
    rows = [
        [name, mean(study, label(place, 0), "epochs")]
        + [mean(study, label(place, rate), "loss.loss") for rate in rates]
        for name, place in zip(names, places, strict=True)
    ]
    head = ["", "passes", *(f"rate {rate:g}" for rate in rates)]
    yield f"Test loss at the best step, nats:\n\n{table(head, rows)}"
    rows = [
        [name] + [difference(study, label(p, r), label(p, 0), "loss.loss") for r in rates if r]
        for name, p in zip(names, places, strict=True)
    ]
    yield "Minus rate 0:\n\n" + table(["", *(f"rate {r:g}" for r in rates if r)], rows)


def apart(study: Study) -> Iterator[str]:
    """Widths by lengths by rates, and with what the gain of a rate goes."""
    yield from grid(study)
    widths, lengths, rates = (study["axes"][axis] for axis in (WIDTH, STEPS, RATE))

    def label(width: int, steps: int, rate: float) -> str:
        return f"n_embd={width}, max_steps={steps}, rate={rate:g}"

    places = list(itertools.product(widths, lengths))
    rows = []
    for rate in rates[1:]:
        pairs = [(label(*place, rate), label(*place, 0)) for place in places]
        seeds = [seed for seed in runs_of(study, pairs[0][0]) if is_complete(study, seed, pairs)]
        slopes = zip(*(slopes_of(study, seed, places, pairs) for seed in seeds), strict=True)
        rows.append([f"{rate:g}", *(against_none(values, "slope") for values in slopes)])
    head = ["rate", "twice the passes, at one width", "twice the width, at as many passes"]
    yield "What this adds to the difference from rate 0:\n\n" + table(head, rows)
    series, shown = [], rates[1]
    for at, width in enumerate(widths):
        x = [mean_of(study, label(width, steps, 0), "epochs") for steps in lengths]
        found = [
            difference(study, label(width, n, shown), label(width, n, 0), "loss.loss")
            for n in lengths
        ]
        y, low, high = ([f[key] for f in found] for key in ("difference", "low", "high"))
        series.append(Line(f"{width} wide", x, y, low, high, color=at))
    yield draw("apart", f"Test loss with dropout {shown:g} minus that without", series)


def is_complete(study: Study, seed: int, pairs: list[tuple[str, str]]) -> bool:
    return all(seed in runs_of(study, label) for pair in pairs for label in pair)


def slopes_of(
    study: Study, seed: int, places: list[tuple[int, int]], pairs: list[tuple[str, str]]
) -> list[float]:
    """By how much the difference of the pairs changes for twice the updates and for twice the
    width, by least squares over all places (width, updates) of one seed."""
    gains = [
        runs_of(study, ours)[seed]["loss.loss"] - runs_of(study, theirs)[seed]["loss.loss"]
        for ours, theirs in pairs
    ]
    known = [[1.0, math.log2(steps), math.log2(width)] for width, steps in places]
    _, *slopes = np.linalg.lstsq(np.array(known), np.array(gains), rcond=None)[0].tolist()
    return slopes


def draw(name: str, caption: str, series: list[Line]) -> str:
    """A figure of gains by passes beside the page, and its line there."""
    drawing = lines(
        caption,
        series,
        "epochs over the text (log)",
        "nats",
        size=DOCS_SIZE,
        sides=("dropout hurts", "dropout helps"),
        log_x=True,
        marked=True,
    )
    save(name, drawing)
    return f"![{caption}](dropout-study/{name}.svg)"


def decay(study: Study) -> Iterator[str]:
    """Weight decay by dropout rate, and what each decay alone gains on the usual one."""
    yield from grid(study)
    usual, *others = study["axes"]["optim.weight_decay"]
    rows = []
    for size in study["axes"]["data.train_tokens"]:
        labels = {n: f"train_tokens={size:g}, weight_decay={n:g}, rate=0" for n in (usual, *others)}
        found = [difference(study, labels[n], labels[usual], "loss.loss") for n in others]
        rows.append([f"{size:,} tokens", *found])
    head = ["", *(f"weight decay {amount:g}" for amount in others)]
    yield f"Without dropout, minus weight decay {usual:g}:\n\n" + table(head, rows)
