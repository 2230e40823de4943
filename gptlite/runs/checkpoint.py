"""Checkpoints: saved whole or not at all, verified when read, no pickle.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json
    checkpoints/best, last      the name of a step folder

The files are the same whatever number of ranks wrote them; large ones are several (tensor_files).

A folder is written under a temporary name, synced and renamed; state.json is sealed and holds the
sha256 of the other files. A bad folder is passed over, named, and set aside as `*.corrupt`.
"""

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptlite import __version__, storage
from gptlite.config.section import Section
from gptlite.core.model import GPT
from gptlite.core.precision import Scale
from gptlite.core.tensor_files import (
    files_of,
    is_part,
    not_finite,
    read_tensors,
    size_of,
    whole_files,
    write_indexes,
)
from gptlite.core.train import Progress, Trainer
from gptlite.core.weights import FILES, RAW, fill
from gptlite.core.world import ALONE, World
from gptlite.errors import CheckpointError, ConfigError, DivergedError, StorageError

FORMAT = 2
FOLDER = re.compile(r"step-([0-9]{8})\Z")
SET_ASIDE = re.compile(r"step-[0-9]{8}\.corrupt(-[0-9]+)?\Z")
ATTEMPTS = 3
SECONDS_BETWEEN_ATTEMPTS = 2.0
MOST_STATE_BYTES = 1 << 20


class Best(Section):
    """The evaluation with the lowest validation loss so far."""

    step: int
    val_loss: float
    val_bits_per_byte: float | None


