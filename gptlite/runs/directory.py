"""The run directory: where a run writes, who holds it, and which one a later command means.

runs/NAME/  config.yaml env.json plan.json metrics.jsonl train.log summary.json
            checkpoints/ tokenizer/ samples/ eval/
"""

import datetime
import errno
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptlite import __version__, locks, storage
from gptlite.errors import ConfigError, RunInUseError, StorageError
from gptlite.words import mask_passwords

RUNS = Path("runs")
PARTS = ("checkpoints", "tokenizer", "samples", "eval")


def run_name(configs: list[str]) -> str:
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


def state_of(directory: Path) -> str:
    """`running`, `dead` (its process ended without a word), `finished` or `interrupted`.

    A run that trains holds its lock and has written its name into it; a process that has died has
    left its name there and holds nothing.
    """
    try:
        with (directory / locks.LOCK).open("rb") as file:
            if file.read(1) and (free := locks.try_lock(file)) is not None:
                return "dead" if free else "running"
    except OSError:
        pass
    return "finished" if (directory / "summary.json").is_file() else "interrupted"


def latest_run() -> Path:
    """The run under runs/ that was written to last. Raises ConfigError if there is none."""
    found = [path.parent for path in RUNS.glob("*/config.yaml")]
    if not found:
        raise ConfigError(f"--run: no run in {RUNS}/; train one, or name its directory")

    def written(path: Path) -> float:
        log = path / "metrics.jsonl"
        return (log if log.exists() else path / "config.yaml").stat().st_mtime

    return max(found, key=written)


def choose_directory(
    out_dir: str | None, configs: list[str], resume: str | None
) -> tuple[Path, bool]:
    """The directory that a run trains in, and whether a run there goes on."""
    if out_dir is None:
        name = run_name(configs)
        earlier = siblings(name)
        if resume == "auto" and earlier:
            return earlier[-1], True
        return free_directory(name), False
    directory = Path(os.path.expanduser(out_dir))
    directory = directory.resolve() if ".." in directory.parts else directory
    exists = has_run(directory)
    if exists and resume is None:
        refuse_if_held(directory)
        raise ConfigError(
            f"out_dir: {directory} contains a run; use --resume auto or another --out-dir"
        )
    return directory, exists


def resolve_resume(named: str) -> Path:
    """The run directory that `--resume PATH` means: itself, or that of a checkpoint in it."""
    directory = Path(named)
    if directory.parent.name == "checkpoints":
        directory = directory.parent.parent
    if not has_run(directory) or not os.path.isdir(named):
        raise ConfigError(f"--resume {named}: not a gptlite checkpoint or run directory")
    return directory


def existing_run(given: str | None, option: str = "--run ") -> Path:
    """The run a command reads: the one named, behind an option or without one, or the latest."""
    directory = latest_run() if given is None else Path(given)
    if not os.path.isdir(directory):
        exists = os.path.lexists(directory)
        why = "is a file, not a run directory" if exists else "no such directory"
        raise ConfigError(f"{option}{directory}: {why}")
    if not has_run(directory):
        raise ConfigError(f"{option}{directory}: not a run directory (it has no config.yaml)")
    return directory


def create_directory(directory: Path) -> None:
    try:
        for part in PARTS:
            storage.make_folders(directory / part)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"out_dir: {directory} is not a directory") from None
    except OSError as error:
        kind = ConfigError if error.errno == errno.ENAMETOOLONG else StorageError
        raise kind(f"out_dir: {directory}: {error.strerror}") from None


def clean_directory(directory: Path) -> None:
    """Remove what a killed run left half written; only for who holds the directory."""
    for folder in (directory, *(directory / part for part in PARTS if part != "eval")):
        storage.remove_leftovers(folder)  # not eval/: `gptlite eval` may be writing there just now


@contextmanager
def hold_directory(directory: Path) -> Iterator[None]:
    """Hold the directory: of two runs in one, the second leaves with exit code 6.

    The lock ends with the process, however that ends.
    """
    with locks.open_lock(directory) as file:
        refuse(directory, locks.acquire(file))
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield
        file.truncate(0)


def refuse_if_held(directory: Path) -> None:
    """RunInUseError if a run is at work there."""
    if os.path.isfile(directory / locks.LOCK):
        with locks.open_lock(directory) as file:
            refuse(directory, locks.acquire(file))


def refuse(directory: Path, holder: str | None) -> None:
    """RunInUseError if another one has the lock."""
    if holder is not None:
        raise RunInUseError(f"{directory}: in use by {holder}; give another --out-dir")


def describe_environment() -> dict[str, Any]:
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
        "arguments": [mask_passwords(argument) for argument in sys.argv[1:]],
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
