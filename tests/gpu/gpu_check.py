"""What has to be shown on a GPU, in eight minutes on one card, without a network.

    scripts/gpu_check [CHECK ...] [--text tinyshakespeare.txt]

Each check runs in a process of its own and within its own time: one that fails, hangs or loses its
GPU is reported, and the others go on. What was found goes into docs/gpu.md, between the marks of
each check. Exit code 0: nothing failed; 1: a check failed; 2: there is no GPU.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_checks import (
    check_commands,
    check_deterministic,
    check_masks,
    check_precision,
    check_resume,
)
from gpu_runs import Failed, Place, Row, Skipped, Steps
from gpu_speed import (
    check_compile,
    check_dropout,
    check_evaluation,
    check_gpt2,
    check_memory,
    check_shakespeare,
)

from gptlite.machine import let_waiting_threads_sleep

DOCS = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
MINUTES = 8.0
SECONDS_TO_END = 3
"""What a check that watches its time leaves of it, to say what it has found."""
SMALL_STRETCH = 4
"""By how much all times are longer in the reduced size, which is for CPUs, perhaps busy ones."""


class Check(NamedTuple):
    steps: Callable[[Place], Steps]
    seconds: int
    """The time it may take, the start of its process included."""
    environment: dict[str, str] = {}


CHECKS = {
    "masks": Check(check_masks, 40),
    "precision": Check(check_precision, 40),
    "resume": Check(check_resume, 30),
    # cuBLAS repeats its sums only with a workspace of this kind, and reads it when it starts.
    "deterministic": Check(check_deterministic, 30, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "commands": Check(check_commands, 35),
    "compile": Check(check_compile, 60),
    "memory": Check(check_memory, 60),
    "evaluation": Check(check_evaluation, 25),
    "dropout": Check(check_dropout, 60),
    "gpt2": Check(check_gpt2, 75),
    "shakespeare": Check(check_shakespeare, 200),
}


class Result(NamedTuple):
    name: str
    verdict: str
    """kept, skipped or FAILED."""
    why: str
    rows: list[Row]
    seconds: float


def run_alone(name: str, place: Place, findings: Path) -> None:
    """The other side of `attempt`: one check, its lines written as they come."""
    with findings.open("a") as file:

        def tell(**line: object) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        steps = CHECKS[name].steps(place)
        try:
            while True:
                tell(row=next(steps))
        except StopIteration as end:
            tell(verdict="kept", why=end.value)
        except Skipped as why:
            tell(verdict="skipped", why=str(why))
        except Failed as why:
            tell(verdict="FAILED", why=str(why))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            tell(verdict="FAILED", why=f"{type(error).__name__}: {first}")


def attempt(name: str, command: list[str], folder: Path, seconds: float) -> Result:
    """A check in a process of its own, whose group is ended when its time is over."""
    findings, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    began, late = time.monotonic(), False
    environment = {**os.environ, "CI": "true", **CHECKS[name].environment}
    environment |= {"OMP_NUM_THREADS": "1"} if "--small" in command else {}
    with log.open("w") as file:
        options = {"stdout": file, "stderr": file, "start_new_session": True}
        process = subprocess.Popen([*command, str(findings)], env=environment, **options)  # type: ignore[call-overload]
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):  # the compiler's helpers, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = findings.read_text().splitlines() if findings.is_file() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    rows = [tuple(line["row"]) for line in told if "row" in line]
    verdict, why = "FAILED", f"not done in {seconds:.0f} s"
    if told and "verdict" in told[-1]:
        verdict, why = told[-1]["verdict"], told[-1]["why"]
    elif not late:
        why = f"its process ended with {process.returncode}"
    if verdict == "FAILED":
        print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
    return Result(name, verdict, why, rows, time.monotonic() - began)


def format_table(rows: list[Row]) -> list[str]:
    """Markdown; the first row names the columns."""
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def describe_machine(place: Place) -> str:
    name = torch.cuda.get_device_name(place.device) if place.on_gpu else "a CPU"
    cuda = f", CUDA {torch.version.cuda}" if place.on_gpu else ""
    return f"{datetime.date.today()}, {name}{cuda}, torch {torch.__version__}"


def replace_section(text: str, name: str, lines: list[str]) -> str:
    """The text with these lines between the marks of a section."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(marks[0])
    _, after = rest.split(marks[1])
    return "\n".join([before + marks[0], *lines, marks[1] + after])


def write_page(page: Path, stamp: str, results: list[Result]) -> None:
    """What was found, between the marks of docs/gpu.md; sections of checks left out stay."""
    text = DOCS.read_text() if not page.is_file() else page.read_text()
    for one in results:
        lines = [f"{stamp}: **{one.verdict}**: {one.why}", "", *format_table(one.rows)]
        text = replace_section(text, one.name, lines)
    rows: list[Row] = [("check", "verdict", "seconds", "found")]
    rows += [(one.name, one.verdict, f"{one.seconds:.0f}", one.why) for one in results]
    page.write_text(replace_section(text, "summary", [f"{stamp}:", "", *format_table(rows)]))


def run_all(options: argparse.Namespace, place: Place) -> list[Result]:
    """Every check that was asked for, one after the other, while there is time."""
    results = []
    command = [sys.executable, __file__, "--device", place.device]
    command += ["--small"] if place.small else []
    command += ["--text", str(place.text)] if place.text else []
    for name in options.check or CHECKS:
        seconds = min(CHECKS[name].seconds * options.stretch, place.seconds_left())
        if seconds < 5:
            results.append(Result(name, "skipped", "no time was left", [], 0.0))
            continue
        until = time.monotonic() + seconds - SECONDS_TO_END  # a clock that processes share
        asked = [*command, "--until", f"{until:.1f}", "--folder", str(place.folder)]
        result = attempt(name, [*asked, name, "--alone"], place.folder, seconds)
        results.append(result)
        print(f"\n{name}: {result.verdict}: {result.why} ({result.seconds:.0f} s)", flush=True)
        print("\n".join(format_table(result.rows)), flush=True)
    return results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("check", nargs="*", choices=[*CHECKS, []])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu to try the script")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in minutes")
    parser.add_argument("--text", type=Path, help="tinyshakespeare, for its recipe")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all checks together")
    parser.add_argument("--out", type=Path, help="page to write; default on a GPU: docs/gpu.md")
    for hidden in ("--alone", "--folder", "--until"):  # between `attempt` and `run_alone`
        kind = float if hidden == "--until" else Path
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.text and not options.text.is_file():
        parser.error(f"--text: {options.text}: no such file")
    options.stretch = SMALL_STRETCH if options.small else 1
    return options


def main() -> int:
    options = parse_options()
    let_waiting_threads_sleep()  # for the checks; this process computes nothing
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_check: no CUDA GPU that torch can use; --device cpu --small tries the script")
        return 2
    text = options.text.resolve() if options.text else None
    if options.alone:
        name = options.check[0]
        place = Place(name, options.device, options.small, text, options.folder, options.until)
        run_alone(name, place, options.alone)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ends_at = time.monotonic() + 60 * options.minutes * options.stretch
        place = Place("all", options.device, options.small, text, Path(folder), ends_at)
        results = run_all(options, place)
    stamp = describe_machine(place) + (", in a reduced size" if place.small else "")
    if page := options.out or (DOCS if place.on_gpu and not place.small else None):
        write_page(page, stamp, results)
        print(f"\nwritten to {page}")
    return 1 if any(one.verdict == "FAILED" for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