class RunState(Section):
    """state.json: all that a run is besides tensors."""

    format: int = FORMAT
    gptlite: str = __version__
    step: int = Field(ge=0, lt=10**8)
    run_id: str
    """Names the run: its config and data."""
    tokens: int
    elapsed_seconds: float
    best: Best | None
    val_loss: float | None
    evaluations_without_gain: int
    skipped: list[int]
    """Recent updates whose loss or gradient was not finite."""
    trained_length: int | None = Field(None, ge=1)
    """Positions that training has reached, of those that are learned; None: all of them."""
    loss_scale: Scale | None = None
    """Of a run that is, or was before it went on elsewhere, in float16."""
    tail: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """Where a clock let the learning rate begin to fall, and the run end (train.max_minutes)."""
    wall_seconds: float = 0.0
    """Of the run so far, evaluations and checkpoints included."""
    teachers: dict[str, str] = {}
    """sha256 of the weights of those that the run learns from."""
    pending: dict[str, float | int | None] | None
    """The row of metrics of this step, if a signal came before its evaluation was done."""
    data_digest: str
    tokenizer_sha256: str
    config: dict[str, Any]
    environment: dict[str, Any]
    """What exactness depends on besides config and data."""
    files: dict[str, str] = {}
    """sha256 of the files beside this one."""

    @field_validator("pending")
    @classmethod
    def is_a_row(cls, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """What will be done with it when a run goes on must be possible."""
        if row is not None and not (
            type(row.get("step")) is int
            and isinstance(row.get("tokens_per_second"), int | float)
            and "train/loss" in row
        ):
            raise ValueError("not a row of metrics")
        return row


class Checkpoint(NamedTuple):
    """A checkpoint that verified."""

    path: Path
    state: RunState
    problems: list[str]
    """Those passed over on the way, and why."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first; nothing else in there is ours."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if FOLDER.match(path.name) and path.is_dir())


def save(
    run_dir: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: RunState,
    world: World = ALONE,
) -> Path:
    """Write a checkpoint; `tensors` maps each of FILES to its tensors. All ranks call it.

    Raises DivergedError if they are not finite, StorageError after ATTEMPTS.
    """
    mine = [name for part in tensors.values() for name in not_finite(part)]
    if broken := sorted({name for names in world.gather(mine) for name in names}):
        where = ", ".join(broken[:5])
        raise DivergedError(f"step {state.step}: not finite, so not saved: {where}; lower optim.lr")
    target = run_dir / "checkpoints" / folder_name(state.step)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        failure = attempt_write(target, tensors, state, world)
        if failure is None:
            return target
    raise StorageError(
        f"{target}: not saved, {ATTEMPTS} attempts: {failure}; what was saved before is whole: "
        f"make room, then gptlite train --resume {run_dir}"
    )


def attempt_write(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: RunState, world: World
) -> str | None:
    """Write if this is the first rank; why that failed, on all ranks."""
    files = whole_files(tensors, world)
    failure = None
    if world.first:
        try:
            write_folder(target, files, size_of(tensors), state)
        except (OSError, SafetensorError) as error:
            failure = str(getattr(error, "strerror", None) or error)
    for _ in files:  # who does not write still gives the parts that it has
        pass
    return world.broadcast(lambda: failure)


def write_folder(
    target: Path, files: Iterator[tuple[str, dict[str, Tensor]]], need: int, state: RunState
) -> None:
    """One attempt. A loss of power at any moment leaves the folder whole or absent."""
    if target.is_dir():  # the same weights once more, with an evaluation that had been cut short
        have = read_state(target).files
        storage.write_text(target / "state.json", storage.seal(dump_state(state, have)))
        return
    disk, work = storage.disk, storage.temporary_path(target)
    free = disk.free_bytes(target.parent)
    if free < 1.2 * need:
        why = f"needs {need / 2**20:.1f} MiB of free disk and has {free / 2**20:.1f}"
        raise OSError(errno.ENOSPC, why)
    try:
        disk.make_folder(work)
        where: dict[str, list[str]] = {}
        for name, whole in files:
            disk.fill(work / name, partial(save_file, whole, metadata={"format": "pt"}))
            disk.sync(work / name)
            where[name] = list(whole)
        names = [*where, *write_indexes(work, where, (*FILES, RAW))]
        text = storage.seal(dump_state(state, {n: storage.file_digest(work / n) for n in names}))
        disk.fill(work / "state.json", lambda path: path.write_text(text))
        disk.sync(work / "state.json")
        disk.sync(work)
        disk.rename(work, target)
        disk.sync(target.parent)
    finally:
        storage.discard(work)


def dump_state(state: RunState, files: dict[str, str]) -> dict[str, Any]:
    return {**state.model_dump(mode="json"), "files": files}


def write_pointer(run_dir: Path, name: str, step: int) -> None:
    """Let `best` or `last` name a step."""
    storage.write_text(run_dir / "checkpoints" / name, folder_name(step) + "\n")


def read_pointer(run_dir: Path, name: str) -> str | None:
    """The folder that `best` or `last` names."""
    try:
        text = storage.read_regular(run_dir / "checkpoints" / name, 64).strip()
    except (OSError, ValueError):
        return None
    return text if FOLDER.match(text) else None


def prune(run_dir: Path, keep_last: int | str, best_step: int | None) -> None:
    """Delete all but the newest checkpoints and the best one. Raises StorageError."""
    if keep_last == "all":
        return
    best = None if best_step is None else folder_name(best_step)
    for path in folders(run_dir)[: -int(keep_last)]:
        if path.name != best:
            doomed = storage.temporary_path(path, "old")
            try:
                storage.disk.rename(path, doomed)
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}") from None
            storage.discard(doomed)


def read_state(path: Path) -> RunState:
    """state.json of a checkpoint whose files all have their digests; else CheckpointError."""
    if not path.is_dir() or path.is_symlink():
        raise CheckpointError(
            f"{path}: not a gptlite checkpoint (a step-... folder); files that hold pickles, such "
            "as .pt and .pth, are never loaded"
        )
    at = path / "state.json"
    try:
        saved = storage.unseal(storage.read_regular(at, MOST_STATE_BYTES))
        if saved.get("format") != FORMAT:
            needs = f"format {saved.get('format')!r:.20}, this one reads {FORMAT}"
            raise CheckpointError(
                f"{path}: written by gptlite {saved.get('gptlite')!r:.20} ({needs})"
            )
        state = RunState.model_validate(saved)
        if FOLDER.match(path.name) and folder_name(state.step) != path.name:
            raise CheckpointError(f"{path}: holds step {state.step}, so it was renamed")
        known = (*FILES, RAW)
        parts = [[f for f in state.files if is_part(f, name)] for name in known]
        if not parts[0] or sum(map(len, parts)) != len(state.files):
            raise CheckpointError(f"{at}: names other files than {', '.join(known)}")
        for name, sha256 in state.files.items():
            at = path / name
            if storage.file_digest(at) != sha256:
                raise CheckpointError(f"{at}: damaged (sha256 differs from state.json)")
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, each["loc"])) for each in error.errors()[:5])
        raise CheckpointError(f"{at}: damaged ({keys})") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{at}: not a whole checkpoint: {why}") from None
    return state


def data_digest(run_dir: Path) -> str:
    """That of the token files which a run was trained on, by its newest checkpoint that says so;
    whether its tensors are whole is for `recover`."""
    for path in reversed(folders(run_dir)):
        with suppress(OSError, ValueError, KeyError):
            text = storage.read_regular(path / "state.json", MOST_STATE_BYTES)
            return str(storage.unseal(text)["data_digest"])
    return ""


def recover(run_dir: Path, foreign: Callable[[RunState], str | None]) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to the run; bad ones are set aside.

    None if none was ever saved; CheckpointError if there were some and none is good: starting over
    silently would lose a run. `foreign` says why a checkpoint is not of this run; such ones are set
    aside only where one is found that is: perhaps it is the config that is wrong.
    """
    problems: list[str] = []
    strays = []
    for path in reversed(folders(run_dir)):
        try:
            state = read_state(path)
        except CheckpointError as error:
            problems += error.problems
            set_aside(path)
            continue
        if why := foreign(state):
            problems.append(f"{path}: {why}")
            strays.append(path)
            continue
        for stray in strays:
            set_aside(stray)
        return Checkpoint(path, state, problems)
    if strays:
        changed = "is not what its checkpoints were saved with; undo the change, or begin anew with"
        raise CheckpointError(*problems, f"{run_dir}/config.yaml: {changed} another --out-dir")
    if (run_dir / "summary.json").is_file() and not problems:
        problems = [f"{run_dir}: has ended (summary.json), but its checkpoints are gone"]
    traces = [p for p in (run_dir / "checkpoints").iterdir() if SET_ASIDE.match(p.name)]
    if problems or traces or read_pointer(run_dir, "last"):
        raise CheckpointError(
            *problems, f"{run_dir}: no usable checkpoint is left; begin anew with another --out-dir"
        )
    return None


def set_aside(path: Path) -> None:
    """Rename to `*.corrupt`, for a person to look at."""
    ends = ("", *(f"-{number}" for number in range(2, 1000)))
    names = (path.with_name(f"{path.name}.corrupt{end}") for end in ends)
    with suppress(OSError):  # on a disk that cannot be written, it is merely passed over
        storage.disk.rename(path, next(name for name in names if not name.exists()))


def choose(run_dir: Path, which: str) -> Checkpoint:
    """The checkpoint that `best`, `last` or `step-N` names, verified; nothing is renamed.

    If best or last is damaged, the newest good one stands in and `problems` say so.
    """
    match = re.fullmatch(r"step-([0-9]{1,8})", which)
    if which not in ("best", "last") and not match:
        raise ConfigError(f"--checkpoint {which}: expected best, last or step-N")
    have = folders(run_dir)
    name = folder_name(int(match[1])) if match else read_pointer(run_dir, which)
    wanted = [path for path in have if path.name == name]
    others = [path for path in reversed(have) if path.name != name]
    problems = [] if wanted or not name or match else [f"{run_dir}: {which} is {name}, not there"]
    for path in wanted if match else wanted + others:
        try:
            return Checkpoint(path, read_state(path), problems)
        except CheckpointError as error:
            problems += error.problems
    names = ", ".join(folder.name for folder in have) or "none"
    lacks = f"{run_dir}: no checkpoint '{which}'; there are: {names}"
    raise CheckpointError(*(problems or [lacks]))


def check_weights_size(path: Path, n_parameters: int) -> None:
    """Refuse by arithmetic a model that its weights cannot fill, before it takes any memory.

    One that is not much too large is for `load_weights`, which names what does not fit.
    """
    try:
        size = sum(file.stat().st_size for file in files_of(path / FILES[0]))
    except OSError as error:
        raise CheckpointError(f"{path}/{FILES[0]}: {error.strerror}") from None
    if size + (1 << 16) < 4 * n_parameters:
        raise CheckpointError(
            f"{path}: {size} bytes of weights do not fit this model of {n_parameters} parameters"
        )


def load_weights(model: GPT, path: Path) -> None:
    """Fill the model from a checkpoint folder. Raises CheckpointError naming what does not fit."""
    fill(model, read_tensors(path / FILES[0]), path)


def restore(trainer: Trainer, found: Checkpoint) -> None:
    """Let a trainer go on from a verified checkpoint, which only the first rank reads.

    Raises CheckpointError if it is of another model.
    """
    path, state = found.path, found.state
    if not any(is_part(name, FILES[1]) for name in state.files):
        raise CheckpointError(f"{path}: has no optimizer state; use init_from for weights only")
    names = FILES if trainer.average is None else (*FILES, RAW)
    read = read_tensors if trainer.world.first else lambda _: {}
    tensors = {name: read(path / name) for name in names}
    before = (state.config.get("train") or {}).get("max_minutes")
    tail = state.tail if before == trainer.run.train.max_minutes else None
    progress = Progress(state.step, state.skipped, state.loss_scale, state.trained_length, tail)
    trainer.restore(tensors, progress, path)
