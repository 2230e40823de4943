"""The page of a study: what it found, the learning curves of its points, and what was measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlite.report import charts
from gptlite.report.answer import answer_of, capital, direction_of
from gptlite.report.charts import Dots
from gptlite.report.figures import Figure, Figures, Group, draw_lines, make_figures
from gptlite.report.layout import Page, Table
from gptlite.report.series import Line, colors_of
from gptlite.report.suites import HEADLINES, SUITES, format_interval, short_metric
from gptlite.report.values import values_of
from gptlite.report.verdict import Verdict
from gptlite.runs.results import (
    Row,
    evaluations,
    format_cell,
    format_difference,
    number,
    read_json,
    read_rows,
    read_study_results,
)
from gptlite.words import count

LOSS, PER_BYTE = "best_val_loss", "loss.bits_per_byte"
MOST_FIGURES, MOST_CURVES = 6, 8
"""Drawings of learning curves, and points in one of them."""


class StudyFiles(NamedTuple):
    """study.json, and what the runs themselves have written."""

    results: dict[str, Any]
    logs: dict[str, list[Row]]
    """The evaluations of each run, by its name."""
    tokenizers: dict[str, str]
    """By label of the point, as far as they can be told apart."""
    axis: str
    """Whose values have the colours."""
    colors: dict[str, int]
    """By label of the point."""


def read_study(source: Path, study: dict[str, Any]) -> StudyFiles:
    logs: dict[str, list[Row]] = {}
    tokenizers: dict[str, str] = {}
    for run in study.get("runs", []):
        folder = source / "runs" / str(run.get("name", "")).replace("/", "_")
        if run.get("state") == "done" and (folder / "metrics.jsonl").is_file():
            logs[run["name"]] = evaluations(read_rows(folder / "metrics.jsonl", []))
            plan = read_json(folder / "plan.json", [])
            tokenizers[run["label"]] = f"{plan.get('vocab_size')} {plan.get('bytes_per_token')}"
    axis, colors = color_points(study)
    return StudyFiles(study, logs, tokenizers, axis, colors)


def color_points(study: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """The axis that has the colours, a rate's if there is one, and the colour of each point."""
    axes, points = list(study.get("axes", {})), study.get("points", [])
    rates = [axis for axis in axes if "dropout" in axis]
    axis = (rates or axes or [""])[-1]
    values = list(dict.fromkeys(repr(point["point"].get(axis)) for point in points))
    known = {repr(point["point"].get(axis)): point["point"].get(axis) for point in points}
    numbers = colors_of([known[value] for value in values], bool(rates))
    by_value = dict(zip(values, numbers, strict=True))
    return axis, {point["label"]: by_value[repr(point["point"].get(axis))] for point in points}


def study_page(source: Path) -> Page:
    results, notes = read_study_results(source)
    study = read_study(source, results)
    runs, points = results.get("runs", []), results.get("points", [])
    done = sum(run.get("state") == "done" for run in runs)
    yaml = source / "study.yaml"
    metric, hints = decisive_metric(study)
    answer = answer_of(results, metric)
    return Page(
        title=str(results.get("name", source.name)),
        subtitle=f"{done} of {count(len(runs), 'run')} done · {count(len(points), 'point')} · "
        f"seeds {', '.join(map(str, results.get('seeds', [])))}",
        verdict=Verdict(answer.title, "", answer.lines),
        groups=study_groups(study, metric),
        tables=[
            *(points_table(results, name) for name in results.get("table", [])),
            *suite_tables(results),
            failed_table(runs),
        ],
        details=[("Study", yaml.read_text(errors="replace") if yaml.is_file() else "")],
        hints=[*hints, *unmeasured(results)],
        notes=[*notes, *map(str, results.get("notes", []))],
    )


