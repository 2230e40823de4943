"""A pair of small models for who has no run yet: one text, one seed, with dropout and without.

The text, demo.txt, is verse in the public domain: Lewis Carroll's "Jabberwocky" and "The Walrus and
the Carpenter" (1871) and "How doth the little crocodile" (1865), Edward Lear's "The Owl and the
Pussy-Cat" (1871) and William Blake's "The Tyger" (1794).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core import loops
from gptlite.runs.directory import has_run
from gptlite.runs.origin import complete_run
from gptlite.runs.start import train

TEXT = Path(__file__).parent / "demo.txt"
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
    plain: dict[str, Any] = {
        **{"device": "cpu", "dtype": "float32", "compile": False},
        "attention": "math" if loops.library() is None else "fused",
        "data": {"source": str(TEXT), "cache_dir": str(directory.absolute() / "cache")},
        "tokenizer": {"kind": "char"},
        "model": {
            **{"n_layer": 4, "n_head": 4, "n_embd": 64, "context_length": 64},
            **{"position": "rope", "bias": False},
        },
        "dropout": {"rate": rate},
        "optim": {
            **{"name": "muon", "lr": 4e-2, "min_lr": 0.0, "schedule": "linear"},
            "warmup_steps": steps // 15,
        },
        "train": {
            **{"max_steps": steps, "batch_size": 8, "eval_interval": max(1, steps // 10)},
            **{"early_stop": "never", "threads": 1},
        },
        "sample": {"temperature": 0.5},
    }
    return complete_run(Document(plain))
