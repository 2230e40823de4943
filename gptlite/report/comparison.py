"""The page of several runs: one axis for all, and what they differ in.

A token of one tokenizer is not one of another, so losses per token are drawn together only where
the tokenizers are the same; bits per byte are of the text.
"""

from collections.abc import Iterator
from typing import Any

from gptlite.report.figures import Figures, column, draw_lines, make_figures
from gptlite.report.header import tokenizer_words
from gptlite.report.layout import Page, Table
from gptlite.report.series import Line
from gptlite.report.tiles import tiles_of
from gptlite.runs.results import DAMAGED, RunFiles, format_cell

TOKENIZERS_DIFFER = (
    "These runs have different tokenizers. A token of one is more text than a token of another, "
    "so nats per token cannot be compared between them; bits per byte can."
)
TEXTS_DIFFER = (
    "These runs were validated on different texts. One text is easier than another, so their "
    "losses do not say which model is better."
)


def comparison_page(runs: list[RunFiles]) -> Page:
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    differ = [key for key in keys if len({format_cell(config.get(key)) for config in flat}) > 1]
    head = ["", *(run.name for run in runs)]
    settings = [[key, *(format_cell(config.get(key)) for config in flat)] for key in differ]
    found = [dict(results_of(run)) for run in runs]
    numbers = dict.fromkeys(name for of_run in found for name in of_run)
    results = [[name, *(of_run.get(name, "–") for of_run in found)] for name in numbers]
    return Page(
        title=f"{len(runs)} runs compared",
        subtitle=", ".join(run.name for run in runs),
        groups=[("Loss", make_figures([overlay_runs], runs))],
        tables=[Table("Results", head, results), Table("Settings that differ", head, settings)],
        hints=list(warnings_of(runs)),
        notes=[note for run in runs for note in run.notes],
    )


def results_of(run: RunFiles) -> Iterator[tuple[str, str]]:
    yield "tokenizer", try_words(run, tokenizer_words)
    try:
        for tile in tiles_of(run, None):
            yield tile.name, tile.value
    except DAMAGED:
        run.notes.append(f"{run.name}: damaged")


def try_words(run: RunFiles, words: Any) -> str:
    try:
        return str(words(run))
    except DAMAGED:
        return ""


def warnings_of(runs: list[RunFiles]) -> Iterator[str]:
    if differ_in_tokenizer(runs):
        yield TOKENIZERS_DIFFER
    if len({try_words(run, validation_text) for run in runs}) > 1:
        yield TEXTS_DIFFER


def differ_in_tokenizer(runs: list[RunFiles]) -> bool:
    return len({try_words(run, tokenizer_words) for run in runs}) > 1


def validation_text(run: RunFiles) -> str:
    """What a run is validated on, as far as its config says."""
    data = run.config["data"]
    names = ("source", "val_source", "include", "split_by", "val_fraction", "test_share")
    return repr([data.get(name) for name in names])


def overlay_runs(runs: list[RunFiles]) -> Figures:
    kinds = [
        ("Validation loss", "val/loss", "nats per token"),
        ("Training loss, dropout off", "train/loss_dropout_off", "nats per token"),
    ]
    if differ_in_tokenizer(runs):
        kinds = [("Validation loss in bits per byte", "val/bits_per_byte", "bits per byte")]
    for place, (title, name, unit) in enumerate(kinds):
        series = [
            Line(run.name, *column(run.rows, name), color=number % 6)
            for number, run in enumerate(runs)
        ]
        series = [line for line in series if line.x]
        if series:
            wide = place == 0
            yield draw_lines(
                title, series, "updates", unit, overlay_words(series), lowest=True, wide=wide
            )


def overlay_words(series: list[Line]) -> str:
    """Which of the curves comes lowest."""
    lowest = {line.label: min(y for y in line.y if y is not None) for line in series}
    best = min(lowest, key=lowest.__getitem__)
    words = ", ".join(f"{name} {value:.3f}" for name, value in sorted(lowest.items(), key=by_value))
    return f"Lowest is {best}. The lowest value of each: {words}."


def by_value(item: tuple[str, float]) -> float:
    return item[1]


def leaves(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{name}.")
        elif name not in ("out_dir", "cache_dir"):
            yield at + name, value
