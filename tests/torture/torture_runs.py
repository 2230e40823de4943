"""Tiny runs with dropout on, made and unmade in children of a process that has torch loaded.

A child runs the command as a terminal would; only its clock stands still, so that two runs that did
the same have written the same bytes.
"""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from gptlite import storage
from gptlite.cli.main import app
from gptlite.core import loops
from gptlite.core.weights import FILES
from gptlite.runs import checkpoint, session
from gptlite.runs.metrics import Meter

CLOCKS = ("elapsed_seconds", "tokens_per_second")
WORDS = "the of and to a in is it you that he was for on are with as his they be at one have this"
TINY: dict[str, Any] = {
    **{"device": "cpu", "dtype": "float32", "compile": False, "attention": "math"},
    "tokenizer": {"kind": "char"},
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16},
    "dropout": {"preset": "gpt2", "rate": 0.2},
    "optim": {"warmup_steps": 2, "lr": 0.01, "min_lr": 0.001},
    "train": {
        **{"max_steps": 60, "batch_size": 4, "micro_batch_size": 2, "threads": 1},
        **{"eval_interval": 10, "eval_batches": 2, "save_interval": 5, "log_interval": 1},
        **{"early_stop": "never", "recompute": False},
    },
    "sample": {"max_new_tokens": 4, "interval": 20},
}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        inside = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if inside else value
    return out


def get_ready() -> None:
    """Before the first child: one thread, the compiled loops in memory, no pauses."""
    torch.set_num_threads(1)
    loops.library()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports a second's worth of torch
    setattr(session, "Meter", lambda: Meter(clock=lambda: 0.0))  # noqa: B010
    checkpoint.SECONDS_BETWEEN_ATTEMPTS = 0


class Outcome(NamedTuple):
    """A line of the table."""

    promise: str
    trials: int
    result: str
    kept: bool


class Workplace:
    """A folder with a text; every run in it is named."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = np.random.default_rng(0).choice(WORDS.split(), 1500).tolist()
        lines = [" ".join(words[i : i + 9]) for i in range(0, len(words), 9)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text("\n".join(lines))

    def write_config(self, name: str, **sections: Any) -> Path:
        data = {"source": str(self.folder / "text.txt"), "cache_dir": str(self.folder / "cache")}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(merge(TINY, {"data": data}), sections)))
        return path

    def run(self, config: Path, name: str, *more: str, **options: Any) -> int:
        """Train to the end, in a child; its exit code."""
        return wait_for_exit(self.start(config, name, *more, **options), 900)

    def start(self, config: Path, name: str, *more: str, **options: Any) -> int:
        """The child that trains a run, or goes on with it."""
        arguments = ["train", "-c", str(config), "--out-dir", str(self.folder / name), *more]
        return start_child(arguments, self.folder / f"{name}.err", **options)

    def stderr_lines(self, name: str) -> list[str]:
        """Of the last process of a run."""
        return (self.folder / f"{name}.err").read_text(errors="replace").splitlines()


def start_child(
    arguments: list[str], stderr: Path, *, prepare: Callable[[], object] = lambda: None
) -> int:
    """Start a command in a fork of this process; `prepare` is called in there. Its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ["CI"] = "true"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        handle = os.open(stderr, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        prepare()
        app(arguments)
    except SystemExit as left:
        sys.stderr.flush()
        os._exit(int(left.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


def wait_for_exit(pid: int, seconds: float = 60.0) -> int:
    """The exit code of a child; minus the signal that ended it. AssertionError if it hangs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} hangs")


def run_digest(run_dir: Path, step: int) -> str:
    """Names all that a run has made but its name: a checkpoint with its state, and the metrics."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    state = storage.unseal((folder / "state.json").read_text())
    del state["run_id"], state["config"]["out_dir"], state["wall_seconds"]
    parts = [(folder / name).read_bytes() for name in state["files"]]
    parts += [json.dumps(state).encode(), (run_dir / "metrics.jsonl").read_bytes()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def without_clocks(run_dir: Path) -> dict[str, Any]:
    """What a finished run leaves that no clock decides: its weights, its moments, its metrics."""
    folder = run_dir / "checkpoints"
    last = folder / (folder / "last").read_text().strip()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
    return {"metrics": rows, **{name: (last / name).read_bytes() for name in FILES}}
