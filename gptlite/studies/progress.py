"""How far a study is: a bar on a terminal, else a line for each run that has ended.

Both say "4 of 9, about 7 min left". The time follows from how long the runs took that are done,
those of the same point first, and from how many workers there are, on whatever machine.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from heapq import heapify, heapreplace
from statistics import mean
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from gptlite.errors import StorageError
from gptlite.studies.queue import Queue
from gptlite.studies.table import outcome
from gptlite.terminal import columns_of, describe_duration, wants_bar
from gptlite.words import escape_controls

Labelled = Sequence[tuple[str, Any]]
"""Trials, each with the label of its point."""


class Standing(NamedTuple):
    """A unit is a run of a grid, or a point of a search with all its seeds."""

    n_units: int
    n_done: int
    records: list[dict[str, Any]]
    """Of the runs that are done."""
    seconds_left: float | None
    """None: nothing is done yet that says how long it takes."""


class Progress:
    """Shows the standing of a study, each time that `look` is called."""

    def __init__(self, queue: Queue, workers: int) -> None:
        self.queue, self.workers = queue, workers
        self.stream = sys.stderr  # while a run trains, sys.stderr is another
        standing = find_standing(queue, workers)
        self.seen = {record["name"] for record in standing.records}
        self.bar = tqdm(
            desc=self.words(standing),
            total=standing.n_units,
            initial=standing.n_done,
            disable=not wants_bar("auto", sys.stderr),
            leave=False,
            ncols=columns_of(sys.stderr),
            file=sys.stderr,
            bar_format="{desc} |{bar}|",
        )
        if self.bar.disable and standing.n_done < standing.n_units:
            self.say(f"{queue.study.name}: {self.words(standing)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.look()  # whatever ends a study, the last run is told of
        self.bar.close()

    def look(self) -> None:
        """Tell what has changed; the runs go on where the queue cannot be read just now."""
        with suppress(StorageError), self.queue.storage.translate_errors():
            self.show(find_standing(self.queue, self.workers))

    def show(self, standing: Standing) -> None:
        fresh = [record for record in standing.records if record["name"] not in self.seen]
        self.seen |= {record["name"] for record in fresh}
        for record in fresh:
            last = record is fresh[-1] and self.bar.disable  # which says it otherwise
            self.say(f"{outcome(record)}; {self.words(standing)}" if last else outcome(record))
        self.move_bar(standing)

    def move_bar(self, standing: Standing) -> None:
        if not self.bar.disable:
            self.bar.ncols = columns_of(self.stream)  # it may be another window by now
            self.bar.n = standing.n_done
            self.bar.set_description_str(self.words(standing))

    def words(self, standing: Standing) -> str:
        points = " points" if self.queue.study.config.search == "tpe" else ""
        said = f"{standing.n_done} of {standing.n_units}{points}"
        if standing.n_done == standing.n_units or standing.seconds_left is None:
            return said
        return f"{said}, about {describe_duration(standing.seconds_left)} left"

    def say(self, line: str) -> None:
        line = escape_controls(line)
        if self.bar.disable:
            print(line, file=self.stream, flush=True)
        else:
            self.bar.write(line, file=self.stream)


def find_standing(queue: Queue, workers: int) -> Standing:
    """How far a study is, at which so many workers of this command are, besides those of others."""
    trials = {unit_of(trial): trial for trial in queue.current_trials()}
    if queue.study.config.search == "tpe":
        labels = dict.fromkeys(trials, "")
        waiting = [""] * (queue.study.config.trials - len(trials))
    else:
        labels = {job.name: job.point.label for job in queue.study.jobs}
        trials = {unit: trial for unit, trial in trials.items() if unit in labels}
        waiting = [label for unit, label in labels.items() if unit not in trials]
    running = queue.states.RUNNING
    at_work = [(labels[unit], t) for unit, t in trials.items() if t.state == running]
    done = [(labels[unit], t) for unit, t in trials.items() if t.state != running]
    ended = [(label, trial) for label, trial in done if trial.state == queue.states.COMPLETE]
    return Standing(
        n_units=len(trials) + len(waiting),
        n_done=len(done),
        records=[record for _, trial in done for record in trial.user_attrs["runs"]],
        seconds_left=find_seconds_left(ended, at_work, waiting, workers) if ended else None,
    )


def find_seconds_left(
    ended: Labelled, at_work: Labelled, waiting: Sequence[str], workers: int
) -> float:
    """Each unit takes as long as those of its point did, or as all did where none has ended."""
    took: dict[str, list[float]] = {}
    for label, trial in ended:
        took.setdefault(label, []).append(trial.duration.total_seconds())
    typical = {label: mean(of_point) for label, of_point in took.items()}
    usual = mean(seconds for of_point in took.values() for seconds in of_point)
    begun = [
        max(0.0, typical.get(label, usual) - max(0.0, seconds_since(trial.datetime_start)))
        for label, trial in at_work
    ]
    return spread([typical.get(label, usual) for label in waiting], workers, begun)


def unit_of(trial: Any) -> str:
    return str(trial.user_attrs.get("job", trial.number))


def seconds_since(moment: datetime) -> float:
    return (datetime.now() - moment).total_seconds()


def spread(seconds: Iterable[float], workers: int, begun: Sequence[float] = ()) -> float:
    """When the last of these runs is done, if each worker takes the next as soon as it is free;
    `begun` is what is left of the runs that some of them, or workers elsewhere, are at."""
    free_at = [*begun, *[0.0] * (workers - len(begun))]
    heapify(free_at)
    for run in seconds:
        heapreplace(free_at, free_at[0] + run)
    return max(free_at)
