"""Whether `gptlite train --data FILE --minutes M` takes M minutes; a part of bench.py."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_peers import LESSER, row

ASKED = (1, 2, 5)
"""Minutes."""


def take_minutes(minutes: int, text: Path, settings: dict[str, str], folder: Path) -> list[str]:
    """The cells of a row: what was asked, what it took, and what was planned and came of it."""
    args = [sys.executable, "-m", "gptlite", "train", "--data", str(text), "--minutes"]
    args += [str(minutes), "--out-dir", str(folder / "run")]
    args += ["--set", f"data.cache_dir={folder / 'cache'}"]
    environment = {**os.environ, **settings, "CI": "true"}
    began = time.perf_counter()
    subprocess.run(args, check=True, capture_output=True, env=environment)
    took = time.perf_counter() - began
    recipe = (folder / "run" / "recipe.yaml").read_text()
    planned = re.search(r"timed at ([\d.e+]+) ms", recipe)
    model = re.search(r"n_layer: \d+  # (\S+) parameters", recipe)
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert planned is not None
    assert model is not None
    pace = 1e3 * last["elapsed_seconds"] / last["step"]
    late = f"{took / (60 * minutes) - 1:+.1%}"
    shown = f"{float(planned[1]):.1f}", f"{pace:.1f}"
    loss = f"{last['val/bits_per_byte']:.3f}"
    return [str(minutes), f"{took:.1f}", late, model[1], str(last["step"]), *shown, loss]


def bench_minutes(options: argparse.Namespace) -> Iterator[str]:
    """Whole commands, from their start until the process is gone, nothing cached."""
    capability = torch.backends.cpu.get_cpu_capability()
    settings = {capability: dict[str, str]()}
    if capability.startswith("AVX512"):
        settings["AVX2, emulated"] = LESSER
    head = ("instructions", "minutes asked", "seconds taken", "off by", "parameters", "updates")
    yield row((*head, "ms planned", "ms in the run", "bits per byte"))
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for minutes in ASKED:
        for name, setting in settings.items():
            with tempfile.TemporaryDirectory() as folder:
                cells = take_minutes(minutes, options.text, setting, Path(folder))
            yield row((name, *cells))
