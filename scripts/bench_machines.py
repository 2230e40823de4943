"""What depends on the machine more than on the model: dropout's cost, other programs, a compiler.

A part of bench.py, with the quickstart.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_dropout import SIX
from bench_peers import DROPOUT, SHAPES, Away, gptlite_update, ratio, row, time_in_turn

from gptlite import machine
from gptlite.config.reader import shipped_configs

WAITING: dict[str, dict[str, str]] = {
    "gptlite, alone at its start": {"GOMP_SPINCOUNT": str(machine.SPIN_ALONE)},
    "gptlite, others there at its start": {"GOMP_SPINCOUNT": str(machine.SPIN_BESIDE)},
    "libgomp's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""How threads wait for work, by the environment in which torch is loaded."""
FOR_GPUS = ("gpt2_124m", "shakespeare_char", "sort", "the_verdict")
"""Shipped configs of models for GPUs, or whose text has to be made first."""
UPDATES = 20


@contextmanager
def set_environment(values: dict[str, str]) -> Iterator[None]:
    """Inside, of the variables of WAITING just these."""
    names = {name for setting in WAITING.values() for name in setting}
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def bench_sites(options: argparse.Namespace) -> Iterator[str]:
    """A whole update with six sites at 0.2 against none, each in a process of its own."""
    none, six = {"preset": "none"}, {"preset": "none", "sites": dict.fromkeys(SIX, 0.2)}
    runs: dict[str, dict[str, Any]] = {
        "rate 0": {"dropout": none},
        "six sites at 0.2": {"dropout": six},
    }
    yield row(("shape", "update", "ms", "more than rate 0"))
    yield "|---|---|---:|---:|"
    for shape, sections in SHAPES.items():
        calls = 10 if shape.startswith("cpu") else 1
        todo = {
            name: Away(gptlite_update, sections, calls=calls, **top) for name, top in runs.items()
        }
        times = time_in_turn(todo, options.repeats)
        for name, seconds in times.items():
            more = f"{100 * (ratio(times, name, 'rate 0') - 1):+.1f} %"
            yield row(
                (shape.partition(":")[0], name, f"{1e3 * statistics.median(seconds):.1f}", more)
            )


def spin() -> None:
    while True:
        pass


@contextmanager
def other_programs(number: int) -> Iterator[None]:
    """So many processes that do nothing but work."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=spin, daemon=True) for _ in range(number)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def bench_busy(options: argparse.Namespace) -> Iterator[str]:
    """The "cpu" shape, float32, alone and beside one spinning process a core; interleaved."""
    shape, cores = next(iter(SHAPES.values())), machine.count_cores()
    tokens = shape["train"]["batch_size"] * shape["model"]["context_length"]
    todo = {}
    for name, setting in WAITING.items():
        with set_environment(setting):
            threads = 1 if setting.get("OMP_NUM_THREADS") else cores
            more = {"dropout": DROPOUT, "dtype": "float32", "threads": threads}
            todo[name] = Away(gptlite_update, shape, calls=10, **more)
    quiet = time_in_turn(todo, options.repeats, stop=False)
    with other_programs(cores):
        busy = time_in_turn(todo, options.repeats)
    yield row(("threads wait", "alone, tokens/s", "beside busy programs", "slowest turn", "share"))
    yield "|---|---:|---:|---:|---:|"
    for name in todo:
        alone, beside = (tokens / statistics.median(times[name]) for times in (quiet, busy))
        slowest = tokens / max(busy[name])
        cells = (f"{alone:,.0f}", f"{beside:,.0f}", f"{slowest:,.0f}", f"{beside / alone:.0%}")
        yield row((name, *cells))


def bench_compiler(options: argparse.Namespace) -> Iterator[str]:
    """Updates of each shipped config for CPUs, with and without a C compiler."""
    yield row(("config", "with, ms", "without, ms", "with / without"))
    yield "|---|---:|---:|---:|"
    for path in sorted(shipped_configs().glob("*.yaml")):
        if path.stem in FOR_GPUS:
            continue
        times: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(min(3, options.repeats)):
            for way, more in (("with", {}), ("without", {"CC": "none"})):
                times[way].append(update_seconds(path.stem, options, more))
        share = ratio(times, "with", "without")
        typical = (f"{1e3 * statistics.median(seconds):.1f}" for seconds in times.values())
        yield row((f"`{path.stem}`", *typical, f"{share:.2f}"))


def update_seconds(config: str, options: argparse.Namespace, more: dict[str, str]) -> float:
    """Of an update of a shipped config, by its metrics: from update 5 to the last."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        text = options.text if config != "names" else make_names(Path(folder))
        sets = {
            "data.source": text,
            "data.sha256": "null",
            "data.cache_dir": f"{folder}/cache",
            "train.max_steps": UPDATES,
            "train.epochs": "null",
            "optim.warmup_steps": 1,
            "train.log_interval": 5,
            "train.eval_interval": UPDATES,
            "train.eval_batches": 1,
            "sample.max_new_tokens": 1,
        }
        given = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        args = ["train", "--config", config, "--out-dir", f"{folder}/run", *given]
        environment = {**os.environ, **more}
        command = [sys.executable, "-m", "gptlite", *args]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first, last = rows[0], rows[-1]
    taken = last["elapsed_seconds"] - first["elapsed_seconds"]
    return float(taken / (last["step"] - first["step"]))


def make_names(folder: Path) -> Path:
    """A list of words of one line each, for the config that wants such."""
    path = folder / "names.txt"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(letters[n * k % 26] for k in range(1, 4 + n % 9)) for n in range(1, 4000)]
    path.write_text("\n".join(words))
    return path


def bench_quickstart(options: argparse.Namespace) -> Iterator[str]:
    """scripts/quickstart after its installation: train, eval, generate; nothing cached."""
    steps = {
        "train": ["train", "--config", "quickstart"],
        "eval": ["eval"],
        "generate": ["generate", "--prompt", "This module provides", "--max-new-tokens", "80"],
    }
    yield row(("turn", *steps, "all, s"))
    yield "|---|---:|---:|---:|---:|"
    for turn in range(min(3, options.repeats)):
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for args in steps.values():
                began = time.perf_counter()
                command = [sys.executable, "-m", "gptlite", *args]
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
                seconds.append(time.perf_counter() - began)
        yield row((str(turn + 1), *(f"{s:.1f}" for s in seconds), f"{sum(seconds):.1f}"))
