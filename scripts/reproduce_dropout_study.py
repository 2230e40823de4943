"""Run the studies of docs/dropout-study.md again and write their numbers and figures.

    python scripts/reproduce_dropout_study.py                 # everything; goes on after a kill
    python scripts/reproduce_dropout_study.py --only-tables   # from the numbers there are

Tables go between the marks in docs/dropout-study.md, figures and every run's numbers beside it.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlite.report import charts
from gptlite.report.charts import Line
from gptlite.studies import comparison
from gptlite.studies.config import load_study

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "dropout-study"
STUDIES = (
    *("rates", "python_docs", "redundancy", "placement", "weights_or_context"),
    *("annealed", "decay"),
)
KINDS = ("head", "neuron", "layer", "dimension")
LIGHT = {
    **{"var(--ink)": "#1d2433", "var(--line)": "#dfe1e6", "var(--c1)": "#2f62b8"},
    **{"var(--c2)": "#c2571a", "var(--c3)": "#2b8051", "var(--c4)": "#8a4aa8"},
    **{"var(--c5)": "#9a7400", "var(--c6)": "#7b8190"},
}
Study = dict[str, Any]


def area(kind: str, ablation: str = "zero", prefix: str = "", what: str = "retained_area") -> str:
    return f"{prefix}knockout.kinds.{kind}.{ablation}.random.{what}"


def runs_of(study: Study, label: str) -> dict[int, dict[str, float]]:
    found = [run for run in study["runs"] if run["label"] == label and run["state"] == "done"]
    return {run["seed"]: run["metrics"] for run in found}


def mean(study: Study, label: str, metric: str) -> str:
    """Mean ± half of the 95 % interval over seeds."""
    values = [m[metric] for m in runs_of(study, label).values() if metric in m]
    if not values:
        return "–"
    over = comparison.mean_over_seeds(values)
    half = "" if over["low"] is None else f" ± {over['high'] - over['mean']:.3f}"
    return f"{over['mean']:.3f}{half}"


def difference(study: Study, label: str, other: str, metric: str, other_metric: str = "") -> Any:
    """The paired difference to another point, perhaps by another metric."""
    mine, theirs = runs_of(study, label), runs_of(study, other)
    name = other_metric or metric
    seeds = [s for s in mine if s in theirs and metric in mine[s] and name in theirs[s]]
    if not seeds:
        return None
    found = comparison.paired_difference(
        [mine[s][metric] for s in seeds], [theirs[s][name] for s in seeds]
    )
    return {**found, "metric": metric}


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
        series.append(Line(f"rate {rate:g}", [n for n, _ in known], y, low, high))
    caption = "Best validation loss minus that of rate 0 with the same seed"
    yield f"{caption}, and the epochs at which it falls below 0:\n\n" + table(
        [*head, "crossover"], rows
    )
    save(name, charts.lines(caption, series, "epochs over the text (log)", "nats", log_x=True))
    yield f"![{caption}](dropout-study/{name}.svg)"


def crossover(epochs: list[float], found: list[Any]) -> str:
    """Where the difference first falls below 0, on a logarithmic scale between two sizes."""
    for i in range(1, len(epochs)):
        if found[i - 1] is None or found[i] is None:
            continue
        a, b = found[i - 1]["difference"], found[i]["difference"]
        if a > 0 >= b:
            share = a / (a - b)
            between = (1 - share) * math.log(epochs[i - 1]) + share * math.log(epochs[i])
            return f"{math.exp(between):.0f}"
    return "none seen"


def redundancy(study: Study) -> Iterator[str]:
    labels = [point["label"] for point in study["points"]]
    rows = [
        [
            label,
            *(mean(study, label, m) for m in ("best_val_loss", "val_loss", "loss.dropout_penalty")),
        ]
        + [mean(study, label, m) for m in ("calibration.ece", "last.calibration.ece")]
        for label in labels
    ]
    head = ["", "best loss", "last loss", "penalty", "ECE, best step", "ECE, last step"]
    yield table(head, rows)
    for ablation in ("zero", "mean"):
        rows = [
            [f"{label}, {step or 'best'}"]
            + [
                mean(study, label, area(kind, ablation, f"{step}." if step else ""))
                for kind in KINDS
            ]
            for step in ("", "last")
            for label in labels
        ]
        yield f"Retained area, random removal to {ablation}:\n\n" + table(["", *KINDS], rows)
    yield from controls(study)
    rows = []
    for label in labels:
        row = [label]
        for kind in ("head", "neuron"):
            base = f"importance.kinds.{kind}.zero."
            row += [mean(study, label, base + m) for m in ("gini", "effective_share", "backup.8")]
            row.append(mean(study, label, area(kind, what="half_at")))
        rows.append(row)
    head = [
        f"{k} {m}"
        for k in ("head", "neuron")
        for m in ("Gini", "eff. share", "backup 8", "half at")
    ]
    yield "Importance, zero ablation, best step:\n\n" + table(["", *head], rows)
    rows = [[label, *(mean(study, label, f"mc-dropout.{m}") for m in MC)] for label in labels]
    yield "Averaging 20 passes with dropout on:\n\n" + table(["", *MC], rows)


MC = ("deterministic_loss", "averaged_minus_deterministic", "mutual_information")


def controls(study: Study) -> Iterator[str]:
    """Dropout's best step against the three controls, in pairs of one seed."""
    for dropout in ("dropout 0.1", "dropout 0.2", "dropout 0.3"):
        rows = []
        for name, other, prefix in controls_of(study, dropout):
            row = [name]
            for ablation in ("zero", "mean"):
                for kind in KINDS:
                    metric = area(kind, ablation)
                    row.append(difference(study, dropout, other, metric, prefix + metric))
            rows.append(row)
        head = [f"{kind}, {ablation}" for ablation in ("zero", "mean") for kind in KINDS]
        yield f"Retained area of {dropout} (best step) minus that of:\n\n" + table(
            ["", *head], rows
        )


