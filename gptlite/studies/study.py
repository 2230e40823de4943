"""`gptlite study`: many runs, each done once, and what they say together.

    studies/NAME/  study.yaml study.json report.html journal.log runs/POINT-seed-N-DIGEST/ workers/

Workers take one run after the other from the queue in `queue.py`. A run that was begun goes on
where it stopped; a finished one is at most measured again. study.json is made anew after each.
"""

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gptlite import machine, storage
from gptlite.config.run import RunConfig
from gptlite.errors import ConfigError, DivergedError, RunInUseError, Stopped, UserError
from gptlite.runs.directory import has_run
from gptlite.runs.origin import load_run
from gptlite.runs.results import (
    best_evaluation,
    evaluations,
    generalisation_gap,
    read_rows,
    scalars,
)
from gptlite.studies.comparison import (
    mark_above_noise,
    mean_over_seeds,
    paired_difference,
    student_t,
)
from gptlite.studies.config import Job, Study, load_study
from gptlite.studies.database import optuna
from gptlite.studies.ensembles import ensemble_metrics, measure_ensembles
from gptlite.studies.progress import Progress
from gptlite.studies.queue import Queue
from gptlite.studies.settle import settle, share_cores
from gptlite.terminal import leave_when_terminated, tell, user_errors

if TYPE_CHECKING:
    from gptlite.runs.session import Watch

WARM_UP = 0.25
"""The share of a run before which a search does not give it up."""
SECONDS_BETWEEN_LOOKS = 1.0
"""At how far several workers are."""
Record = dict[str, Any]


class Pruned(UserError):
    """A search gives a run up: others were better at this step."""


def run_study(path: Path, folder: Path, workers: int, url: str | None) -> dict[str, Any]:
    """Do what is left of a study; returns what is written to study.json."""
    study = load_study(path)
    check_ready(folder)
    queue = Queue(study, folder, url)
    storage.write_text(folder / "study.yaml", path.read_text())
    threads = threads_of_each(workers)
    with queue.storage.translate_errors():
        if workers == 1:
            with Progress(queue, workers) as progress:
                take_runs(study, queue, threads, progress.look)
        else:
            run_workers(queue, workers, path, threads)
        if study.config.ensembles:
            measure_ensembles(study, folder, queue.records())
        found, busy = write_results(queue), queue.busy_workers()
    for worker, count in busy.items():
        told = f"{study.name}: {worker or 'another worker'} is still at {count} of the trials; once"
        tell(f"{told} they are done the same command tells of them")
    return found


