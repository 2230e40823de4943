"""Those tables and figures of docs/dropout-study.md that are about removed units: what is left of a
network that was trained with dropout, and at which site it drops.

A part of reproduce_dropout_study.py.
"""

import itertools
import re
from collections.abc import Iterator

from study_cells import (
    DOCS_SIZE,
    KINDS,
    Study,
    against_none,
    area,
    difference,
    mean,
    mean_of,
    runs_of,
    save,
    show,
    table,
)

from gptlite.report.curves import lines
from gptlite.report.series import Line
from gptlite.studies import comparison


def redundancy(study: Study) -> Iterator[str]:
    labels = [point["label"] for point in study["points"]]
    rows = [
        [
            label,
            *(mean(study, label, m) for m in ("loss.loss", "val_loss", "loss.dropout_penalty")),
            mean(study, label, "calibration.ece"),
        ]
        for label in labels
    ]
    yield table(["", "test loss", "last validation loss", "penalty", "ECE"], rows)
    whole = {"contribution": "What all units of a kind are worth together, nats"}
    for ablation in ("mean", "zero"):
        for what, title in {**whole, **AREAS}.items():
            rows = [
                [label, *(mean(study, label, area(kind, ablation, what)) for kind in KINDS)]
                for label in labels
            ]
            yield f"{title}, random removal to {ablation}:\n\n" + table(["", *KINDS], rows)
    yield redundant_or_unused(study)
    yield draw_curves(study)
    yield from controls(study)
    for kind in ("head", "neuron"):
        base = f"importance.kinds.{kind}.mean."
        rows = [
            [
                label,
                *(mean(study, label, base + m) for m in ("split_half", "largest", "gini")),
                difference(study, label, "none", f"{base}gini"),
                *(mean(study, label, base + m) for m in ("effective_share", "backup.8")),
                mean(study, label, area(kind, "mean", "half_at")),
            ]
            for label in labels
        ]
        head = ["", "split-half", "costliest unit, nats", "Gini", "minus none", "effective share"]
        yield f"Importance of {kind}s, removal to mean:\n\n" + table(
            [*head, "backup of 8", "half at"], rows
        )
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
                losses = [mean_of(study, label, "loss.loss") for label in (other, dropout)]
                row = [f"{other} (loss {losses[0] - losses[1]:+.3f})"]
                for ablation in ("mean", "zero"):
                    for kind in KINDS:
                        row.append(difference(study, dropout, other, area(kind, ablation, what)))
                rows.append(row)
            head = [f"{kind}, {ablation}" for ablation in ("mean", "zero") for kind in KINDS]
            yield f"{title} of {dropout} minus that of:\n\n" + table(["", *head], rows)


def redundant_or_unused(study: Study) -> str:
    """What each point retains more than none without heads, in its two parts."""
    head = [f"{part}, {ablation}" for ablation in ("mean", "zero") for part in PARTS]
    rows = []
    for label in (point["label"] for point in study["points"] if point["label"] != "none"):
        gains = [zip(*split_gain(study, label, way), strict=True) for way in ("mean", "zero")]
        parts = [part for both in gains for part in both]
        rows.append([label, *map(against_none, parts, head)])
    return "Retained skill (area) without heads minus that of none, in two parts:\n\n" + table(
        ["", *head], rows
    )


PARTS = ("more redundant", "less used")


def split_gain(study: Study, label: str, ablation: str) -> Iterator[tuple[float, float]]:
    """What retained skill without heads gains on none, of each seed: because more is left of what
    heads are worth, and because they are worth less of the skill.

    Retained skill is 1 - use (1 - left); each part is taken at the mean of the other factor.
    """
    left, kept = (area("head", ablation, what) for what in AREAS)
    ours, theirs = runs_of(study, label), runs_of(study, "none")
    for seed in ours.keys() & theirs.keys():
        a, b = ours[seed], theirs[seed]
        use_a, use_b = ((1 - m[kept]) / (1 - m[left]) for m in (a, b))
        redundant = (use_a + use_b) / 2 * (a[left] - b[left])
        yield redundant, (1 - (a[left] + b[left]) / 2) * (use_b - use_a)


def draw_curves(study: Study) -> str:
    """The skill that is left without a share of the heads, and its line on the page."""
    series = []
    for at, label in enumerate(DRAWN):
        runs = [run for run in study["runs"] if run["label"] == label and "curves" in run]
        if not runs:
            return ""
        fractions = runs[0]["curves"]["fractions"]
        left = zip(*(run["curves"]["head.mean"]["retained"] for run in runs), strict=True)
        found = [comparison.mean_over_seeds(list(values)) for values in left]
        y, low, high = ([f[key] for f in found] for key in ("mean", "low", "high"))
        series.append(Line(label, fractions, y, low, high, color=at))
    caption = "Skill left without a share of the heads"
    axis = "share of the heads that is removed, at random, to the mean"
    save("removed", lines(caption, series, axis, "of the skill", size=DOCS_SIZE, marked=True))
    return f"![{caption}](dropout-study/removed.svg)"


DRAWN = ("none", "dropout 0.1", "dropout 0.3", "weight decay 3", "more text, fewer updates")


def placement(study: Study) -> Iterator[str]:
    labels = [point["label"] for point in study["points"]]
    rows = [
        [
            label,
            mean(study, label, "loss.loss"),
            difference(study, label, "none", "loss.loss"),
            difference(study, label, "none", "val_loss"),
            mean(study, label, "loss.dropout_penalty"),
        ]
        for label in labels
    ]
    last = "last validation loss minus none"
    yield table(["site at 0.2", "test loss", "minus none", last, "penalty"], rows)
    yield name_apart(study, labels[1:])
    for ablation in ("mean", "zero"):
        for what, title in AREAS.items():
            rows = [
                [label, *(difference(study, label, "none", area(k, ablation, what)) for k in KINDS)]
                for label in labels[1:]
            ]
            yield f"{title} minus that of none, removal to {ablation}:\n\n" + table(
                ["trained with", *KINDS], rows
            )


def name_apart(study: Study, labels: list[str]) -> str:
    """Which two of these points differ in their test loss, by the rule that makes a cell bold."""
    pairs = list(itertools.combinations(labels, 2))
    found = [difference(study, one, other, "loss.loss") for one, other in pairs]
    comparison.mark_above_noise(found)
    apart = [
        f"`{one}` minus `{other}` {show(cell)}"
        for (one, other), cell in zip(pairs, found, strict=True)
        if cell["above_seed_noise"]
    ]
    named = f": {', '.join(apart)}" if apart else ""
    told = "Pairs of sites whose test losses differ above the noise"
    return f"{told}: {len(apart)} of {len(pairs)}{named}."