def controls_of(study: Study, dropout: str) -> Iterator[tuple[str, str, str]]:
    decays = [
        p["label"] for p in study["points"] if re.fullmatch(r"weight decay [0-9.]+", p["label"])
    ]

    def loss(label: str) -> float:
        values = [m["best_val_loss"] for m in runs_of(study, label).values()]
        return sum(values) / len(values)

    nearest = min(["none", *decays], key=lambda label: abs(loss(label) - loss(dropout)))
    yield "no dropout, last step", "none", "last."
    yield "no dropout, best step", "none", ""
    yield f"{nearest} (nearest in loss: {loss(nearest) - loss(dropout):+.3f})", nearest, ""
    for label in decays:
        if label != nearest:
            yield f"{label} (loss {loss(label) - loss(dropout):+.3f})", label, ""


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
    for ablation in ("zero", "mean"):
        rows = [
            [label, *(difference(study, label, "none", area(k, ablation)) for k in KINDS)]
            for label in labels[1:]
        ]
        yield f"Retained area minus that of none, removal to {ablation}:\n\n" + table(
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


def best_length(study: Study, labels: list[str]) -> str:
    """Of these, the one with the lowest mean of the best validation losses."""

    def loss(label: str) -> float:
        values = [m["best_val_loss"] for m in runs_of(study, label).values()]
        return sum(values) / len(values) if values else math.inf

    return min(labels, key=loss)


def decay(study: Study) -> Iterator[str]:
    """Weight decay by dropout rate, each against neither and against the best decay alone."""
    decays, rates = study["axes"]["optim.weight_decay"], study["axes"]["dropout.rate"]
    for size in study["axes"]["data.train_tokens"]:

        def label(amount: Any, rate: Any, size: Any = size) -> str:
            return f"train_tokens={size}, weight_decay={amount:g}, rate={rate:g}"

        head = ["weight decay", *(f"rate {rate:g}" for rate in rates)]
        rows = [
            [f"{amount:g}", *(mean(study, label(amount, rate), "loss.loss") for rate in rates)]
            for amount in decays
        ]
        yield f"Test loss of {size:,} tokens at the best step, nats:\n\n{table(head, rows)}"
        rows = [
            [
                f"{amount:g}",
                *(
                    difference(study, label(amount, rate), label(amount, 0), "loss.loss")
                    for rate in rates[1:]
                ),
                difference(study, label(amount, 0), label(decays[0], 0), "loss.loss")
                if amount != decays[0]
                else "–",
            ]
            for amount in decays
        ]
        head = ["weight decay", *(f"rate {rate:g} minus 0" for rate in rates[1:])]
        head.append(f"rate 0 minus that of decay {decays[0]:g}")
        yield f"What a rate adds to each decay, {size:,} tokens:\n\n{table(head, rows)}"


def save(name: str, svg: str) -> None:
    for variable, color in LIGHT.items():
        svg = svg.replace(variable, color)
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'  # for pages that are dark
    svg = re.sub(r"(<svg[^>]*>)", rf"\1{paper}", svg, count=1)
    (DOCS / f"{name}.svg").write_text(svg)


WRITERS = {
    "rates": lambda study: sweep(study, "rates"),
    "python_docs": lambda study: sweep(study, "python_docs"),
    "redundancy": redundancy,
    "placement": placement,
    "weights_or_context": weights_or_context,
    "annealed": annealed,
    "decay": decay,
}


def write_tables(folder: Path) -> None:
    """The tables of every study that has results."""
    DOCS.mkdir(exist_ok=True)
    page = ROOT / "docs" / "dropout-study.md"
    text = page.read_text()
    for name, make in WRITERS.items():
        study = read_results(name, folder)
        if study is None:
            continue
        lines = "\n\n".join(make(study))
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{lines}\n\n{end}{rest.partition(end)[2]}"
        rows = [json.dumps(shorten(run)) for run in study["runs"]]
        (DOCS / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    page.write_text(text)


def read_results(name: str, folder: Path) -> Study | None:
    """What a study has found: as it ran here, or of the numbers beside the page."""
    if (path := folder / name / "study.json").is_file():
        found: Study = json.loads(path.read_text())
        return found
    if not (path := DOCS / f"{name}.jsonl").is_file():
        return None
    config = load_study(ROOT / "configs" / "studies" / f"{name}.yaml").config
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    points = [{"label": label} for label in dict.fromkeys(run["label"] for run in runs)]
    return {"axes": config.axes, "points": points, "runs": runs}


def shorten(run: dict[str, Any]) -> dict[str, Any]:
    """A run without what is of this machine alone, to six digits."""
    metrics = {name: float(f"{value:.6g}") for name, value in run.get("metrics", {}).items()}
    return {**{key: run[key] for key in ("label", "seed", "state")}, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("studies"))
    parser.add_argument("--only-tables", action="store_true")
    options = parser.parse_args()
    for name in STUDIES:
        if not options.only_tables:
            file = ROOT / "configs" / "studies" / f"{name}.yaml"
            command = [sys.executable, "-m", "gptlite", "study", str(file)]
            place = ["--out-dir", str(options.folder / name), "--workers", str(options.workers)]
            subprocess.run([*command, *place], check=True)
    write_tables(options.folder)


if __name__ == "__main__":
    main()
