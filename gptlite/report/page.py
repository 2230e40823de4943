"""One self-contained HTML page about a run, several runs or a study, made of their files alone.

It opens offline, in light and dark, on a phone; it runs no script and asks for nothing. What cannot
be read is named on the page, never a traceback.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gptlite import __version__, storage
from gptlite.errors import ConfigError, UserError, install_command
from gptlite.report import charts
from gptlite.report.figures import Figure, Group, run_figures, runs_figures, study_figures
from gptlite.report.look import figures_of, mask_names
from gptlite.report.samples import Sample, samples_of
from gptlite.report.verdict import Verdict, verdict
from gptlite.runs.directory import has_run
from gptlite.runs.results import (
    DAMAGED,
    RunFiles,
    format_cell,
    generalisation_gap,
    read_run,
    read_study_results,
)
from gptlite.words import escape_controls

HINT = f"figures need matplotlib: {install_command('matplotlib')}"

Part = TypeVar("Part")


class Table(NamedTuple):
    caption: str
    head: list[str]
    rows: list[list[str]]


class Page(NamedTuple):
    """What the template lays out."""

    title: str
    subtitle: str
    tiles: list[tuple[str, str]]
    verdict: Verdict | None
    groups: list[tuple[str, list[Figure]]]
    tables: list[Table]
    samples: list[Sample]
    details: list[tuple[str, str]]
    notes: list[str]
    n_samples: int = 0
    """Written; more than there are on the page."""


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
    except Exception as error:  # of a library that draws: what was trained is worth more
        say(f"no report: {type(error).__name__}: {error}")


def write_look(found: dict[str, Any], target: Path) -> None:
    """The page of one look (measure/look.py)."""
    words = f"{mask_names(found)}. Layer {found['layer']}, head {found['head']}."
    page = Page(
        title=found["text"],
        subtitle=words,
        tiles=[
            ("loss, dropout on", f"{found['training']['loss']:.3f}"),
            ("loss, dropout off", f"{found['evaluation']['loss']:.3f}"),
        ],
        verdict=None,
        groups=[("What dropout does to this text", figures_of(found))],
        tables=[look_table(found)],
        samples=[],
        details=[],
        notes=[],
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


def look_figures(run: RunFiles) -> list[Group]:
    """What dropout does to one text, where the run has written it down."""
    return [("One text, and what falls of it", figures_of(run.look))] if run.look else []


def page_of(sources: list[Path]) -> Page:
    kinds = {source: source_kind(source) for source in sources}
    if len(sources) == 1:
        (source,) = sources
        if kinds[source] == "run":
            return run_page(read_run(source))
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


def render(page: Page) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["clean"] = lambda text: escape_controls(str(text), keep="\n\t")
    template = environment.get_template("page.html")
    return template.render(page=page, version=__version__, hint="" if charts.available() else HINT)


def run_page(run: RunFiles) -> Page:
    notes = run.notes
    nothing = Verdict("No verdict", "The logged losses or the config are damaged.", [])
    return Page(
        title=run.name,
        subtitle=try_part(notes, "plan.json or config.yaml", lambda: sizes_line(run), ""),
        tiles=try_part(notes, "metrics.jsonl", lambda: tiles(run), list[tuple[str, str]]()),
        verdict=try_part(
            notes,
            "config.yaml or metrics.jsonl",
            lambda: verdict(run.rows, run.config, run.plan),
            nothing,
        ),
        groups=[
            *run_figures(run),
            *try_part(notes, "look.json", lambda: look_figures(run), list[Group]()),
        ],
        tables=[
            *try_part(
                notes,
                "eval/ or plan.json",
                lambda: [results_table(run), sites_table(run)],
                list[Table](),
            )
        ],
        samples=try_part(notes, "samples or metrics.jsonl", lambda: samples_of(run), []),
        n_samples=run.n_samples,
        details=[
            ("Config", run.config_text),
            ("Environment", json.dumps(run.environment, indent=2, ensure_ascii=False)),
        ],
        notes=notes,
    )


def sizes_line(run: RunFiles) -> str:
    """Of the model and the data, in a line."""
    plan = run.plan
    model = run.config.get("model") or {}
    parts = [
        f"{plan['parameters'] / 1e6:.2f} M parameters" if "parameters" in plan else "",
        f"{model.get('n_layer')} layers" if model else "",
        f"{plan['train_tokens']:,} training tokens" if "train_tokens" in plan else "",
        f"{plan['epochs']:.2f} epochs" if "epochs" in plan else "",
    ]
    return " · ".join(filter(None, parts))


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The headline numbers."""
    best = run.best
    found = []
    if best is not None:
        found.append(("best validation loss", f"{best['val/loss']:.4f} nats"))
        if best.get("val/bits_per_byte") is not None:
            found.append(("bits per byte", f"{best['val/bits_per_byte']:.3f}"))
        gap = generalisation_gap(best)
        if gap is not None:
            found.append(("gap to training text", f"{gap:+.3f} nats"))
        found.append(("at step", f"{best['step']:,}"))
    seconds = run.rows[-1].get("elapsed_seconds") if run.rows else None
    if seconds is not None:
        found.append(("training time", f"{int(seconds) // 60}:{int(seconds) % 60:02d}"))
    return found


