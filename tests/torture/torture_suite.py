"""What is promised of saving, resuming and bad files, tried many times with a seed; one table.

    .venv/bin/python scripts/torture.py [SECTION ...] [--short] [--seed N] [--write]

The long version takes most of an hour on two cores, the short one is part of the tests. --write
puts the table into docs/reliability.md. Exit code 1 if a promise was not kept.
"""

import argparse
import datetime
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torture_life import (
    measure_cost,
    read_while_saving,
    send_signals,
    start_two_runs,
    train_long,
)
from torture_runs import Outcome, Workplace, get_ready
from torture_saves import break_disk, kill_commands, kill_runs, lose_power, refuse_storage
from torture_state import change_pace, corrupt_files, diverge, resume_exactly

from gptlite import __version__

Section = Callable[[Workplace, random.Random, int], Iterator[Outcome]]
SECTIONS: dict[str, tuple[Section, int, int]] = {
    "kill": (kill_runs, 200, 5),
    "commands": (kill_commands, 20, 0),
    "power": (lose_power, 12, 4),
    "disk": (break_disk, 100, 3),
    "others": (refuse_storage, 20, 2),
    "exact": (resume_exactly, 72, 3),
    "cadence": (change_pace, 16, 2),
    "corruption": (corrupt_files, 3000, 300),
    "divergence": (diverge, 18, 3),
    "signals": (send_signals, 100, 3),
    "two-runs": (start_two_runs, 50, 2),
    "readers": (read_while_saving, 1000, 20),
    "soak": (train_long, 20_000, 0),
    "cost": (measure_cost, 1000, 0),
}
"""Each with its trials, and with those of the short version (0: left out)."""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def run_sections(names: list[str], short: bool, seed: int) -> Iterator[tuple[Outcome, float]]:
    """Every line of the table, with the seconds it took."""
    for name in names:
        section, *trials = SECTIONS[name]
        began = time.perf_counter()
        if not (n := trials[short]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                for outcome in section(Workplace(Path(folder) / name), random.Random(seed), n):
                    yield outcome, time.perf_counter() - began
                    began = time.perf_counter()
            except AssertionError as error:
                why = str(error).splitlines()[0] if str(error) else "an assertion"
                yield Outcome(name, n, f"broken: {why}", False), time.perf_counter() - began


def format_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_table(found: list[tuple[Outcome, float]], seed: int, command: str) -> list[str]:
    today = datetime.date.today().isoformat()
    lines = [
        f"`{command}`, {today}, seed {seed}, {platform.system()} {platform.machine()}, gptlite "
        f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "",
        format_row(("promise", "trials", "result", "kept", "seconds")),
        "|---|---:|---|---|---:|",
    ]
    for (promise, trials, result, kept), seconds in found:
        kept_or_not = "yes" if kept else "**no**"
        lines.append(format_row((promise, f"{trials:,}", result, kept_or_not, f"{seconds:.0f}")))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    get_ready()
    names, found = options.sections or [*SECTIONS], []
    for outcome, seconds in run_sections(names, options.short, options.seed):
        mark = "kept  " if outcome.kept else "BROKEN"
        print(f"{mark} {outcome.promise} x {outcome.trials}: {outcome.result}", flush=True)
        found.append((outcome, seconds))
    command = " ".join(["scripts/torture.py", *sys.argv[1:]]).replace(" --write", "")
    lines = format_table(found, options.seed, command)
    print("\n".join(lines))
    if options.write:
        text = DOCS.read_text()
        begin, end = "<!-- torture -->", "<!-- end of torture -->"
        before, rest = text.split(begin)
        DOCS.write_text("\n".join([before + begin, *lines, end + rest.split(end)[1]]))
    sys.exit(not all(outcome.kept for outcome, _ in found))
