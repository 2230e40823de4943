"""The headline numbers of a run, and the tables of what was measured, each term explained."""

from collections.abc import Iterator
from typing import Any

from gptlite.report.layout import Table, Tile
from gptlite.report.verdict import Verdict, nats
from gptlite.runs.results import (
    INTERVAL,
    RunFiles,
    format_cell,
    generalisation_gap,
    number,
    scalars,
)
from gptlite.terminal import format_duration

SUITES = {
    "loss": "The loss over the whole split, dropout off. Bits per byte are of the text, so they "
    "can be compared between tokenizers; accuracy is how often the likeliest token came; the gap "
    "is validation minus training text; the penalty is what leaving dropout on costs on training "
    "text.",
    "calibration": "Whether probabilities mean what they say. The expected calibration error (ECE) "
    "is how far, on average, the probability of the likeliest token is from how often it comes; "
    "adaptive: with as many tokens in each bin. Brier: squared distance of all probabilities from "
    "what came, 0 at best, 2 at worst.",
    "knockout": "What is left when units are removed at random, averaged over the shares removed: "
    "of the contribution (what all units of the kind are worth together) and of the skill (what "
    "the model knows beyond the frequencies of tokens). 1 is all, 0 nothing.",
    "importance": "The importance of a unit is what the loss rises by without it. Gini: 0 if all "
    "matter alike, near 1 if one does all. Effective share: the number of equal units that would "
    "be as spread, over all. Split-half: how well the importances of two halves of the text agree, "
    "1 at best.",
    "memorisation": "Whether text is known by heart: the share of windows that are continued word "
    "for word (verbatim), and how many tokens in a row are right, on training text and on "
    "validation text, which the model has not seen.",
    "mc-dropout": "Predictions averaged over passes with dropout on. Mutual information is how "
    "much the passes disagree, in nats.",
    "ensemble": "The runs of all seeds of a point as one model.",
}
"""A word on each suite; the numbers' names are in the code and the JSON."""
IN_FIGURES = ("knockout",)
"""Suites whose numbers are too many for a table and are drawn instead."""


def tiles_of(run: RunFiles, verdict: Verdict | None) -> list[Tile]:
    """The gap is that of the verdict, where there is one."""
    best, evaluated = run.best, run.evaluations
    found = []
    if best is not None:
        about = f"nats per token, at step {best['step']:,}; lower is better"
        found.append(Tile("best validation loss", f"{best['val/loss']:.4f}", about))
        if best.get("val/bits_per_byte") is not None:
            about = "at the same step; comparable between tokenizers"
            found.append(Tile("bits per byte", f"{best['val/bits_per_byte']:.3f}", about))
        gap = generalisation_gap(evaluated[-1]) if verdict is None else verdict.gap
        if gap is not None:
            about = "nats, validation minus training text, dropout off on both, at step "
            about += f"{evaluated[-1]['step']:,}"
            found.append(Tile("gap to training text", nats(gap), about))
    seconds = number(run.rows[-1].get("elapsed_seconds")) if run.rows else None
    if seconds is not None:
        about = f"until step {run.rows[-1]['step']:,}, without evaluations"
        found.append(Tile("training time", format_duration(seconds), about))
    return found


def results_tables(run: RunFiles) -> Iterator[Table]:
    """Numbers of `gptlite eval`, with their intervals where they have one."""
    for suite, about in SUITES.items():
        if suite in run.evals and suite not in IN_FIGURES:
            rows = list(results_rows(run.evals[suite]))
            head = ["number", "value", "95 % interval"]
            yield Table(f"gptlite eval: {suite}", head, rows, about)


def results_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for name, value in scalars(result):
        shown = name.removeprefix("kinds.").replace("_", " ").replace(".", ", ")
        if isinstance(value, dict) and set(value) == INTERVAL:
            yield [shown, format_cell(value["value"]), format_interval(value)]
        elif isinstance(value, float) or name == "note":
            yield [shown, format_cell(value), ""]


def format_interval(value: dict[str, Any]) -> str:
    if value["low"] is None or value["high"] is None:
        return ""
    return f"{format_cell(value['low'])} to {format_cell(value['high'])}"


def sites_table(run: RunFiles) -> Table:
    about = "Keyed masks are functions of seed, step, site, layer, sample, position and feature; "
    about += "native ones come from torch's generator."
    rows = [
        [site["site"], f"{site['rate']:g}", site.get("profile", ""), str(site.get("masks", ""))]
        for site in run.sites
        if site.get("rate")
    ]
    return Table("Sites that drop", ["site", "rate", "over depth", "masks"], rows, about)
