"""How a run begins or goes on: its data, its choices, its directory; then its Session works.

Every rank passes through here; the first one decides, and the others hear of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlite import storage
from gptlite.config.reader import dump
from gptlite.config.run import RunConfig
from gptlite.core import device
from gptlite.core.generate import encode_prompt
from gptlite.core.train import Trainer
from gptlite.core.weights import fill
from gptlite.core.world import ALONE, World, unlike_first
from gptlite.data.prepare import prepare
from gptlite.data.token_files import TokenFiles
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import ConfigError, DataError
from gptlite.planning import auto
from gptlite.planning import plan as planning
from gptlite.planning.memory import keep_freed, refuse_too_large
from gptlite.runs import checkpoint
from gptlite.runs import directory as run_directory
from gptlite.runs.checkpoint import Found, State
from gptlite.runs.interrupts import Interrupts
from gptlite.runs.origin import given_tokenizer, load_run
from gptlite.runs.resume import adopt, initial_weights, start_point
from gptlite.runs.session import Session, Watch, watch_nothing
from gptlite.runs.sinks import check_installed
from gptlite.runs.trained import load_tokenizer


def train(
    run: RunConfig,
    directory: Path,
    *,
    resume: bool = False,
    strict: bool = False,
    watch: Watch = watch_nothing,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train a run in its directory; returns the summary. All ranks call it with the same.

    Raises ConfigError and DataError before anything is written, Stopped after a signal, with the
    checkpoint saved. `strict`: not to resume where surroundings have changed.
    """
    auto.check_ranks(run, world.size)
    refuse_too_large(run)
    world.expects_life(run.distributed.timeout_seconds)
    stored = load_run([str(directory / "config.yaml")]) if world.first and resume else None
    files = open_files(run, directory, resume, world)
    check_installed(run.log.sinks)
    if not resume:
        auto.check_warmup(run, files.rows("train", run.model.context_length).n_rows)
    weights: dict[str, Tensor] = {}
    reached = None
    if world.first and run.init_from is not None and not resume:
        weights, reached = initial_weights(run)
    own = device.shared_precisions(run, world)
    asked = run if stored is None else adopt(run, device.adapt(stored, own)[0])
    resolved, reasons = resolve_alike(asked, files, world, own)
    keep_freed()
    with hold_directory(directory, world), Interrupts(world).notice() as interrupts:
        found = share_found(lambda: begin(resolved, stored, directory, files, strict, world), world)
        rows = files.rows("train", resolved.model.context_length)
        trainer = Trainer(resolved, rows, files.meta["vocab_size"], world)
        if found is not None:
            checkpoint.restore(trainer, found)
        elif run.init_from is not None:
            fill(trainer.model, weights, f"init_from: {run.init_from}", world)
            trainer.know_positions(world.broadcast(lambda: reached))
        plan = planning.make_plan(resolved, trainer.model, files, trainer.rows, reasons, world.size)
        if world.first:
            write_description(trainer.run, files.tokenizer, directory, plan)
        saved = found.state if found else None
        session = Session(trainer, files, directory, saved, interrupts, watch)
        try:
            session.introduce(plan, found, resume)
            return session.work()
        except BaseException as error:
            session.records.failed(error)
            raise
        finally:
            session.records.close()


def open_files(run: RunConfig, directory: Path, resume: bool, world: World) -> TokenFiles:
    """The token files, the same on all ranks, with enough text for the run and its prompts."""
    own = None  # that of init_from, which all ranks see, as the run directory perhaps is not
    if resume and run.init_from and (world.first or run_directory.has_run(directory)):
        own = load_tokenizer(directory)
    before = world.broadcast(lambda: checkpoint.data_digest(directory)) if resume else ""
    files = world.in_turn(lambda: prepare(run, own or given_tokenizer(run), before))
    files.rows("train", run.model.context_length)
    files.tokens("val")  # too little text for validation is better known before training
    for prompt in run.sample.prompts:
        documents = run.data.layout == "documents"
        encode_prompt(files.tokenizer, prompt, documents, place=f"sample.prompts: {prompt!r}")
    if ranks := unlike_first(world, files.digest):
        raise DataError(f"data.source: rank {ranks} has other text or tokens than rank 0")
    return files


def resolve_alike(
    run: RunConfig, files: TokenFiles, world: World, own: set[str]
) -> tuple[RunConfig, dict[str, str]]:
    """What `auto` means for all ranks: the first one times and chooses among what all have."""
    n_rows = files.rows("train", run.model.context_length).n_rows
    sizes = {"vocab_size": files.meta["vocab_size"], "n_rows": n_rows}

    def choose() -> tuple[Any, dict[str, str]]:
        resolved, reasons = auto.resolve_run(run, **sizes, world=world, own=own)
        return resolved.model_dump(mode="json"), reasons

    values, reasons = world.broadcast(choose)
    resolved = RunConfig.model_validate(values)
    device.use_threads(resolved)
    return resolved, reasons


@contextmanager
def hold_directory(directory: Path, world: World) -> Iterator[None]:
    """The run directory, made and cleaned by the first rank, which holds its lock."""
    if not world.first:
        yield
        return
    run_directory.create(directory)
    with run_directory.hold(directory):
        yield


def begin(
    run: RunConfig,
    stored: RunConfig | None,
    directory: Path,
    files: TokenFiles,
    strict: bool,
    world: World,
) -> Found | None:
    """Where the run goes on, in a directory that is ours and clean."""
    if stored is None and run_directory.has_run(directory):
        raise ConfigError(f"out_dir: {directory} contains a run; give another --out-dir")
    if stored is not None and stored.train.epochs != run.train.epochs:
        auto.check_warmup(run, files.rows("train", run.model.context_length).n_rows)
    run_directory.clean(directory)
    return start_point(run, stored, directory, files, strict=strict, ranks=world.size)


def share_found(find: Callable[[], Found | None], world: World) -> Found | None:
    """The checkpoint that the first rank found, for all."""

    def described() -> Any:
        found = find()
        if found is None:
            return None
        return str(found.path), found.state.model_dump(mode="json"), found.problems

    if (shared := world.broadcast(described)) is None:
        return None
    path, state, problems = shared
    return Found(Path(path), State.model_validate(state), problems)


def write_description(
    run: RunConfig, text: Tokenizer, directory: Path, plan: dict[str, Any]
) -> None:
    """config.yaml, env.json, plan.json and the tokenizer: what the run is."""
    storage.write_json(directory / "env.json", run_directory.environment())
    storage.write_json(directory / "plan.json", plan)
    storage.write_text(directory / "tokenizer" / "tokenizer.json", storage.seal(text.to_json()))
    storage.write_text(directory / "config.yaml", dump(run))