def results_table(run: RunFiles) -> Table:
    """Numbers of `gptlite eval`, with their intervals where they have one."""
    rows = []
    for suite in ("loss", "calibration", "mc-dropout"):
        for name, value in run.evals.get(suite, {}).items():
            if isinstance(value, dict) and {"value", "low", "high"} <= set(value):
                rows.append([suite, name, format_cell(value["value"]), format_interval(value)])
            elif isinstance(value, float):
                rows.append([suite, name, format_cell(value), ""])
    return Table("Measured by gptlite eval", ["suite", "number", "value", "95 % interval"], rows)


def sites_table(run: RunFiles) -> Table:
    rows = [
        [site["site"], f"{site['rate']:g}", site.get("profile", ""), str(site.get("masks", ""))]
        for site in run.sites
        if site.get("rate")
    ]
    return Table("Dropout sites that are live", ["site", "rate", "over depth", "masks"], rows)


def comparison_page(runs: list[RunFiles]) -> Page:
    flat = [dict(leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    differ = [key for key in keys if len({format_cell(config.get(key)) for config in flat}) > 1]
    head = ["", *(run.name for run in runs)]
    settings = [[key, *(format_cell(config.get(key)) for config in flat)] for key in differ]
    found = [
        dict(try_part(run.notes, run.name, partial(tiles, run), list[tuple[str, str]]()))
        for run in runs
    ]
    numbers = dict.fromkeys(name for of_run in found for name in of_run)
    results = [[name, *(of_run.get(name, "") for of_run in found)] for name in numbers]
    return Page(
        title=f"{len(runs)} runs compared",
        subtitle=", ".join(run.name for run in runs),
        tiles=[],
        verdict=None,
        groups=runs_figures(runs),
        tables=[Table("Results", head, results), Table("Settings that differ", head, settings)],
        samples=[],
        details=[],
        notes=[note for run in runs for note in run.notes],
    )


def leaves(config: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{name}.")
        elif name not in ("out_dir", "cache_dir"):
            yield at + name, value


def study_page(source: Path) -> Page:
    study, notes = read_study_results(source)
    runs = study.get("runs", [])
    done = sum(run.get("state") == "done" for run in runs)
    shown_metrics = study.get("table", [])
    yaml = source / "study.yaml"
    text = yaml.read_text(errors="replace") if yaml.is_file() else ""
    return Page(
        title=str(study.get("name", source.name)),
        subtitle=f"{done} of {len(runs)} runs done · {len(study.get('points', []))} points · "
        f"seeds {', '.join(map(str, study.get('seeds', [])))}",
        tiles=[],
        verdict=None,
        groups=study_figures(study),
        tables=[
            *(points_table(study, metric) for metric in shown_metrics),
            Table(
                "Runs that failed or were given up",
                ["run", "seed", "state", "why"],
                [
                    [str(run.get(key) or "") for key in ("label", "seed", "state", "why")]
                    for run in runs
                    if run.get("state") not in ("done", "missing")
                ],
            ),
        ],
        samples=[],
        details=[("Study", text)] if text else [],
        notes=[*notes, *map(str, study.get("notes", []))],
    )


def points_table(study: dict[str, Any], metric: str) -> Table:
    """A row per point: mean and interval over seeds, and what separates it from its baseline."""
    against = {
        comparison["label"]: comparison
        for comparison in study.get("comparisons", [])
        if comparison["metric"] == metric
    }
    rows = []
    for point in study.get("points", []):
        value = point["metrics"].get(metric)
        if value is None:
            continue
        row = [point["label"], format_cell(value["mean"]), format_interval(value), "", "", ""]
        other = against.get(point["label"])
        if other is not None:
            above = {True: "yes", False: "no"}.get(other["above_seed_noise"], "not known")
            row[3:] = [f"{other['difference']:+.4f}", format_interval(other), above]
        rows.append(row)
    head = ["point", "mean", "95 % interval", "difference", "95 % interval", "above seed noise"]
    return Table(metric, head, rows)


def format_interval(value: dict[str, Any]) -> str:
    if value["low"] is None:
        return ""
    return f"{format_cell(value['low'])} to {format_cell(value['high'])}"