def decisive_metric(study: StudyFiles) -> tuple[str, list[str]]:
    """The metric that the answer is about, and what is to be kept in mind of it."""
    table = [name for name in study.results.get("table", []) if direction_of(name)]
    chosen = next(iter(table), LOSS)
    known, comparisons = study.tokenizers, study.results.get("comparisons", [])
    if all(known.get(found["label"]) == known.get(found["against"]) for found in comparisons):
        return chosen, []
    hint = (
        "Points that are compared have different tokenizers. Nats per token cannot be compared "
        "between them; bits per byte can"
    )
    if PER_BYTE in {comparison["metric"] for comparison in comparisons}:
        return PER_BYTE, [f"{hint}, so the answer is about these."]
    return chosen, [f"{hint}, and were not measured: evaluate: [loss] in the study does."]


def study_groups(study: StudyFiles, metric: str) -> list[Group]:
    names = list(dict.fromkeys([metric, *study.results.get("table", [])]))
    groups = [
        (metric_words(name), make_figures([metric_over_axes, baseline_differences], study, name))
        for name in names
    ]
    groups.insert(1, ("Learning curves", make_figures([learning_curves], study)))
    return groups


def metric_words(metric: str) -> str:
    words = metric.replace("val_loss", "validation_loss").replace("_", " ").replace(".", ", ")
    return capital(words)


def metric_over_axes(study: StudyFiles, metric: str) -> Figures:
    """The metric over each axis of numbers; the axis of the colours keeps them."""
    for axis in study.results["axes"]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for point in study.results["points"]:
            x, value = number(point["point"].get(axis)), point["metrics"].get(metric)
            if x is None or value is None:
                continue
            others = {key: v for key, v in point["point"].items() if key != axis}
            label = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in others.items())
            color = study.colors[point["label"]]
            groups.setdefault(label, []).append({"x": x, "color": color, **value})
        if groups and max(map(len, groups.values())) > 1:
            yield draw_dots(study, metric, axis, groups)


def draw_dots(
    study: StudyFiles, metric: str, axis: str, groups: dict[str, list[dict[str, Any]]]
) -> Figure:
    drawn = []
    for label, points in groups.items():
        points.sort(key=lambda point: float(point["x"]))
        drawn.append(Dots(label, points, None if axis == study.axis else points[0]["color"]))
    title = f"{metric_words(metric)} over {axis}"
    means = [(point["mean"], point["x"]) for points in groups.values() for point in points]
    direction = direction_of(metric)
    caption = "Large dots are means over seeds with 95 % intervals, small ones the seeds."
    if direction:
        mean, x = max(means) if direction > 0 else min(means)
        side = "Highest" if direction > 0 else "Lowest"
        caption = f"{side} is {format_cell(mean)}, at {x:g}. {caption}"
    lines = charts.dot_lines(drawn)
    values = values_of(lines, axis, metric_words(metric), lowest=direction < 0)
    return Figure(title, charts.dots(title, drawn, axis, metric_words(metric)), caption, values)


def baseline_differences(study: StudyFiles, metric: str) -> Figures:
    rows = [
        {**row, "color": study.colors.get(row["label"], 0)}
        for row in study.results["comparisons"]
        if row["metric"] == metric
    ]
    if not rows:
        return
    title = f"{metric_words(metric)}: difference to the baseline"
    sides = {-1: ("helps", "hurts"), 1: ("hurts", "helps")}.get(direction_of(metric))
    above = sum(bool(row["above_seed_noise"]) for row in rows)
    caption = f"{above} of {len(rows)} are above the noise of seeds; those are filled. "
    caption += "Differences are paired by seed, lines are 95 % intervals."
    yield Figure(title, charts.forest(title, rows, "difference", sides), caption)


def learning_curves(study: StudyFiles) -> Figures:
    """Of each setting one drawing, a curve per value of the axis that has the colours."""
    settings: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for point in study.results["points"]:
        others = {key: v for key, v in point["point"].items() if key != study.axis}
        setting = ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in others.items())
        value = point["point"].get(study.axis)
        name = f"{study.axis.rpartition('.')[2]} {value}" if study.axis != "point" else str(value)
        settings.setdefault(setting, []).append((name, point))
    for setting, points in list(settings.items())[:MOST_FIGURES]:
        key, unit = "val/loss", "nats per token"
        if len({study.tokenizers.get(point["label"]) for _, point in points}) > 1:
            key, unit = "val/bits_per_byte", "bits per byte"
        curves = [curve_of(study, name, point, key) for name, point in points[:MOST_CURVES]]
        curves = [curve for curve in curves if curve.x]
        if curves:
            title = f"Validation loss, {setting}" if setting else "Validation loss"
            wide = len(settings) == 1
            words = " ".join(curve_words(curves, len(points)))
            yield draw_lines(title, curves, "updates", unit, words, lowest=True, wide=wide)


