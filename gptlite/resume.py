"""Where a run begins: at a checkpoint of its own, at the weights of another, or at nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from gptlite import checkpoint, run_directory
from gptlite.config import RunConfig
from gptlite.data import TokenFiles
from gptlite.errors import ConfigError

FREE_TO_CHANGE = (
    *("out_dir", "init_from", "device", "log", "sample"),
    *("data.source", "data.sha256", "data.cache_dir"),
    *("train.max_steps", "train.epochs", "train.log_interval", "train.eval_interval"),
    *("train.eval_batches", "train.save_interval", "train.keep_last", "train.early_stop"),
    "train.threads",
)
"""What a resumed run may change; the data are compared by content."""


class Start(NamedTuple):
    path: Path | None = None
    """The checkpoint to go on from, if any."""
    state: dict[str, Any] = {}
    """What it saved besides tensors."""
    problems: Sequence[str] = ()
    """Newer checkpoints that were passed over, and why."""


def adopt(run: RunConfig, stored: RunConfig) -> RunConfig:
    """`auto` in a resumed run means what it meant when the run began."""

    def as_before(new: BaseModel, old: BaseModel) -> dict[str, Any]:
        return {name: getattr(old, name) for name, value in new if value == "auto"}

    sections = {
        name: getattr(run, name).model_copy(
            update=as_before(getattr(run, name), getattr(stored, name))
        )
        for name in ("train", "dropout")
    }
    return run.model_copy(update={**as_before(run, stored), **sections})


def start_point(
    run: RunConfig, stored: RunConfig | None, directory: Path, files: TokenFiles
) -> Start:
    """Where a run goes on; ConfigError lists every change that would make it another run."""
    if stored is None:
        return Start()
    changes = list(differences(stored, run))
    found = checkpoint.newest_valid(directory)
    if found is not None and found[1]["data_digest"] != files.digest:
        changes.append("data: the text is not the one this run was trained on")
    if changes:
        raise ConfigError(
            *(f"--resume: {change}" for change in changes),
            "--resume: these decide what a run is; start a new one with another --out-dir",
        )
    return Start() if found is None else Start(*found)


def differences(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """`key: old -> new` for every value that may not change within a run."""

    def walk(a: Any, b: Any, at: str) -> Iterator[str]:
        if at in FREE_TO_CHANGE or a == b:
            return
        if isinstance(a, dict):
            for name in a:
                yield from walk(a[name], b[name], f"{at}.{name}" if at else name)
        else:
            yield f"{at}: {a} -> {b}"

    return walk(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def initial_weights(source: str) -> Path:
    """The checkpoint that `init_from` names: a step folder, or the best of a run."""
    path = Path(source)
    if run_directory.has_run(path):
        path = checkpoint.chosen(path, "best")
    checkpoint.read_state(path)
    return path
