"""What the tables of docs/dropout-study.md are made of: means over seeds, differences in pairs, and
tables in which what is above the noise of seeds is bold.

A study here is what study.json has: axes, points, runs.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlite.studies import comparison

DOCS = Path(__file__).resolve().parents[1] / "docs" / "dropout-study"
DOCS_SIZE = 760.0, 420.0
"""Of a figure beside the page."""
KINDS = ("head", "neuron", "layer", "dimension")
LIGHT = {
    **{"var(--ink)": "#1d2433", "var(--soft)": "#5b6475", "var(--line)": "#dfe1e6"},
    **{"var(--card)": "#ffffff", "var(--c1)": "#2f62b8"},
    **{"var(--c2)": "#c2571a", "var(--c3)": "#2b8051", "var(--c4)": "#8a4aa8"},
    **{"var(--c5)": "#9a7400", "var(--c6)": "#7b8190"},
}
Study = dict[str, Any]


def area(kind: str, ablation: str, what: str = "retained_area") -> str:
    return f"knockout.kinds.{kind}.{ablation}.random.{what}"


def runs_of(study: Study, label: str) -> dict[int, dict[str, float]]:
    found = [run for run in study["runs"] if run["label"] == label and run["state"] == "done"]
    return {run["seed"]: run["metrics"] for run in found}


def mean(study: Study, label: str, metric: str) -> str:
    """Mean ± half of the 95 % interval over seeds."""
    return interval([m[metric] for m in runs_of(study, label).values() if metric in m])


def mean_of(study: Study, label: str, metric: str) -> float:
    values = [m[metric] for m in runs_of(study, label).values() if metric in m]
    return sum(values) / len(values)


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % interval."""
    if not values:
        return "–"
    over = comparison.mean_over_seeds(values)
    half = "" if over["low"] is None else f" ± {over['high'] - over['mean']:.3f}"
    return f"{over['mean']:.3f}{half}"


def difference(study: Study, label: str, other: str, metric: str) -> Any:
    """The paired difference to another point."""
    mine, theirs = runs_of(study, label), runs_of(study, other)
    seeds = [s for s in mine if s in theirs and metric in mine[s] and metric in theirs[s]]
    if not seeds:
        return None
    found = comparison.paired_difference(
        [mine[s][metric] for s in seeds], [theirs[s][metric] for s in seeds]
    )
    return {**found, "metric": metric}


def against_none(values: Sequence[float], metric: str) -> dict[str, Any]:
    """Of one number per seed, as a difference to 0."""
    return {**comparison.paired_difference(values, [0.0] * len(values)), "metric": metric}


def show(found: Any) -> str:
    """A cell: text, or a difference, bold where it is above the noise of seeds."""
    if isinstance(found, str):
        return found
    if found is None or found["p"] is None:
        return "–"
    text = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"**{text}**" if found["above_seed_noise"] else text


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Cells are texts or differences; those of one metric are tested together (Holm)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in (cell for row in rows for cell in row if isinstance(cell, dict)):
        found.setdefault(cell["metric"], []).append(cell)
    for of_metric in found.values():
        comparison.mark_above_noise(of_metric)
    lines = [head, ["---"] * len(head), *([show(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_empty(text: str) -> bool:
    """Whether a table has nothing but the names of its rows: these runs were not so measured."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [cell.strip() for row in rows for cell in row.split("|")[2:-1]]
    return bool(cells) and all(cell == "–" for cell in cells)


def loss_of(study: Study, label: str) -> float:
    values = [m["best_val_loss"] for m in runs_of(study, label).values()]
    return sum(values) / len(values) if values else math.inf


def best_length(study: Study, labels: list[str]) -> str:
    """Of these, the one with the lowest mean of the best validation losses."""
    return min(labels, key=lambda label: loss_of(study, label))


def together(study: Study, label: str, metric: str) -> str:
    """What the runs of a point are worth as one: of all seeds there is one number."""
    for run in study["runs"]:
        if is_together(run, label) and metric in run["metrics"]:
            return f"{run['metrics'][metric]:.3f}"
    return "–"


def is_together(run: dict[str, Any], label: str) -> bool:
    return bool(run["label"] == label and run["state"] == "ensemble")


def crossover(epochs: list[float], found: list[Any]) -> str:
    """Where the difference falls below 0, and from where to where its interval has 0 in it."""
    at, low, high = (crossing(epochs, found, key) for key in ("difference", "low", "high"))
    if at is None:
        return "none seen"
    beyond = f"beyond {epochs[-1]:.0f}"
    return f"{at:.0f} [{low or epochs[0]:.0f}, {beyond if high is None else f'{high:.0f}'}]"


def crossing(epochs: list[float], found: list[Any], key: str) -> float | None:
    """Where a value first falls below 0, on a logarithmic scale between two sizes."""
    for i in range(1, len(epochs)):
        if found[i - 1] is None or found[i] is None:
            continue
        a, b = found[i - 1][key], found[i][key]
        if a > 0 >= b:
            share = a / (a - b)
            return math.exp((1 - share) * math.log(epochs[i - 1]) + share * math.log(epochs[i]))
    return None


def save(name: str, svg: str) -> None:
    svg = re.sub(r'<g class="tips">.*</g>', "", svg)  # pictures of a page get no pointer
    for variable, color in LIGHT.items():
        svg = svg.replace(variable, color)
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'  # for pages that are dark
    svg = re.sub(r"(<svg[^>]*>)", rf"\1{paper}", svg, count=1)
    (DOCS / f"{name}.svg").write_text(svg + "\n")
