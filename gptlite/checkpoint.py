"""Checkpoints: saved whole or not at all, verified when loaded, no pickle.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json
    checkpoints/best, last      the name of a step folder

A folder is written under a temporary name and renamed; state.json is written last and holds the
sha256 of the other files and of itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptlite import __version__, tokenizer
from gptlite.auto import usable
from gptlite.config import RunConfig
from gptlite.config_reader import load_run
from gptlite.errors import CheckpointError, ConfigError, StorageError
from gptlite.model import GPT
from gptlite.run_directory import write_text
from gptlite.sources import file_digest
from gptlite.tokenizer import Tokenizer

FORMAT = 1
FOLDER = re.compile(r"step-(\d{8})\Z")
FILES = ("model.safetensors", "optimizer.safetensors")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def state_digest(state: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint; `tensors` maps each of FILES to its tensors. Raises StorageError."""
    parent = run_dir / "checkpoints"
    work, target = parent / f".tmp-{step}-{os.getpid()}", parent / folder_name(step)
    need = sum(t.numel() * t.element_size() for file in tensors.values() for t in file.values())
    try:
        if shutil.disk_usage(parent).free < 1.2 * need:
            raise StorageError(f"{parent}: a checkpoint needs {need / 2**20:.0f} MiB of free disk")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, content in tensors.items():
            save_file(
                {k: t.contiguous() for k, t in content.items()}, work / name, {"format": "pt"}
            )
            sync(work / name)
        files = {name: file_digest(work / name) for name in tensors}
        full = {"format": FORMAT, "gptlite": __version__, "step": step, **state, "files": files}
        write_text(
            work / "state.json", json.dumps({**full, "sha256": state_digest(full)}, indent=1)
        )
        sync(work)
        if target.exists():  # a resumed run arrives again at a step it had saved
            shutil.rmtree(target)
        os.rename(work, target)
        sync(parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def point(run_dir: Path, name: str, step: int) -> None:
    write_text(run_dir / "checkpoints" / name, folder_name(step) + "\n")


def pointed(run_dir: Path, name: str) -> str | None:
    path = run_dir / "checkpoints" / name
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first; nothing else in there is ours."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if FOLDER.match(path.name) and path.is_dir())


def prune(run_dir: Path, keep_last: int | str) -> None:
    """Delete all but the newest checkpoints and the best one."""
    if keep_last == "all":
        return
    best = pointed(run_dir, "best")
    for path in folders(run_dir)[: -int(keep_last)]:
        if path.name != best:
            doomed = path.with_name(f".old-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files all have their digests; else CheckpointError."""
    if path.is_file():
        raise CheckpointError(
            f"{path}: not a gptlite checkpoint (a step-... folder); files that hold pickles, such "
            "as .pt and .pth, are never loaded"
        )
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            needs = f"format {state['format']}, this gptlite reads {FORMAT}"
            raise CheckpointError(f"{path}: written by gptlite {state['gptlite']} ({needs})")
        if state_digest(state) != state["sha256"]:
            raise CheckpointError(f"{path}/state.json: damaged (sha256 differs)")
        for name, sha256 in state["files"].items():
            if name not in FILES or file_digest(path / name) != sha256:
                raise CheckpointError(f"{path}/{name}: damaged (sha256 differs from state.json)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not a whole checkpoint ({why})") from None
    return state


def newest_valid(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that verifies, its state, and what was wrong with newer ones.

    Bad ones are renamed `*.corrupt`. None if there are no checkpoints at all; CheckpointError if
    there are some and none is good: starting over silently would lose a run.
    """
    found = folders(run_dir)
    problems: list[str] = []
    for path in reversed(found):
        try:
            return path, read_state(path), problems
        except CheckpointError as error:
            problems += error.problems
            os.replace(path, path.with_name(path.name + ".corrupt"))
    if found:
        raise CheckpointError(*problems, f"{run_dir}: no usable checkpoint is left")
    return None


def chosen(run_dir: Path, which: str) -> Path:
    """The folder that `best`, `last` or `step-N` names."""
    match = re.fullmatch(r"step-(\d{1,8})", which)
    if which not in ("best", "last") and not match:
        raise ConfigError(f"--checkpoint {which}: expected best, last or step-N")
    name = folder_name(int(match[1])) if match else pointed(run_dir, which)
    if name is None and which == "best":
        name = pointed(run_dir, "last")
    path = run_dir / "checkpoints" / (name or "missing")
    if name is None or not FOLDER.match(name) or not path.is_dir():
        have = ", ".join(folder.name for folder in folders(run_dir)) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint '{which}'; there are: {have}")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: bad checkpoint ({error})") from None


def model_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by name; a tied output matrix is stored once."""
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def load_weights(model: GPT, path: Path) -> None:
    """Fill the model from a checkpoint folder. Raises CheckpointError naming what does not fit."""
    tensors = read_tensors(path / "model.safetensors")
    have, want = (
        {name: (tuple(t.shape), t.dtype) for name, t in each.items()}
        for each in (tensors, model_tensors(model))
    )
    if have != want:
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        few = ", ".join(odd[:5])
        raise CheckpointError(f"{path}: {len(odd)} weights do not fit this model: {few}")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: weights are not finite in {', '.join(broken[:5])}")
    model.load_state_dict(tensors, strict=False)


@dataclass(frozen=True)
class Trained:
    """A trained model with all that is needed to use it."""

    run: RunConfig
    model: GPT
    tokenizer: Tokenizer
    state: dict[str, Any]


def load_tokenizer(run_dir: Path) -> Tokenizer:
    path = run_dir / "tokenizer" / "tokenizer.json"
    try:
        return tokenizer.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def load_trained(run_dir: Path, which: str) -> Trained:
    """The model of a run as a checkpoint has it, in eval mode, on a device of this machine."""
    path = chosen(run_dir, which)
    state = read_state(path)
    run = usable(load_run([str(run_dir / "config.yaml")]))
    text = load_tokenizer(run_dir)
    if tokenizer.digest(text) != state["tokenizer_sha256"]:
        raise CheckpointError(f"{run_dir}/tokenizer: differs from the one of {path.name}")
    model = GPT(run.model, text.vocab_size, run.dropout, kernel=run.attention)
    load_weights(model, path)
    return Trained(run, model.to(run.device).eval(), text, state)
