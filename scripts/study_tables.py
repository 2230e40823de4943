"""The tables and figures of docs/dropout-study.md, each from the runs of one study.

A part of reproduce_dropout_study.py.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from study_cells import (
    DOCS,
    DOCS_SIZE,
    KINDS,
    Study,
    area,
    best_length,
    crossover,
    difference,
    interval,
    is_together,
    loss_of,
    mean,
    runs_of,
    save,
    table,
    together,
)

from gptlite.report.curves import lines
from gptlite.report.series import Line, rate_color
from gptlite.studies import comparison


def sweep(study: Study, name: str) -> Iterator[str]:
    """Losses by rate and epochs, differences to rate 0, and the crossover."""
    sizes, rates = study["axes"]["data.train_tokens"], study["axes"]["dropout.rate"]

    def label(size: Any, rate: Any) -> str:
        return f"train_tokens={size}, rate={rate:g}"

    epochs = [
        comparison.mean_over_seeds([m["epochs"] for m in runs_of(study, label(size, 0)).values()])[
            "mean"
        ]
        for size in sizes
    ]
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
    yield f"![{caption}](dropout-study/{name}.svg)"


def redundancy(study: Study) -> Iterator[str]:
    labels = [point["label"] for point in study["points"]]
    rows = [
        [
            label,
            *(mean(study, label, m) for m in ("best_val_loss", "val_loss", "loss.dropout_penalty")),
            mean(study, label, "calibration.ece"),
        ]
        for label in labels
    ]
    yield table(["", "best loss", "last loss", "penalty", "ECE"], rows)
    for ablation in ("mean", "zero"):
        for what, title in AREAS.items():
            rows = [
                [label, *(mean(study, label, area(kind, ablation, what)) for kind in KINDS)]
                for label in labels
            ]
            yield f"{title}, random removal to {ablation}:\n\n" + table(["", *KINDS], rows)
    yield from controls(study)
    measures = ("split_half", "gini", "effective_share", "backup.8")
    for kind in ("head", "neuron"):
        base = f"importance.kinds.{kind}.mean."
        rows = [
            [
                label,
                *(mean(study, label, base + m) for m in measures),
                mean(study, label, area(kind, "mean", "half_at")),
            ]
            for label in labels
        ]
        head = ["", "split-half", "Gini", "effective share", "backup of 8", "half at"]
        yield f"Importance of {kind}s, removal to mean:\n\n" + table(head, rows)
    rows = [[label, *(mean(study, label, f"mc-dropout.{m}") for m in MC)] for label in labels]
    yield "Averaging passes with dropout on:\n\n" + table(["", *MC], rows)


AREAS = {
    "contribution_area": "What is left of the kind's own contribution (area)",
    "retained_area": "Retained skill (area)",
}
MC = ("deterministic_loss", "averaged_minus_deterministic", "mutual_information")


def controls(study: Study) -> Iterator[str]:
    """Dropout against every point without it, in pairs of one seed."""
    labels = [point["label"] for point in study["points"]]
    alone = [label for label in labels if re.fullmatch(r"dropout [0-9.]+", label)]
    others = [label for label in labels if "dropout" not in label]
    for dropout in alone:
        for what, title in AREAS.items():
            rows = []
            for other in others:
                row = [f"{other} (loss {loss_of(study, other) - loss_of(study, dropout):+.3f})"]
                for ablation in ("mean", "zero"):
                    for kind in KINDS:
                        row.append(difference(study, dropout, other, area(kind, ablation, what)))
                rows.append(row)
            head = [f"{kind}, {ablation}" for ablation in ("mean", "zero") for kind in KINDS]
            yield f"{title} of {dropout} minus that of:\n\n" + table(["", *head], rows)


def placement(study: Study) -> Iterator[str]:
    labels = [point["label"] for point in study["points"]]
    rows = [
        [
            label,
            mean(study, label, "best_val_loss"),
            difference(study, label, "none", "best_val_loss"),
            difference(study, label, "none", "val_loss"),
            mean(study, label, "loss.dropout_penalty"),
        ]
        for label in labels
    ]
    yield table(["site at 0.2", "best loss", "minus none", "last loss minus none", "penalty"], rows)
    for ablation in ("mean", "zero"):
        for what, title in AREAS.items():
            rows = [
                [label, *(difference(study, label, "none", area(k, ablation, what)) for k in KINDS)]
                for label in labels[1:]
            ]
            yield f"{title} minus that of none, removal to {ablation}:\n\n" + table(
                ["trained with", *KINDS], rows
            )


def weights_or_context(study: Study) -> Iterator[str]:
    rows = [
        [
            point["label"],
            *(mean(study, point["label"], m) for m in ("best_val_loss", "val_loss")),
            difference(study, point["label"], "none", "best_val_loss"),
            mean(study, point["label"], "loss.dropout_penalty"),
        ]
        for point in study["points"]
    ]
    yield table(["", "best loss", "last loss", "best minus none", "penalty"], rows)
    rows = [
        [f"{r:g}", difference(study, f"weights {r:g}", f"context {r:g}", "best_val_loss")]
        for r in (0.1, 0.2, 0.3, 0.5)
    ]
    yield "Weights minus context at one rate, best loss:\n\n" + table(["rate", "difference"], rows)


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


def ensemble(study: Study) -> Iterator[str]:
    """Five runs as one model, beside as many passes of one with dropout on."""
    rows = []
    for point in study["points"]:
        label = point["label"]
        row = [label, mean(study, label, "loss.loss")]
        rows.append([*row, *(together(study, label, f"ensemble.{metric}") for metric in ENSEMBLE)])
    head = ["", "one model", "mean of logits", "mean of probabilities", "minus one model"]
    passes = "5 passes of one with dropout on, minus one without"
    yield table([*head, passes, "their share of the gain"], rows)


ENSEMBLE = (
    *("mean_of_logits.loss", "mean_of_probabilities.loss"),
    "mean_of_probabilities.minus_mean_member",
    *("mc_dropout.averaged_minus_deterministic", "mc_dropout.share_of_ensemble"),
)


def student(study: Study) -> Iterator[str]:
    """What a student of `ensemble`'s models has of their mean, which is in that study's numbers."""
    lines = (DOCS / "ensemble.jsonl").read_text().splitlines()
    teachers: Study = {"runs": [json.loads(line) for line in lines]}
    one = [run["loss.loss"] for run in runs_of(teachers, TEACHERS).values()]
    alone = sum(one) / len(one)
    five = next(run["metrics"] for run in teachers["runs"] if is_together(run, TEACHERS))
    gain = alone - five["ensemble.mean_of_probabilities.loss"]
    rows = []
    for label in (point["label"] for point in study["points"]):
        kept = [(alone - run["loss.loss"]) / gain for run in runs_of(study, label).values()]
        rows.append([label, mean(study, label, "loss.loss"), interval(kept)])
    yield table(["", "test loss", "share of the gain"], rows)


TEACHERS = "weight_decay=3, rate=0"


def recipe(study: Study) -> Iterator[str]:
    """Weight decay for each text, number of passes and model."""
    decays = study["axes"]["optim.weight_decay"]
    names = dict.fromkeys(point["label"].split(", ", 1)[1] for point in study["points"])

    def label(amount: Any, name: str) -> str:
        return f"weight_decay={amount:g}, {name}"

    head = ["", *(f"weight decay {amount:g}" for amount in decays)]
    rows = [[n, *(mean(study, label(a, n), "loss.loss") for a in decays)] for n in names]
    yield f"Test loss at the best step, nats:\n\n{table(head, rows)}"
    usual, *others = decays
    rows = [
        [n, *(difference(study, label(a, n), label(usual, n), "loss.loss") for a in others)]
        for n in names
    ]
    head = ["", *(f"weight decay {amount:g}" for amount in others)]
    yield f"Minus that of weight decay {usual:g}:\n\n{table(head, rows)}"


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


RATE = "dropout.rate"


def sizes(study: Study) -> Iterator[str]:
    """Each against the longest run of its kind without dropout."""
    rows = []
    for point in study["points"]:
        label, kind = point["label"], point["label"].partition(",")[0]
        row = [label, mean(study, label, "epochs"), mean(study, label, "loss.loss")]
        rows.append([*row, difference(study, label, f"{kind}, none", "loss.loss")])
    yield table(["", "passes", "test loss", "minus none"], rows)


def quick(study: Study) -> Iterator[str]:
    """The headlines."""
    rows = [
        [
            point["label"],
            *(mean(study, point["label"], m) for m in ("epochs", "loss.loss")),
            difference(study, point["label"], "no dropout", "loss.loss"),
            *(mean(study, point["label"], area("head", "mean", what)) for what in AREAS),
        ]
        for point in study["points"]
    ]
    head = [
        "",
        "passes",
        "test loss",
        "minus no dropout",
        "heads: contribution left",
        "heads: retained",
    ]
    yield table(head, rows)


WRITERS: dict[str, Callable[[Study], Iterator[str]]] = {
    "rates": lambda study: sweep(study, "rates"),
    "redundancy": redundancy,
    "placement": placement,
    "weights_or_context": weights_or_context,
    "annealed": annealed,
    "decay": decay,
    "ensemble": ensemble,
    "best": ensemble,
    "student": student,
    "recipe": recipe,
    "apart": grid,
    "learning_rate": grid,
    "below": grid,
    "sizes": sizes,
    "quick": quick,
}
