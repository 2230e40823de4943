"""A pair of small models for those who have no run: the tutorial's, with and without dropout."""

import json
from collections.abc import Callable
from pathlib import Path

from gptlite.config.reader import read_layers
from gptlite.config.run import RunConfig
from gptlite.core import loops
from gptlite.runs.directory import has_run
from gptlite.runs.origin import complete_run
from gptlite.runs.start import train

RATES = {"with-dropout": 0.2, "without-dropout": 0.0}
"""Of the runs, by the names of their directories."""
LINE = "The sun was shining on"
"""Of the text, to begin with."""
STEPS = 300
"""Enough for the model without dropout to know much of the text by heart."""


def train_demo(directory: Path, say: Callable[[str], None], *, steps: int = STEPS) -> list[Path]:
    """The directories of both runs, below this one. What is trained there already is kept, what
    was interrupted goes on; `say` is told which model is at work. Raises UserError."""
    found = []
    for name, rate in RATES.items():
        path = directory / name
        found.append(path)
        if is_finished(path):
            say(f"{name}: there already")
            continue
        say(f"{name}: training a small model, {steps} updates, dropout {rate:g}")
        summary = train(demo_run(directory, rate, steps), path, resume=has_run(path))
        say(f"{name}: validation loss {summary['val_loss']:.2f}")
    return found


def is_finished(path: Path) -> bool:
    return has_run(path) and (path / "summary.json").is_file()


def demo_run(directory: Path, rate: float, steps: int) -> RunConfig:
    """Nothing is left to `auto` that would be timed: a machine trains the same pair each time. One
    thread, as the matrices are small and two wait for each other where anything else is at work.
    """
    attention = "math" if loops.library() is None else "fused"
    values = {
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "attention": attention,
        "data.cache_dir": str(directory.absolute() / "cache"),
        "dropout.rate": rate,
        "optim.warmup_steps": steps // 15,
        "train.max_steps": steps,
        "train.eval_interval": max(1, steps // 10),
        "train.threads": 1,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return complete_run(read_layers(["tutorial"], overrides))
