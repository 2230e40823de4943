"""Run the studies of docs/dropout-study.md again and write their numbers and figures.

    python scripts/reproduce_dropout_study.py                 # everything; goes on after a kill
    python scripts/reproduce_dropout_study.py --quick         # the headlines, 3 seeds
    python scripts/reproduce_dropout_study.py --only-tables   # from the numbers there are

Tables go between the marks in docs/dropout-study.md, figures and every run's numbers beside it.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from study_cells import DOCS, Study, is_empty
from study_tables import WRITERS

from gptlite.measure.units import ABLATIONS
from gptlite.studies.config import load_study

ROOT = Path(__file__).resolve().parents[1]
QUICK = "quick"


def write_tables(folder: Path) -> None:
    """The tables of every study that has results."""
    DOCS.mkdir(exist_ok=True)
    page = ROOT / "docs" / "dropout-study.md"
    text = page.read_text()
    for name, make in WRITERS.items():
        study = read_results(name, folder)
        if study is None:
            continue
        lines = "\n\n".join(part for part in make(study) if not is_empty(part))
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{lines}\n\n{end}{rest.partition(end)[2]}"
        rows = [json.dumps(run) for run in study["runs"]]
        (DOCS / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    page.write_text(text)


def read_results(name: str, folder: Path) -> Study | None:
    """What a study has found: as it ran here, or of the numbers beside the page."""
    if (path := folder / name / "study.json").is_file():
        found: Study = json.loads(path.read_text())
        runs = [{**shorten(run), **read_curves(folder / name, run)} for run in found["runs"]]
        return {**found, "runs": [*runs, *map(shorten, ensembles_of(found))]}
    if not (path := DOCS / f"{name}.jsonl").is_file():
        return None
    config = load_study(ROOT / "configs" / "studies" / f"{name}.yaml").config
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    points = [{"label": label} for label in dict.fromkeys(run["label"] for run in runs)]
    return {"axes": config.axes, "points": points, "runs": runs}


def ensembles_of(study: Study) -> list[dict[str, Any]]:
    """What the runs of each point are worth as one, as a run of no seed."""
    found = []
    for point in study["points"]:
        metrics = {
            name: value["mean"]
            for name, value in point.get("metrics", {}).items()
            if name.startswith("ensemble.") and value["mean"] is not None
        }
        if metrics:
            found.append({"label": point["label"], "seed": None, "state": "ensemble"})
            found[-1]["metrics"] = metrics
    return found


def shorten(run: dict[str, Any]) -> dict[str, Any]:
    """A run as it is published, and as tables are made from it: without what is of this machine
    alone, to six digits."""
    metrics = {name: float(f"{value:.6g}") for name, value in run.get("metrics", {}).items()}
    return {**{key: run[key] for key in ("label", "seed", "state")}, "metrics": metrics}


def read_curves(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What was left of a run of a study at each share of removed units, if that was measured."""
    results = sorted((folder / "runs" / run["name"] / "eval").glob("knockout-*.json"))
    if not results:
        return {}
    found = json.loads(results[0].read_text())
    curves: dict[str, Any] = {"fractions": found["fractions"]}
    for kind, ablation in itertools.product(found["kinds"], ABLATIONS):
        curve = found["kinds"][kind][ablation]["random"]
        curves[f"{kind}.{ablation}"] = {
            name: [round(value, 4) for value in curve[name]]
            for name in ("retained", "contribution_left")
        }
    return {"curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("studies"))
    parser.add_argument("--only-tables", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the headlines alone: half an hour")
    options = parser.parse_args()
    for name in [QUICK] if options.quick else sorted(WRITERS.keys() - {QUICK}):
        if not options.only_tables:
            file = ROOT / "configs" / "studies" / f"{name}.yaml"
            command = [sys.executable, "-m", "gptlite", "study", str(file)]
            place = ["--out-dir", str(options.folder / name), "--workers", str(options.workers)]
            subprocess.run([*command, *place], check=True)
    write_tables(options.folder)


if __name__ == "__main__":
    main()
