"""How a run begins or goes on: its data, its choices, its directory; then its Session works.

Which run that is, and where, `launch` has said before, without torch. Every rank passes through
here; the first one decides, and the others hear of it.
"""

from contextlib import nullcontext
from functools import partial
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
from gptlite.distributed.agreement import agree
from gptlite.errors import DataError
from gptlite.planning import auto, rehearsal
from gptlite.planning.memory import keep_freed, refuse_too_large
from gptlite.planning.plan import make_plan
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import Checkpoint
from gptlite.runs.directory import (
    create_directory,
    describe_environment,
    has_run,
    hold_directory,
)
from gptlite.runs.interrupts import Interrupts
from gptlite.runs.origin import given_tokenizer, load_run
from gptlite.runs.resume import find_start, initial_weights, keep_auto
from gptlite.runs.session import Session, Watch, unseen_tokens, watch_nothing
from gptlite.runs.sinks import check_installed
from gptlite.runs.teachers import Teachers, load_teachers
from gptlite.runs.trained import load_tokenizer, write_tokenizer
from gptlite.runs.viewer import NOBODY, Viewer


def train(
    run: RunConfig,
    directory: Path,
    *,
    resume: bool = False,
    strict: bool = False,
    watch: Watch = watch_nothing,
    world: World = ALONE,
    viewer: Viewer = NOBODY,
) -> dict[str, Any]:
    """Train a run in its directory; returns the summary. All ranks call it with the same.

    Raises ConfigError and DataError before anything is written, Stopped after a signal, with the
    checkpoint saved. `strict`: not to resume where surroundings have changed.
    """
    auto.check_ranks(run, world.size)
    refuse_too_large(run)
    world.set_timeout(run.distributed.timeout_seconds)
    stored = load_run([str(directory / "config.yaml")]) if world.first and resume else None
    files = open_files(run, directory, resume, world)
    check_installed(run.log.sinks)
    initial: tuple[dict[str, Tensor], int | None] = ({}, None)
    if world.first and run.init_from is not None and not resume:
        initial = initial_weights(run)
    teachers = load_teachers(run, files.tokenizer)
    own = device.shared_precisions(run, world)
    asked = run if stored is None else keep_auto(run, device.adapt(stored, own)[0])
    resolved, reasons = resolve_on_all_ranks(asked, files, world, own)
    keep_freed()
    if world.first:
        create_directory(directory)
    holding = hold_directory(directory) if world.first else nullcontext()
    with holding, Interrupts(world).catch_signals() as interrupts:
        find = partial(find_start, resolved, stored, directory, files, strict=strict)
        find = partial(find, n_ranks=world.size, teachers=teachers.digests)
        found = agree(world, Checkpoint | None, find)
        viewer = add_estimate(viewer, resolved, files, found, world)
        trainer = make_trainer(resolved, files, found, initial, teachers, world)
        plan = make_plan(resolved, trainer.model, files, trainer.rows, reasons, world.size)
        if world.first:
            write_description(trainer.run, files, directory, plan)
        session = Session(
            trainer,
            files,
            directory,
            found.state if found else None,
            interrupts,
            watch=watch,
            teachers=teachers.digests,
            viewer=viewer,
        )
        try:
            session.introduce(plan, found, resume)
            return session.work()
        except BaseException as error:
            session.records.log_failure(error)
            raise
        finally:
            session.records.close()


def open_files(run: RunConfig, directory: Path, resume: bool, world: World) -> TokenFiles:
    """The token files, the same on all ranks, with enough text for the run and its prompts."""
    own = None  # that of init_from, which all ranks see, as the run directory perhaps is not
    if resume and run.init_from and (world.first or has_run(directory)):
        own = load_tokenizer(directory)
    before = world.broadcast(lambda: checkpoint.data_digest(directory)) if resume else ""
    files = world.make_in_turn(lambda: prepare(run, own or given_tokenizer(run), before))
    rows = files.rows("train", run.model.context_length)
    if not resume:
        auto.check_warmup(run, rows.n_rows)
    files.tokens("val")  # too little text for validation is better known before training
    for prompt in run.sample.prompts:
        documents = run.data.layout == "documents"
        encode_prompt(files.tokenizer, prompt, documents, place=f"sample.prompts: {prompt!r}")
    if ranks := unlike_first(world, files.digest):
        raise DataError(f"data.source: rank {ranks} has other text or tokens than rank 0")
    return files


def resolve_on_all_ranks(
    run: RunConfig, files: TokenFiles, world: World, own: set[str]
) -> tuple[RunConfig, dict[str, str]]:
    """What `auto` means for all ranks: the first one times and chooses among what all have."""
    n_rows = files.rows("train", run.model.context_length).n_rows
    sizes = {"vocab_size": files.meta["vocab_size"], "n_rows": n_rows}
    resolve = partial(auto.resolve_run, run, **sizes, world=world, own=own)
    resolved, reasons = agree(world, tuple[RunConfig, dict[str, str]], resolve)
    device.use_threads(resolved)
    return resolved, reasons


def add_estimate(
    viewer: Viewer, run: RunConfig, files: TokenFiles, found: Checkpoint | None, world: World
) -> Viewer:
    """Who follows the run, knowing how long it will take, if they want to and it can be known."""
    if not viewer.foresees or viewer.seconds is not None:
        return viewer
    last = run.planned_steps(files.rows("train", run.model.context_length).n_rows)
    done = 0 if found is None else found.state.step
    return viewer._replace(seconds=rehearsal.foresee(run, files, world, max(0, last - done)))


def make_trainer(
    run: RunConfig,
    files: TokenFiles,
    found: Checkpoint | None,
    initial: tuple[dict[str, Tensor], int | None],
    teachers: Teachers,
    world: World,
) -> Trainer:
    """At a checkpoint, or at the initial weights that the first rank has, or at the beginning."""
    rows = files.rows("train", run.model.context_length)
    teacher = None if teachers.model is None else teachers.model.to(world.device(run))
    trainer = Trainer(run, rows, files.meta["vocab_size"], world, teacher)
    if found is not None:
        checkpoint.restore(trainer, found)
    elif run.init_from is not None:
        weights, reached = initial
        fill(trainer.model, weights, f"init_from: {run.init_from}", world)
        trainer.note_trained_positions(world.broadcast(lambda: reached))
    return trainer


def write_description(
    run: RunConfig, files: TokenFiles, directory: Path, plan: dict[str, Any]
) -> None:
    """config.yaml, env.json, plan.json and the tokenizer: what the run is."""
    storage.write_json(directory / "env.json", describe_environment())
    storage.write_json(directory / "plan.json", plan)
    write_tokenizer(directory, files.tokenizer, unseen_tokens(run, files))
    storage.write_text(directory / "config.yaml", dump(run))
