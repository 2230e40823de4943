"""How many runs a study has and about how long they take, before any is trained.

A little of two points is done here, as `gptlite train --data` does before it chooses a model: of
the one with the least work in an update and of the one with the most. The others lie between.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptlite.config.run import RunConfig
from gptlite.runs.origin import given_tokenizer
from gptlite.studies.config import Job, Study
from gptlite.studies.progress import spread
from gptlite.studies.settle import fastest, share_cores
from gptlite.studies.study import threads_of_each
from gptlite.terminal import describe_duration
from gptlite.words import count

if TYPE_CHECKING:
    from gptlite.data.token_files import TokenFiles
    from gptlite.planning.rehearsal import Costs

SECONDS = 0.5
"""For timing the updates of a point."""


class Estimate(NamedTuple):
    points: list[str]
    """None of a search, which finds its own."""
    n_points: int
    n_seeds: int
    n_left: int
    """Runs that are not trained yet."""
    workers: int
    seconds: float
    """Until the last of those is trained and its loss is measured."""
    uncounted: list[str]
    """What a run does besides, which may take long."""

    @property
    def n_runs(self) -> int:
        return self.n_points * self.n_seeds

    def words(self) -> str:
        """As in: 9 runs (3 points, 3 seeds), about 12 min with 1 worker."""
        counts = f"{count(self.n_points, 'point')}, {count(self.n_seeds, 'seed')}"
        said = f"{count(self.n_runs, 'run')} ({counts})"
        if not self.n_left:
            return f"{said}, all of them trained"
        if self.n_left < self.n_runs:
            said += f", {self.n_left} of them left"
        said += f", about {describe_duration(self.seconds)} with {count(self.workers, 'worker')}"
        return said + (f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else "")

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "n_runs": self.n_runs}


def estimate_study(study: Study, folder: Path, workers: int) -> Estimate:
    """Nothing of the study is written; text that is new is tokenized, as by `gptlite plan`."""
    config, labels = study.config, [point.label for point in study.points]
    search = config.search == "tpe"
    n_points = config.trials if search else len(labels)
    left = [] if search else [job.point.label for job in study.jobs if not is_trained(job, folder)]
    n_left = n_points * len(config.seeds) if search else len(left)
    seconds = 0.0
    if n_left:
        each = dict(zip(labels, seconds_of_points(study, workers), strict=True))
        usual = sum(each.values()) / len(each)
        seconds = spread([each[label] for label in left] or [usual] * n_left, workers)
    return Estimate(
        points=[] if search else labels,
        n_points=n_points,
        n_seeds=len(config.seeds),
        n_left=n_left,
        workers=workers,
        seconds=seconds,
        uncounted=[suite for suite in config.evaluate if suite != "loss"],
    )


def is_trained(job: Job, folder: Path) -> bool:
    return (folder / "runs" / job.name / "summary.json").is_file()


def seconds_of_points(study: Study, workers: int) -> list[float]:
    """About how long a run of each point takes, beside so many others at a time."""
    from gptlite.data.prepare import prepare
    from gptlite.planning.plan import flops_per_token
    from gptlite.planning.rehearsal import rehearse

    runs = as_trained(study, workers)
    files = [prepare(run, given_tokenizer(run)) for run in runs]
    work = [
        run.train.batch_size
        * run.model.context_length
        * flops_per_token(run, of_run.meta["vocab_size"])
        for run, of_run in zip(runs, files, strict=True)
    ]
    least, most = work.index(min(work)), len(work) - 1 - work[::-1].index(max(work))
    costs = {at: rehearse(runs[at], files[at], SECONDS) for at in dict.fromkeys((least, most))}
    wide = work[most] - work[least]
    found = []
    for run, of_run, flops in zip(runs, files, work, strict=True):
        low, high = (run_seconds(costs[at], run, of_run) for at in (least, most))
        found.append(low + (high - low) * ((flops - work[least]) / wide if wide else 0.5))
    return found


def as_trained(study: Study, workers: int) -> list[RunConfig]:
    """A run of each point as a worker trains it, but not compiled: that takes longer than all of
    the rest."""
    threads = threads_of_each(workers)
    runs = [share_cores(run, threads) for run in study.first_runs()]
    unsettled = [run for run in runs if run.dtype == "auto"]
    dtype = fastest(study, unsettled[0], "dtype") if unsettled else ""  # once for all
    return [
        run.model_copy(
            update={"compile": False, "dtype": dtype if run.dtype == "auto" else run.dtype}
        )
        for run in runs
    ]


def run_seconds(costs: "Costs", run: RunConfig, files: "TokenFiles") -> float:
    """Training with its evaluations and checkpoints, and then once more all of the loss."""
    from gptlite.planning.rehearsal import count_evaluated

    train, n_rows = run.train, files.rows("train", run.model.context_length).n_rows
    n_val = files.rows("val", run.model.context_length).n_swept
    steps = run.planned_steps(n_rows)
    look = costs.save + costs.evaluation.seconds_for(count_evaluated(run, files), n_rows)
    training = steps * costs.update + math.ceil(steps / train.eval_interval) * look
    training += steps / train.save_interval * costs.save
    training = min(training, 60 * (train.max_minutes or math.inf))
    return costs.begin + training + costs.sample + costs.evaluation.seconds_for(n_val, n_rows)
