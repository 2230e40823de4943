"""What a run or study left behind, read with care: a damaged file is a note, not an end."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlite.config import strict_yaml
from gptlite.errors import ConfigError

SAMPLES = 40
"""Read at most, spread over the run, the first and the last among them."""
LONGEST_SAMPLE = 1 << 16
"""Characters of a sample that are read."""
SAMPLE_NAME = re.compile(r"step-([0-9]+)\.txt")
LARGEST = 1 << 26
"""Bytes of a file that is read."""
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)
"""What comes of numbers that are not what they should be."""

Row = dict[str, Any]
"""A line of metrics.jsonl."""
INTERVAL = {"value", "low", "high"}
"""Keys of a number with its 95 % interval; one that is withheld has a `reason`, too."""


@dataclass
class RunFiles:
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Of metrics.jsonl, in order."""
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest result of each suite on the validation split."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """Steps and what the run wrote at them, in order."""
    n_samples: int = 0
    """Written; where they are more than SAMPLES not all are read."""
    look: dict[str, Any] = field(default_factory=dict)
    """What dropout does to one text, where it was looked at."""
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[dict[str, Any]]:
        sites = self.plan.get("dropout")
        known = sites if isinstance(sites, list) else []
        return [site for site in known if isinstance(site, dict) and "site" in site]

    @property
    def evaluations(self) -> list[Row]:
        return evaluations(self.rows)

    @property
    def best(self) -> Row | None:
        return best_evaluation(self.rows)

    @property
    def epochs_per_step(self) -> float | None:
        last = self.rows[-1] if self.rows else {}
        epoch, step = number(last.get("epoch")), number(last.get("step"))
        return epoch / step if epoch and step else None


def evaluations(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a validation loss."""
    return [row for row in rows if number(row.get("val/loss")) is not None]


def best_evaluation(rows: Iterable[Row]) -> Row | None:
    """The row with the lowest validation loss."""
    return min(evaluations(rows), key=lambda row: float(row["val/loss"]), default=None)


def generalisation_gap(row: Row) -> float | None:
    """The loss on validation text minus that on training text, in nats, dropout off on both."""
    train, val = number(row.get("train/loss_dropout_off")), number(row.get("val/loss"))
    return None if train is None or val is None else val - train


def read_run(directory: Path) -> RunFiles:
    run = RunFiles(directory.resolve().name)
    run.config_text = read_text(directory / "config.yaml", run.notes)
    try:
        run.config = strict_yaml.parse(run.config_text, "config.yaml").values
    except ConfigError as error:
        run.notes += error.problems
    run.plan = read_json(directory / "plan.json", run.notes)
    run.environment = read_json(directory / "env.json", run.notes)
    run.rows = read_rows(directory / "metrics.jsonl", run.notes)
    run.evals = read_evals(directory / "eval", run.notes)
    if (directory / "look.json").is_file():
        run.look = read_json(directory / "look.json", run.notes)
    samples = sorted(sample_files(directory / "samples"))
    run.n_samples = len(samples)
    for place in spread(len(samples), SAMPLES):
        step, path = samples[place]
        run.samples.append((step, read_text(path, run.notes)[:LONGEST_SAMPLE]))
    return run


def sample_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Every sample with its step."""
    for path in folder.glob("step-*.txt"):
        if name := SAMPLE_NAME.fullmatch(path.name):
            yield int(name[1]), path


def spread(n: int, most: int) -> list[int]:
    """At most so many of n places, evenly spaced, the first and the last among them."""
    return list(range(n)) if n <= most else [i * (n - 1) // (most - 1) for i in range(most)]


def read_study_results(directory: Path) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    return read_json(directory / "study.json", notes), notes


def read_text(path: Path, notes: list[str]) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST).decode(errors="replace")
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return ""


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = read_text(path, notes)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name}: damaged")
    return {}


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """The whole rows of metrics.jsonl; a run at work, or killed, may have left half a line."""
    found = [parse_row(line) for line in read_text(path, notes).splitlines()]
    rows = [row for row in found if row is not None]
    if len(rows) < len(found):
        notes.append(f"{path.name}: {len(found) - len(rows)} damaged lines left out")
    return rows


def parse_row(line: str) -> Row | None:
    """A line of metrics.jsonl; None if it is not a whole row."""
    try:
        row: Row = json.loads(line)
        return row if type(row["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_evals(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-val-step-????????.json"), key=lambda path: path.stem[-8:]):
        result = read_json(path, notes)
        if result:
            found[path.name.partition("-val-step-")[0]] = result
    return found


def format_cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.4f}" if 0.001 <= abs(value) < 1000 else f"{value:.4g}"
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def format_difference(value: float) -> str:
    """With its sign; a zero has a plus."""
    return f"{round(value, 4) + 0.0:+.4f}"


def number(value: Any) -> float | None:
    """A finite number, or None: a log may have a null where a loss was not finite."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and abs(value) <= sys.float_info.max else None


def scalars(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted name, a number with its interval as one; lists are left out."""
    for name, value in result.items():
        if isinstance(value, dict) and not set(value) >= INTERVAL:
            yield from scalars(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value
