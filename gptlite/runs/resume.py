"""Where a run begins: at a checkpoint of its own, at the weights of another, or at nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from gptlite.config.run import RunConfig
from gptlite.core import loops
from gptlite.core.dropout import strength_at
from gptlite.core.optim import lr_at
from gptlite.core.tensor_files import read_tensors
from gptlite.core.train import Trainer
from gptlite.core.weights import FILES
from gptlite.data.token_files import TokenFiles
from gptlite.errors import ConfigError
from gptlite.planning.auto import check_warmup
from gptlite.runs import checkpoint, importing, origin
from gptlite.runs.checkpoint import Checkpoint, RunState
from gptlite.runs.directory import clean_directory, has_run

FREE_TO_CHANGE = (
    *("out_dir", "init_from", "log", "sample", "distributed"),
    *("device", "dtype", "attention", "compile"),
    *("data.source", "data.val_source", "data.include", "data.sha256", "data.cache_dir"),
    *("train.max_steps", "train.epochs", "train.log_interval", "train.eval_interval"),
    *("train.eval_batches", "train.save_interval", "train.keep_last", "train.early_stop"),
    *("train.threads", "train.on_nonfinite", "train.max_minutes"),
)
"""What a resumed run may change; the data are compared by content."""
NOTICEABLE = 0.1
"""A jump of the learning rate or of the dropout rates, in parts of what it was."""


def keep_auto(run: RunConfig, stored: RunConfig) -> RunConfig:
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


def find_start(
    run: RunConfig,
    stored: RunConfig | None,
    directory: Path,
    files: TokenFiles,
    *,
    strict: bool,
    n_ranks: int,
    teachers: dict[str, str],
) -> Checkpoint | None:
    """Where a run goes on, in a directory that is ours and then clean; None at its beginning.

    Raises ConfigError listing every change that would make it another run (`strict`: or that may
    change the last bits), CheckpointError if all that it saved is damaged.
    """
    if stored is None and has_run(directory):
        raise ConfigError(f"out_dir: {directory} contains a run; give another --out-dir")
    if stored is not None and stored.train.epochs != run.train.epochs:
        check_warmup(run, files.rows("train", run.model.context_length).n_rows)
    clean_directory(directory)
    if stored is None:
        return None
    changes = list(forbidden_changes(stored, run))
    found = checkpoint.recover(directory, lambda state: why_foreign(state, stored))
    if found is not None:
        checkpoint.check_weights_size(found.path, run.model.n_parameters(files.meta["vocab_size"]))
    if found is not None and found.state.data_digest != files.digest:
        changes.append("data: the text is not the one this run was trained on")
    if found is not None:
        changes += [
            f"distill.teachers: {source}: has other weights than when this run began"
            for source, sha256 in teachers.items()
            if found.state.teachers.get(source, sha256) != sha256
        ]
    if strict and found is not None:
        changes += changed_surroundings(run, found.state.environment, n_ranks)
    if changes:
        raise ConfigError(
            *(f"--resume: {change}" for change in changes),
            "--resume: these decide what a run is; start a new one with another --out-dir",
        )
    return found


def why_foreign(state: RunState, stored: RunConfig) -> str | None:
    """Why a checkpoint is not of the run that is stored beside it."""
    try:
        changes = list(forbidden_changes(stored, RunConfig.model_validate(state.config)))
    except ValidationError as error:
        return f"its config is damaged ({error.error_count()} values)"
    return f"of another run ({', '.join(changes[:3])})" if changes else None


def forbidden_changes(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """`key: old -> new` for every value that may not change within a run."""

    def walk(a: Any, b: Any, at: str) -> Iterator[str]:
        if at in FREE_TO_CHANGE or a == b:
            return
        if isinstance(a, dict) and isinstance(b, dict):
            for name in {**a, **b}:
                yield from walk(a.get(name), b.get(name), f"{at}.{name}" if at else name)
        else:
            yield f"{at}: {a} -> {b}"

    return walk(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def fingerprint(run: RunConfig, ranks: int) -> dict[str, Any]:
    """What bit-exactness depends on besides config and data."""
    on_gpu = run.device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(run.device) if on_gpu else run.device,
        "dtype": run.dtype,
        "attention": run.attention,
        "compile": run.compile,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "compiled loops": loops.library() is not None,
    }


def changed_surroundings(run: RunConfig, before: dict[str, Any], ranks: int) -> list[str]:
    """What is not as it was when the checkpoint was saved: the last bits may differ."""
    now, before = fingerprint(run, ranks), {"ranks": 1, **before}
    changed = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name}: {before[name]} -> {now[name]}" for name in changed]


def jumps(run: RunConfig, state: RunState, n_rows: int, directory: Path) -> Iterator[str]:
    """What changes at once where a run goes on towards another last update: schedules span all."""
    before, step = RunConfig.model_validate(state.config), state.step
    old, new = (one.planned_steps(n_rows) for one in (before, run))
    tail_from, old = state.tail or (None, old)
    if tail_from is not None and before.train.max_minutes == run.train.max_minutes:
        return
    spans = f"as its schedule spans {new} updates instead of {old}"
    was = lr_at(min(step, old - 1), old, run.optim, tail_from)
    now = lr_at(min(step, new - 1), new, run.optim)
    if abs(now - was) > NOTICEABLE * was:
        gentle = was or run.optim.lr / 10
        yield (
            f"learning rate: jumps from {was:.2g} to {now:.2g} here, {spans}; to train on gently, "
            f"begin a new run with init_from: {directory} and optim.lr: {gentle:.2g}"
        )
    schedule = run.dropout.schedule
    was, now = (strength_at(min(step, steps - 1), steps, schedule) for steps in (old, new))
    if abs(now - was) > NOTICEABLE and any(run.dropout.rates().values()):
        yield f"dropout: jumps from {was:.0%} to {now:.0%} of its rates here, {spans}"


def resumed_lines(trainer: Trainer, found: Checkpoint, directory: Path) -> Iterator[str]:
    """Where a run goes on, and what is not as it was."""
    run, state = trainer.run, found.state
    for problem in found.problems:
        yield f"{problem}; passed over"
    yield f"resumed at step {trainer.step} of {trainer.max_steps}"
    yield from jumps(run, state, trainer.rows.n_rows, directory)
    for change in changed_surroundings(run, state.environment, trainer.world.size):
        yield f"not as when it was saved: {change}; the last bits of results may differ"


def initial_weights(run: RunConfig) -> tuple[dict[str, Tensor], int | None]:
    """The weights that `init_from` names (of a checkpoint, the best of a run, or Hugging Face's),
    and the positions that they were trained for (None: all that there are).

    Learned positions past a shorter context are left out. Raises CheckpointError, ConfigError.
    """
    assert run.init_from is not None
    path, reached = Path(run.init_from), None
    if origin.is_hugging_face(run.init_from):
        tensors = importing.convert_folder(path).tensors
    else:
        if has_run(path):
            path, state, _ = checkpoint.choose(path, "best")
        else:
            state = checkpoint.read_state(path)
        tensors, reached = read_tensors(path / FILES[0]), state.trained_length
    if "position_embedding.weight" in tensors:
        kept = tensors["position_embedding.weight"][: run.model.context_length]
        tensors["position_embedding.weight"] = kept
    return tensors, reached
