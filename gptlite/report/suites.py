"""The suites of `gptlite eval` on a page: what their numbers mean, and which of them are shown."""

from collections.abc import Iterator
from typing import Any

from gptlite.report.layout import Table
from gptlite.runs.results import RunFiles, format_cell, scalars

SUITES = {
    "loss": "The loss over the whole split in nats per token, dropout off. Perplexity is e to the "
    "loss: among so many equally likely tokens the choice would be as hard. Bits per byte are of "
    "the text, so they can be compared between tokenizers; accuracy is how often the likeliest "
    "token came; the gap is validation minus training text; the penalty is what leaving dropout on "
    "costs on training text.",
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
"""What the numbers of each suite mean."""
UNITS = ("head", "neuron", "layer", "dimension")
HEADLINES = {
    "loss": (
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "generalisation_gap",
        "dropout_penalty",
    ),
    "calibration": ("ece", "adaptive_ece", "brier", "confidence", "accuracy"),
    "knockout": tuple(
        f"kinds.{kind}.mean.random.{what}"
        for what in ("contribution_area", "retained_area")
        for kind in UNITS
    ),
    "importance": tuple(
        f"kinds.{kind}.mean.{what}"
        for kind in UNITS[:2]
        for what in ("gini", "effective_share", "split_half")
    ),
    "memorisation": (
        *("train.verbatim", "val.verbatim", "train.matched_tokens", "val.matched_tokens"),
        "spans.longest_span",
    ),
    "mc-dropout": (
        *("deterministic_loss", "averaged_loss", "averaged_minus_deterministic"),
        "mutual_information",
    ),
    "ensemble": (
        *("mean_of_logits.loss", "mean_of_probabilities.loss"),
        "mean_of_probabilities.minus_mean_member",
    ),
}
"""Of each suite the numbers that a page shows."""
WORDS = {
    "kinds.": "",
    "mean.random.contribution_area": "contribution left",
    "mean.random.retained_area": "skill left",
    "mean.": "",
}
"""Parts of the names of numbers, and what is said instead."""


def results_tables(run: RunFiles) -> Iterator[Table]:
    """With the intervals of numbers that have one."""
    for suite, names in HEADLINES.items():
        found = dict(scalars(run.evals.get(suite, {})))
        rows = [result_row(name, found[name]) for name in names if name in found]
        rows += [["note", str(found["note"]), ""]] if "note" in found else []
        about = f"{SUITES[suite]} All numbers are in eval/."
        yield Table(f"gptlite eval: {suite}", ["number", "value", "95 % interval"], rows, about)


def result_row(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [short_metric(name), format_cell(value["value"]), format_interval(value)]
    return [short_metric(name), format_cell(value), ""]


def format_interval(value: dict[str, Any]) -> str:
    if value["low"] is None or value["high"] is None:
        return ""
    return f"{format_cell(value['low'])} to {format_cell(value['high'])}"


def short_metric(name: str) -> str:
    for long, short in WORDS.items():
        name = name.replace(long, short)
    return name.replace("_", " ").replace(".", ", ")
