"""One self-contained HTML page about a run, several runs or a study, made of their files alone.

It opens offline, in light and dark, on a phone; it runs no script and asks for nothing. What cannot
be read is named on the page, never a traceback.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gptlite import storage
from gptlite.errors import ConfigError, UserError
from gptlite.report.comparison import comparison_page
from gptlite.report.figures import Group, run_figures
from gptlite.report.header import Header, header_of
from gptlite.report.layout import Page, Table, Tile, render
from gptlite.report.look import figures_of, mask_names
from gptlite.report.samples import samples_of
from gptlite.report.study_page import study_page
from gptlite.report.suites import results_tables
from gptlite.report.tiles import sites_table, tiles_of
from gptlite.report.verdict import Verdict, verdict
from gptlite.runs.directory import has_run
from gptlite.runs.results import DAMAGED, RunFiles, read_run

MEASURED = {"loss", "calibration", "knockout", "importance"}
"""Suites without which a page says how to get more."""
Part = TypeVar("Part")


def write_page(sources: list[Path], target: Path | None = None) -> Path:
    """The page of these run or study directories; returns where it is.

    Raises ConfigError for a directory that is neither a run nor a study.
    """
    page = page_of(sources)
    if target is None:
        target = sources[0] / "report.html" if len(sources) == 1 else Path("report.html")
    storage.write_text(target, render(page))
    return target


def add_report(directory: Path, say: Callable[[str], None]) -> None:
    """The page of a run or study that has just ended; whatever fails, what was made stays."""
    try:
        say(f"report: {write_page([directory])}")
    except UserError as error:
        say(f"no report: {error}")
    except Exception as error:  # what was trained is worth more
        say(f"no report: {type(error).__name__}: {error}")


def write_look(found: dict[str, Any], target: Path) -> None:
    """The page of one look (measure/look.py)."""
    page = Page(
        title=found["text"],
        subtitle=f"{mask_names(found)}. Layer {found['layer']}, head {found['head']}.",
        tiles=[
            Tile("loss, dropout on", f"{found['training']['loss']:.3f}", "nats per token"),
            Tile("loss, dropout off", f"{found['evaluation']['loss']:.3f}", "nats per token"),
        ],
        groups=[("What dropout does to this text", figures_of(found))],
        tables=[look_table(found)],
    )
    storage.write_text(target, render(page))


def look_table(found: dict[str, Any]) -> Table:
    """Each site that drops, and how much."""
    rows = [
        [
            site["site"],
            f"({', '.join(site['tensor'])})",
            f"({', '.join(site['mask'])})",
            f"{site['rate']:.3g}",
            f"{site['share']:.3f}",
            "–" if site["scale"] is None else f"{site['scale']:.4g}",
        ]
        for site in found["sites"]
    ]
    return Table(
        f"Sites that drop in layer {found['layer']}, and those of no layer",
        ["site", "tensor", "mask", "rate", "fell here", "the rest ×"],
        rows,
    )


def page_of(sources: list[Path]) -> Page:
    kinds = {source: source_kind(source) for source in sources}
    if len(sources) == 1:
        (source,) = sources
        if kinds[source] == "run":
            return run_page(source)
        try:
            return study_page(source)
        except DAMAGED:
            raise ConfigError(f"{source / 'study.json'}: damaged") from None
    studies = [str(source) for source, kind in kinds.items() if kind == "study"]
    if studies:
        raise ConfigError(f"{studies[0]}: a study is reported alone")
    return comparison_page([read_run(source) for source in sources])


def source_kind(source: Path) -> str:
    if (source / "study.json").is_file():
        return "study"
    if has_run(source):
        return "run"
    what = "not a run or study directory" if source.is_dir() else "no such directory"
    raise ConfigError(f"{source}: {what}")


def try_part(notes: list[str], what: str, make: Callable[[], Part], without: Part) -> Part:
    """A part of the page, or, where the values it is made of are damaged, a note and none."""
    try:
        return make()
    except DAMAGED:
        notes.append(f"{what}: damaged")
        return without


def run_page(directory: Path) -> Page:
    run = read_run(directory)
    notes = run.notes
    nothing = Verdict("No verdict", "The logged losses or the config are damaged.", [])
    log, described = "metrics.jsonl", "plan.json or config.yaml"
    said = try_part(
        notes,
        "config.yaml or metrics.jsonl",
        lambda: verdict(run.rows, run.config, run.plan),
        nothing,
    )
    header = try_part(notes, described, lambda: header_of(run, directory), Header([]))
    if header.running:
        said = said._replace(title=f"So far: {said.title}")
    return Page(
        title=run.name,
        header=header,
        tiles=try_part(notes, log, lambda: tiles_of(run, said), list[Tile]()),
        verdict=said,
        groups=run_groups(run),
        tables=[
            *try_part(notes, "eval/", lambda: list(results_tables(run)), list[Table]()),
            *try_part(notes, "plan.json", lambda: [sites_table(run)], list[Table]()),
        ],
        samples=try_part(notes, "samples or metrics.jsonl", lambda: samples_of(run), []),
        n_samples=run.n_samples,
        details=[
            ("Config", run.config_text),
            ("Environment", environment_text(run)),
        ],
        more="" if not run.rows or run.evals.keys() >= MEASURED else measure_hint(directory),
        notes=notes,
    )


def run_groups(run: RunFiles) -> list[Group]:
    """With what falls of one text, where the run has written it down."""
    groups = dict(run_figures(run))
    if run.look:
        groups["Dropout"] += try_part(run.notes, "look.json", lambda: figures_of(run.look), [])
    return list(groups.items())


def environment_text(run: RunFiles) -> str:
    return json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else ""


def measure_hint(directory: Path) -> str:
    command = f"gptlite eval --run {directory} --suite all"
    return (
        "There is more to measure: what the trained model can do without some of its parts, how "
        f"sure it is, what it knows by heart. {command}, and then gptlite report {directory}"
    )