def curve_of(study: StudyFiles, name: str, point: dict[str, Any], key: str) -> Line:
    """The mean over the seeds of a point at each step, and the lowest and highest seed."""
    names = [run["name"] for run in study.results["runs"] if run["label"] == point["label"]]
    logs = [study.logs[run] for run in names if run in study.logs]
    by_step: dict[int, list[float]] = {}
    for row in (row for log in logs for row in log):
        if (value := number(row.get(key))) is not None:
            by_step.setdefault(row["step"], []).append(value)
    whole = {step: values for step, values in sorted(by_step.items()) if len(values) == len(logs)}
    means = [sum(values) / len(values) for values in whole.values()]
    several = len(logs) > 1
    low = [min(values) for values in whole.values()] if several else None
    high = [max(values) for values in whole.values()] if several else None
    color = study.colors[point["label"]]
    return Line(name, list(map(float, whole)), means, low, high, color=color)


def curve_words(curves: list[Line], n_points: int) -> Iterator[str]:
    """Which curve comes lowest, and what the bands are."""
    lowest = [
        (y, curve.label, x)
        for curve in curves
        for x, y in zip(curve.x, curve.y, strict=True)
        if y is not None and x is not None
    ]
    y, label, x = min(lowest)
    yield f"The lowest mean over seeds is {y:.3f}: {label}, at step {x:,.0f}."
    if any(curve.low for curve in curves):
        yield "Bands reach from the lowest seed to the highest."
    if len(curves) < n_points:
        yield f"{len(curves)} of {n_points} points are drawn."


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
            row[3:] = [format_difference(other["difference"]), format_interval(other), above]
        rows.append(row)
    head = ["point", "mean", "95 % interval", "difference", "95 % interval", "above seed noise"]
    about = "Mean over seeds, and the difference to the baseline, paired by seed."
    return Table(metric_words(metric), head, rows, about)


def suite_tables(study: dict[str, Any]) -> Iterator[Table]:
    """Of every suite that was measured, each point's headline numbers."""
    for suite, names in HEADLINES.items():
        known = [f"{suite}.{name}" for name in names]
        known = [name for name in known if name in study.get("metrics", []) or suite == "ensemble"]
        rows = []
        for point in study.get("points", []):
            cells = [mean_words(point["metrics"].get(name)) for name in known]
            if any(cell != "–" for cell in cells):
                rows.append([point["label"], *cells])
        head = ["point", *(short_metric(name.partition(".")[2]) for name in known)]
        about = f"{SUITES[suite]} Means over seeds; study.json has every number."
        yield Table(f"Suite {suite}", head, rows, about)


def mean_words(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    low, high = number(value["low"]), number(value["high"])
    around = "" if low is None or high is None else f" ± {(high - low) / 2:.2g}"
    return f"{format_cell(value['mean'])}{around}"


def unmeasured(study: dict[str, Any]) -> Iterator[str]:
    """Suites that were asked for and gave no number."""
    measured = next(
        (str(run["measured"]) for run in study.get("runs", []) if "measured" in run), ""
    )
    known = {name.partition(".")[0] for name in study.get("metrics", [])}
    for suite in measured.partition(" ")[0].split(","):
        if suite in HEADLINES and suite not in known and known:
            why = "; no run has dropout to keep on" if suite == "mc-dropout" else ""
            yield f"{suite} was asked for and gave no number{why}."


def failed_table(runs: list[dict[str, Any]]) -> Table:
    rows = [
        [str(run.get(key) or "") for key in ("label", "seed", "state", "why")]
        for run in runs
        if run.get("state") not in ("done", "missing")
    ]
    return Table("Runs that failed or were given up", ["run", "seed", "state", "why"], rows)
