"""The tables and figures of docs/dropout-study.md, each from the runs of one study: those of named
points here, of grids in study_grids.py, of the recipe in study_recipe.py, of removed units in
study_removal.py.

A part of reproduce_dropout_study.py.
"""

import json
from collections.abc import Callable, Iterator

from study_cells import (
    DOCS,
    Study,
    area,
    difference,
    interval,
    is_together,
    mean,
    runs_of,
    table,
    together,
)
from study_grids import annealed, apart, decay, grid, sweep
from study_recipe import recipe, recipe_size
from study_removal import AREAS, placement, redundancy


def weights_or_context(study: Study) -> Iterator[str]:
    """Both at one rate, and at rates whose masks make the same noise."""
    rows = [
        [
            point["label"],
            mean(study, point["label"], "loss.loss"),
            difference(study, point["label"], "none", "loss.loss"),
            mean(study, point["label"], "val_loss"),
            mean(study, point["label"], "loss.dropout_penalty"),
        ]
        for point in study["points"]
    ]
    yield table(["", "test loss", "minus none", "last validation loss", "penalty"], rows)
    rows = []
    for context in (0.1, 0.2, 0.3, 0.5):
        noisy = AS_NOISY.get(context)
        found = [
            difference(study, f"weights {weights}", f"context {context}", "loss.loss")
            for weights in (context, noisy)
        ]
        rows.append([f"{context:g}", *found, f"{noisy:g}" if noisy else "–"])
    head = ["context at", "weights at the same rate minus it", "weights at the same noise minus it"]
    yield "Weights minus context, test loss:\n\n" + table([*head, "which is rate"], rows)


AS_NOISY = {0.2: 0.26, 0.3: 0.38, 0.5: 0.59}
"""Rates of weights whose masks add the variance that context vectors have at these rates."""


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


def against_kind(study: Study) -> Iterator[str]:
    """Each against the run of its kind, which is named before the comma, that has none of it."""
    rows = []
    for point in study["points"]:
        label, kind = point["label"], point["label"].partition(",")[0]
        row = [label, mean(study, label, "epochs"), mean(study, label, "loss.loss")]
        rows.append([*row, difference(study, label, f"{kind}, none", "loss.loss")])
    yield table(["", "passes", "test loss", "minus none"], rows)


def memorisation(study: Study) -> Iterator[str]:
    """What is known by heart at the best step and at the last one; the test text is the control."""
    rows = [
        [
            point["label"],
            mean(study, point["label"], "epochs"),
            *(mean(study, point["label"], at + metric) for metric in KNOWN for at in ("", "last.")),
            mean(study, point["label"], "memorisation.spans.held_out_longest_span"),
        ]
        for point in study["points"]
    ]
    head = [f"{it}, {at}" for it in KNOWN.values() for at in ("best", "last")]
    yield table(["", "passes", *head, "of test text"], rows)


KNOWN = {
    "loss.loss": "test loss",
    "memorisation.train.verbatim": "word for word",
    "memorisation.train.matched_tokens": "tokens in a row",
    "memorisation.spans.longest_span": "longest piece",
}


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
    "recipe_size": recipe_size,
    "apart": apart,
    "learning_rate": grid,
    "below": grid,
    "sizes": against_kind,
    "average": against_kind,
    "memorisation": memorisation,
    "quick": quick,
}
