"""gptlite: small GPTs trained end to end from YAML, with dropout as a named, measured thing.

    run = gptlite.load("runs/quickstart")      # or "latest", a checkpoint, a Hugging Face directory
    run = gptlite.train({"data": {"source": "my.txt"}, "train": {"epochs": 3}}, out_dir="runs/mine")

What a run can be asked is in runs/opened.py. torch is loaded by these calls, not by the import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gptlite.runs.opened import Run

__version__ = "0.1.0"
__all__ = ["load", "train"]


def load(where: str | Path = "latest", checkpoint: str = "best") -> Run:
    """A trained run: a run directory, `latest` under runs/, a checkpoint of a run, or a directory
    of Hugging Face's. Raises ConfigError and CheckpointError of gptlite.errors."""
    from gptlite.runs import opened

    return opened.load(where, checkpoint)


def train(
    config: Mapping[str, Any] | str | Path | Sequence[str | Path],
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
) -> Run:
    """Train what a config says (a mapping of sections, a file, a shipped name, or several files)
    in `out_dir`, the config's, or a new directory under runs/; `resume` goes on in it. Returns the
    run. Raises ConfigError and DataError, and Stopped after Ctrl-C with the checkpoint saved."""
    from gptlite.runs import opened

    return opened.train_run(config, out_dir, resume=resume)
