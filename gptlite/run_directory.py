"""The run directory: where a run writes, who holds it, and which one a later command means.

runs/NAME/  config.yaml env.json plan.json metrics.jsonl train.log summary.json
            checkpoints/ tokenizer/ samples/ eval/
"""

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptlite import __version__
from gptlite.errors import ConfigError, RunInUseError, StorageError

RUNS = Path("runs")


def name_of(configs: list[str]) -> str:
    stems = "-".join(Path(config).stem for config in configs)
    return re.sub(r"[^A-Za-z0-9._-]", "_", stems)[:64] or "run"


def siblings(name: str) -> list[Path]:
    """runs/NAME, runs/NAME-2, ... that exist, in order of their numbers."""
    numbered = []
    for path in RUNS.glob(f"{name}*"):
        match = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", path.name)
        if match and (path / "config.yaml").is_file():
            numbered.append((int(match[1] or 1), path))
    return [path for _, path in sorted(numbered)]


def free_directory(name: str) -> Path:
    taken = {path.name for path in RUNS.glob(f"{name}*")}
    numbers = iter(range(2, 1_000_000))
    free = name
    while free in taken:
        free = f"{name}-{next(numbers)}"
    return RUNS / free


def has_run(directory: Path) -> bool:
    return os.path.isfile(directory / "config.yaml")


def latest_run() -> Path:
    """The run under runs/ that was written to last. Raises ConfigError if there is none."""
    found = [path.parent for path in RUNS.glob("*/config.yaml")]
    if not found:
        raise ConfigError(f"--run: no run in {RUNS}/; train one, or name its directory")

    def written(path: Path) -> float:
        log = path / "metrics.jsonl"
        return (log if log.exists() else path / "config.yaml").stat().st_mtime

    return max(found, key=written)


def existing_run(given: str | None) -> Path:
    """The run a command reads: the one named, or the latest."""
    directory = latest_run() if given is None else Path(given)
    if not os.path.isdir(directory):
        raise ConfigError(f"--run {directory}: no such directory")
    if not has_run(directory):
        raise ConfigError(f"--run {directory}: not a run directory (it has no config.yaml)")
    return directory


def create(directory: Path) -> None:
    try:
        for part in ("checkpoints", "tokenizer", "samples", "eval"):
            (directory / part).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"out_dir: {directory} is not a directory") from None
    except OSError as error:
        raise ConfigError(f"out_dir: {directory}: {error.strerror}") from None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory: of two runs in one, the second leaves with exit code 6."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks of this kind
        yield
        return
    with (directory / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunInUseError(
                f"{directory}: in use by {holder}; give another --out-dir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error.strerror}") from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def environment() -> dict[str, Any]:
    """What a result may depend on besides the config."""
    import numpy
    import torch

    return {
        "gptlite": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "arguments": sys.argv[1:],
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
