"""Who does which run of a study: a queue in Optuna's storage, shared by processes and machines.

A trial is a run of a grid, or a point of a search with all its seeds. Its user attributes say
which, who works on it and what came of it. A worker holds a lock for as long as it lives; when it
dies its trials are taken up by others, but for those on disks where its lock cannot be seen.
Machines that share a database alone take the same run at the same time; the first trial counts.
Optuna's heartbeat is no substitute for the lock: a journal has none, it beats in `optimize` alone,
not with ask and tell, and a laptop that slept longer than the grace period would lose its run.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptlite import locks, storage
from gptlite.errors import ConfigError, RunInUseError
from gptlite.keys import key
from gptlite.runs.directory import has_run, hold_directory, refuse_if_held
from gptlite.studies.config import Job, Range, Study, value_label
from gptlite.studies.database import StudyStorage, optuna


class Queue:
    """The trials of a study in its folder; `url` is a database instead of the folder's journal."""

    def __init__(self, study: Study, folder: Path, url: str | None = None) -> None:
        self.study = study
        self.folder, self.url = folder, url
        self.storage = StudyStorage(folder / "journal.log", url)
        self.storage.check()
        storage.make_folders(folder / "workers")
        with self.lock():
            self.trials = self.storage.open_study(study.name)
        self.states = optuna().trial.TrialState

    def sampler(self, number: int) -> Any:
        """Named by the trial, so that no two workers draw the same, and nobody who goes on."""
        seed = key(self.study.name, self.study.config.seeds[0], number) % 2**32
        return optuna().samplers.TPESampler(seed=seed, constant_liar=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While one worker looks for work, the others on this disk wait."""
        with locks.hold_folder(self.folder):
            yield

    @contextmanager
    def register_worker(self) -> Iterator[str]:
        """The name of a new worker, which counts as living until it leaves or its process ends."""
        name = f"{platform.node()}-{os.getpid()}-{time.time_ns()}"
        storage.make_folders(self.folder / "workers" / name)
        with hold_directory(self.folder / "workers" / name):
            yield name

    def settle_once(self, name: str, choose: Callable[[], str]) -> str:
        """What was chosen first for all runs of the study, as a trial that nobody runs: of those
        that choose at the same time on two machines the first counts."""
        with self.lock():
            if not self.choices(name):
                made = optuna().trial.create_trial(
                    state=self.states.FAIL, user_attrs={"chosen": name, "value": choose()}
                )
                self.trials.add_trial(made)
            return self.choices(name)[0]

    def choices(self, name: str) -> list[str]:
        attributes = [trial.user_attrs for trial in self.trials.get_trials()]
        return [str(about["value"]) for about in attributes if about.get("chosen") == name]

    def claim(self, worker: str) -> Any:
        """A trial to work on, now this worker's; None if none is left."""
        with self.lock():
            self.free_abandoned_trials()
            grid = self.study.config.search == "grid"
            return self.claim_run(worker) if grid else self.claim_point(worker)

    def free_abandoned_trials(self) -> None:
        """Free the trials of workers that have died."""
        for trial in self.running_trials():
            if self.is_dead(trial.user_attrs.get("worker", "")):
                self.trials.tell(trial.number, state=self.states.FAIL)
                if self.study.config.search == "tpe":
                    self.trials.enqueue_trial(trial.params)

    def is_dead(self, worker: str) -> bool:
        """Whether a worker that this disk knows holds its lock no more. One that has just begun a
        trial and not said so died in between, or `lock` would still keep us out; if all share
        this disk, that is."""
        folder = self.folder / "workers" / worker
        if not worker or not folder.is_dir():
            return not worker and self.url is None
        try:
            refuse_if_held(folder)
        except RunInUseError:
            return False
        return True

    def running_trials(self) -> list[Any]:
        running = (self.states.RUNNING,)
        found: list[Any] = self.trials.get_trials(deepcopy=False, states=running)
        return found

    def claim_run(self, worker: str) -> Any:
        """The first run that nobody has done or does; what was begun on this disk
        before the others, as elsewhere it would be trained from its beginning."""
        runs = self.folder / "runs"
        jobs = sorted(self.study.jobs, key=lambda job: not has_run(runs / job.name))
        names = [job.name for job in jobs]
        while left := [name for name in names if name not in self.first_trials()]:
            trial = self.begin(worker, left[0])
            if self.first_trials()[left[0]] == trial.number:
                return trial
            self.trials.tell(trial, state=self.states.FAIL)
        return None

    def begin(self, worker: str, job: str) -> Any:
        """A new trial for a run. Its number, worker and run are written at once: whoever has a
        later number has seen it, and lets go of the same run."""
        library = optuna().trial
        about = {"worker": worker, "job": job}
        self.trials.add_trial(library.create_trial(state=self.states.RUNNING, user_attrs=about))
        mine = [t for t in self.running_trials() if t.user_attrs == about]
        return library.Trial(self.trials, mine[-1]._trial_id)  # Optuna has no public way

    def first_trials(self) -> dict[str, int]:
        """Of each run that is being done or done, the number of the trial that counts."""
        first: dict[str, int] = {}
        for trial in self.trials.get_trials():
            if self.is_current(trial) and "job" in trial.user_attrs:
                first.setdefault(trial.user_attrs["job"], trial.number)
        return first

    def claim_point(self, worker: str) -> Any:
        """A point that was measured otherwise, or a new one."""
        trials = self.trials.get_trials()
        standing = [trial.params for trial in trials if self.is_current(trial)]
        for trial in trials:
            if trial.user_attrs.get("runs") and trial.params not in standing:
                self.trials.enqueue_trial(trial.params)
                return self.ask(worker)
        return self.ask(worker) if len(standing) < self.study.config.trials else None

    def ask(self, worker: str) -> Any:
        """Where the search looks next."""
        trial = self.trials.ask()
        trial.set_user_attr("worker", worker)
        self.trials.sampler = self.sampler(trial.number)
        return trial

    def busy_workers(self) -> dict[str, int]:
        """How many trials each worker is at that this disk does not know to be dead."""
        at_work = [trial.user_attrs.get("worker", "") for trial in self.running_trials()]
        return {name: at_work.count(name) for name in at_work if not self.is_dead(name)}

    def current_trials(self) -> list[Any]:
        """Those that are done and measured as the study says now, and those of living workers."""
        known = [t for t in self.trials.get_trials(deepcopy=False) if self.is_current(t)]
        done = [t for t in known if t.state != self.states.RUNNING]
        at_work = [t for t in known if t.state == self.states.RUNNING]
        return done + [t for t in at_work if not self.is_dead(t.user_attrs.get("worker", ""))]

    def is_current(self, trial: Any) -> bool:
        """Whether a trial is being done, or done and measured as the study says now."""
        if trial.state == self.states.RUNNING:
            return True
        runs = trial.user_attrs.get("runs", [])
        return bool(runs) and all(run["measured"] == self.study.measurement for run in runs)

    def jobs(self, trial: Any) -> list[Job]:
        """What has to be run for a trial."""
        if self.study.config.search == "grid":
            name = trial.user_attrs["job"]
            return [job for job in self.study.jobs if job.name == name]
        point = self.study.point(self.coordinates(trial))
        return [self.study.job(point, seed) for seed in self.study.config.seeds]

    def coordinates(self, trial: Any) -> dict[str, Any]:
        """Where a search looks next. Raises ConfigError if the axes are not what they were."""
        found: dict[str, Any] = {}
        try:
            for axis, values in self.study.axes.items():
                if isinstance(values, Range):
                    low, high = values.low, values.high
                    found[axis] = trial.suggest_float(axis, low, high, log=values.log)
                else:
                    labels = [value_label(value) for value in values]
                    chosen = trial.suggest_categorical(axis, labels)
                    found[axis] = values[labels.index(chosen)]
        except ValueError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"axes: changed since the search began ({why})") from None
        return found

    def finish(self, trial: Any, runs: list[dict[str, Any]]) -> None:
        """What came of a trial: one record per run."""
        trial.set_user_attr("runs", runs)
        ended = {run["state"] for run in runs}
        if ended == {"done"}:
            losses = [run["metrics"]["best_val_loss"] for run in runs]
            self.trials.tell(trial, sum(losses) / len(losses))
        else:
            pruned = "pruned" in ended
            self.trials.tell(trial, state=self.states.PRUNED if pruned else self.states.FAIL)

    def records(self) -> list[dict[str, Any]]:
        """Every run with an outcome, in the order of the study."""
        found = [run for t in self.trials.get_trials() for run in t.user_attrs.get("runs", [])]
        by_name = {record["name"]: record for record in found}
        if self.study.config.search == "tpe":
            return list(by_name.values())
        return [by_name[job.name] for job in self.study.jobs if job.name in by_name]