def threads_of_each(workers: int) -> int:
    return max(1, machine.count_cores() // workers)


def check_ready(folder: Path) -> None:
    """Raises ConfigError if the folder for a study is a run, or if a package is missing."""
    if has_run(folder):
        raise ConfigError(f"--out-dir: {folder} contains a run; give another for the study")
    optuna()
    student_t()


def run_workers(queue: Queue, workers: int, path: Path, threads: int) -> None:
    """Several workers; told to leave, each saves and leaves. UserError if one of them failed."""
    context = multiprocessing.get_context("spawn")
    arguments = (path, queue.folder, queue.url, threads)
    children = []
    try:
        for _ in range(workers):
            children.append(context.Process(target=run_worker_process, args=arguments))
            children[-1].start()
        with Progress(queue, workers) as progress:
            while at_work := [process.sentinel for process in children if process.is_alive()]:
                connection.wait(at_work, SECONDS_BETWEEN_LOOKS)
                progress.look()
    except KeyboardInterrupt:
        for process in children:
            process.terminate()
        for process in children:
            process.join()
        raise
    failed = [process.exitcode for process in children if process.exitcode]
    if failed:
        error = UserError(f"{len(failed)} of {workers} workers failed; the same command goes on")
        error.exit_code = failed[0] if failed[0] > 0 else 1
        raise error


def run_worker_process(path: Path, folder: Path, url: str | None, threads: int) -> None:
    """A worker process. In a session of its own: a Ctrl-C reaches it once, through its parent."""
    if hasattr(os, "setsid"):
        os.setsid()
    leave_when_terminated()
    try:
        with user_errors():
            study = load_study(path)
            queue = Queue(study, folder, url)
            with queue.storage.translate_errors():
                take_runs(study, queue, threads)
    except typer.Exit as left:
        sys.exit(left.exit_code)


def take_runs(
    study: Study, queue: Queue, threads: int, look: Callable[[], None] = lambda: None
) -> None:
    """Take runs until none is left; `look` is called whenever something may have changed."""
    parent = multiprocessing.parent_process()
    with queue.register_worker() as worker:
        while (trial := queue.claim(worker)) is not None:
            look()
            runs: list[Record] = []
            for job in queue.jobs(trial):
                runs.append(run_job(queue, job, threads, watcher(trial, study, runs, look)))
                if runs[-1]["state"] != "done":
                    break
            queue.finish(trial, runs)
            write_results(queue)
            if parent is not None and not parent.is_alive():
                return


def watcher(
    trial: Any, study: Study, earlier: list[Record], look: Callable[[], None] = lambda: None
) -> "Watch":
    """What looks at validation losses: a search prunes by those of its first seed."""

    def watch(step: int, max_steps: int, val_loss: float) -> None:
        look()
        if study.config.search == "tpe" and not earlier:
            trial.report(val_loss, step)
            if step >= WARM_UP * max_steps and trial.should_prune():
                raise Pruned(f"pruned at step {step}: other points were better by then")

    return watch


def run_job(queue: Queue, job: Job, threads: int, watch: "Watch") -> Record:
    """Train and measure one run, or what is left of it; a run that diverges is an outcome too."""
    study, directory = queue.study, queue.folder / "runs" / job.name
    state, why = "done", None
    results: dict[str, Any] = {}
    try:
        with open(os.devnull, "w") as silent, redirect_stderr(silent):  # train.log has it all
            while not (directory / "summary.json").is_file():
                train_job(queue, job.run, directory, threads, watch)
            results = measure_run(study, directory)
    except (DivergedError, Pruned) as error:
        state, why = "failed" if isinstance(error, DivergedError) else "pruned", str(error)
    dtype = None  # the precision that the run was trained in, as it last was
    if has_run(directory):
        dtype = load_run([str(directory / "config.yaml")]).dtype
    return {
        "name": job.name,
        "label": job.point.label,
        "point": job.point.coordinates,
        "seed": job.seed,
        "host": platform.node(),
        "directory": str(directory),
        "dtype": dtype,
        "state": state,
        "why": why,
        "measured": study.measurement,
        "metrics": {**trained_metrics(directory), **dict(numbers(results))},
    }


def train_job(queue: Queue, run: RunConfig, directory: Path, threads: int, watch: "Watch") -> None:
    """One run, as all runs of the study compute."""
    from gptlite.runs import start

    run = settle(queue, share_cores(run, threads))
    try:
        start.train(run, directory, resume=has_run(directory), watch=watch)
    except Stopped as stopped:
        told = f"{directory}: stopped, saved; go on with: the same command"
        raise Stopped(stopped.exit_code - 128, told) from None
    except RunInUseError:  # a search may try one point twice at a time: the other trains it
        time.sleep(1)


def measure_run(study: Study, directory: Path) -> dict[str, Any]:
    """Results of the study's suites, which are also written to eval/ of the run."""
    if not study.config.evaluate:
        return {}
    from gptlite.data.prepare import open_split
    from gptlite.measure import suites
    from gptlite.runs.trained import load_trained

    # What training says of the whole split can be compared with it.
    effort = suites.FAST._replace(loss_rows=None) if study.config.fast else suites.FULL
    first, *others = study.config.checkpoints
    split = study.config.split
    found: dict[str, Any] = {}
    for which in (first, *others):
        trained = load_trained(directory, which)
        before = trained.state.data_digest
        files = partial(open_split, trained.run, trained.tokenizer, split, before)
        results = suites.run_suites(trained, split, study.config.evaluate, files, effort=effort)
        suites.save_results(directory, split, trained.state.step, results, False)
        found |= results if which == first else {which: results}
    return found


def trained_metrics(directory: Path) -> dict[str, float]:
    """What training itself wrote down."""
    rows = read_rows(directory / "metrics.jsonl", [])
    best = best_evaluation(rows)
    if best is None:
        return {}
    last = evaluations(rows)[-1]
    metrics = {
        "best_val_loss": best["val/loss"],
        "best_step": best["step"],
        "best_epoch": best["epoch"],
        "val_loss": last["val/loss"],
        "train_loss": last.get("train/loss_dropout_off"),
        "generalisation_gap": generalisation_gap(last),
        "epochs": last["epoch"],
        "seconds": last["elapsed_seconds"],
    }
    return {name: value for name, value in metrics.items() if value is not None}


def numbers(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number by its dotted name; of an interval its value."""
    for name, value in scalars(results):
        number = value["value"] if isinstance(value, dict) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield name, number


def write_results(queue: Queue) -> dict[str, Any]:
    """study.json as of now."""
    with queue.lock():
        found = results(queue.study, queue.records(), queue.folder)
        storage.write_json(queue.folder / "study.json", found)
    return found


def results(study: Study, records: list[Record], folder: Path) -> dict[str, Any]:
    """All that is known: runs, points over their seeds, and points against their baseline."""
    search = study.config.search == "tpe"
    known = {record["name"] for record in records}
    missing = [] if search else [job for job in study.jobs if job.name not in known]
    points = {record["label"]: record["point"] for record in records}
    if not search:
        points = {job.point.label: job.point.coordinates for job in study.jobs}
    done = [record for record in records if record["state"] == "done"]
    together = ensemble_metrics(study, folder, records) if study.config.ensembles else {}
    return {
        "name": study.name,
        "base": study.config.base,
        "set": study.config.set,
        "axes": {
            axis: values if isinstance(values, list) else values.model_dump()
            for axis, values in study.axes.items()
        },
        "seeds": list(study.config.seeds),
        "baseline": study.baseline,
        "table": list(study.config.table),
        "metrics": list(dict.fromkeys(name for record in done for name in record["metrics"])),
        "runs": [*records, *map(missing_record, missing)],
        "points": [
            {
                "label": label,
                "point": point,
                "metrics": summary(metrics_by_seed(done, label))
                | of_one(together.get(label, {}), "ensemble."),
            }
            for label, point in points.items()
        ],
        "comparisons": comparisons(study, points, done),
        "notes": list(precision_notes(done)),
    }


def precision_notes(done: list[Record]) -> Iterator[str]:
    """Says so if runs were trained in several precisions though no axis asks for it: two runs
    that differ by it are no fair pair."""
    dtypes = [r["dtype"] for r in done if r.get("dtype") and "dtype" not in r["point"]]
    if len(set(dtypes)) > 1:
        counts = ", ".join(f"{dtypes.count(dtype)} in {dtype}" for dtype in sorted(set(dtypes)))
        yield f"not all runs were trained in one precision ({counts}); study.json says which"


def missing_record(job: Job) -> Record:
    about = {"name": job.name, "label": job.point.label, "point": job.point.coordinates}
    return {**about, "seed": job.seed, "state": "missing", "why": None, "metrics": {}}


def metrics_by_seed(records: list[Record], label: str) -> dict[int, dict[str, float]]:
    return {r["seed"]: r["metrics"] for r in records if r["label"] == label}


def summary(of_point: dict[int, dict[str, float]]) -> dict[str, Any]:
    names = dict.fromkeys(name for metrics in of_point.values() for name in metrics)
    return {
        name: mean_over_seeds([metrics[name] for metrics in of_point.values() if name in metrics])
        for name in names
    }


def of_one(result: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Metrics of what there is one of for all seeds."""
    return {prefix + name: mean_over_seeds([value]) for name, value in numbers(result)}


def comparisons(study: Study, points: dict[str, Any], done: list[Record]) -> list[dict[str, Any]]:
    """Each point with the one that differs from it by the baseline's values only, in pairs."""
    found: dict[str, list[dict[str, Any]]] = {}
    labels = {study.point(point).label: label for label, point in points.items()}
    for label, point in points.items():
        other = labels.get(study.point({**point, **study.baseline}).label)
        if other is None or other == label:
            continue
        mine, theirs = metrics_by_seed(done, label), metrics_by_seed(done, other)
        pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
        for name in dict.fromkeys(name for a, b in pairs for name in a if name in b):
            both = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
            about = {"label": label, "point": point, "against": other, "metric": name}
            difference = paired_difference([a for a, _ in both], [b for _, b in both])
            found.setdefault(name, []).append({**about, **difference})
    for of_metric in found.values():
        mark_above_noise(of_metric)
    return [comparison for of_metric in found.values() for comparison in of_metric]
