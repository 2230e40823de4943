"""What runs are doing, read from their directories without touching them, for the page's Watch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptlite.report.verdict import verdict
from gptlite.runs.directory import RUNS, has_run, state_of
from gptlite.runs.results import DAMAGED, Row, RunFiles, number, read_run, read_text

MOST_POINTS = 800
"""Of a curve; evaluations are all kept."""
CURVES = ("train/loss", "train/loss_dropout_off", "val/loss", "val/bits_per_byte")
MORE_CURVES = ("lr", "tokens_per_second")


class Watch:
    """Runs under runs/ and those that are named; what has not changed is not read again."""

    def __init__(self, named: Iterable[Path]) -> None:
        self.named = list(named)
        self.known: dict[Path, tuple[Any, RunFiles]] = {}

    def directories(self) -> dict[str, Path]:
        """By names that tell them apart."""
        found = [path for path in sorted(RUNS.glob("*")) if has_run(path)]
        paths = {path.resolve(): path for path in (*found, *self.named) if has_run(path)}
        named: dict[str, Path] = {}
        for path in paths:
            name = path.name
            if name in named:
                name = f"{path.parent.name}/{path.name}"
            named[name] = path
        return named

    def read(self, directory: Path) -> RunFiles:
        stamp = tuple(stamp_of(directory / name) for name in ("metrics.jsonl", "plan.json"))
        stamp = (*stamp, stamp_of(directory / "samples"))
        known = self.known.get(directory)
        if known is None or known[0] != stamp:
            known = self.known[directory] = stamp, read_run(directory)
        return known[1]

    def list_runs(self) -> dict[str, Any]:
        named = self.directories()
        self.known = {path: of for path, of in self.known.items() if path in named.values()}
        return {"runs": [self.summarise(name, path) for name, path in named.items()]}

    def summarise(self, name: str, directory: Path) -> dict[str, Any]:
        run, state = self.read(directory), state_of(directory)
        last: Row = run.rows[-1] if run.rows else {}
        step, elapsed = number(last.get("step")), number(last.get("elapsed_seconds"))
        max_steps = number(run.plan.get("steps"))
        left = None
        if state == "running" and step and elapsed and max_steps:
            left = elapsed / step * max(0.0, max_steps - step)
        best = run.best
        found = advice_of(run)
        return {
            "name": name,
            "state": state,
            "step": last.get("step"),
            "max_steps": run.plan.get("steps"),
            "elapsed_seconds": elapsed,
            "left_seconds": left,
            "tokens_per_second": number(last.get("tokens_per_second")),
            "best_loss": None if best is None else best["val/loss"],
            "best_step": None if best is None else best["step"],
            "verdict": None if found is None else found["title"],
            "tokenizer": tokenizer_of(run),
        }

    def describe(self, name: str) -> dict[str, Any] | None:
        """All that is shown of one run; None if there is no such run."""
        directory = self.directories().get(name)
        if directory is None:
            return None
        run = self.read(directory)
        names = dict.fromkeys(name for row in run.rows for name in row)
        curves = [name for name in names if name in (*CURVES, *MORE_CURVES)]
        curves += [name for name in names if name.startswith("dropout/")]
        rows = thin(run.rows)
        series = {name: [number(row.get(name)) for row in rows] for name in curves}
        return {
            **self.summarise(name, directory),
            "series": {"step": [row["step"] for row in rows], **series},
            "samples": samples_of(directory),
            "advice": advice_of(run),
            "config": run.config_text,
            "notes": run.notes,
        }


def tokenizer_of(run: RunFiles) -> str | None:
    """Losses of two runs are of the same tokens only where this is the same."""
    kind = (run.config.get("tokenizer") or {}).get("kind")
    size = run.plan.get("vocab_size")
    return kind if kind is None or size is None else f"{kind} {size}"


def stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def thin(rows: list[Row]) -> list[Row]:
    """At most about MOST_POINTS, the last one and all evaluations among them."""
    every = max(1, len(rows) // MOST_POINTS)
    last = len(rows) - 1
    return [
        row
        for at, row in enumerate(rows)
        if at % every == 0 or at == last or row.get("val/loss") is not None
    ]


def samples_of(directory: Path, most: int = 20) -> list[dict[str, Any]]:
    """The newest samples, in the order in which they came."""
    paths = sorted((directory / "samples").glob("step-*.txt"))[-most:]
    return [
        {"step": int(path.stem.removeprefix("step-")), "text": read_text(path, [])[:4000]}
        for path in paths
        if path.stem.removeprefix("step-").isdecimal()
    ]


def advice_of(run: RunFiles) -> dict[str, Any] | None:
    try:
        return verdict(run.rows, run.config, run.plan)._asdict()
    except DAMAGED:
        return None
