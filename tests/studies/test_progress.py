"""How far a study is and how long it still takes, from what its runs took."""

import io
import re
from datetime import datetime, timedelta
from typing import Any

import pytest
from conftest import RATES, Bench

from gptlite.studies import progress
from gptlite.studies.config import load_study
from gptlite.studies.progress import Progress, find_standing, spread
from gptlite.studies.queue import Queue


def test_the_last_of_several_workers_is_what_one_waits_for() -> None:
    assert spread([10.0] * 5, 1) == 50
    assert spread([10.0] * 5, 2) == 30
    assert spread([30.0, 10.0, 10.0], 2) == 30
    assert spread([], 3) == 0
    assert spread([10.0], 2, begun=[4.0, 25.0]) == 25
    assert spread([10.0, 10.0], 1, begun=[4.0, 6.0]) == 16  # the other is on another machine


class Clock:
    """A queue in which runs take as long as the test says."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> None:
        self.queue = Queue(
            load_study(bench.write(**{**RATES, "seeds": [1, 2, 3], **keys})), bench.out
        )
        self.took: dict[int, float] = {}
        self.elapsed = 0.0
        read = self.queue.trials.get_trials

        def get_trials(**asked: Any) -> list[Any]:
            found = read(**{**asked, "deepcopy": True})
            for trial in found:
                trial.datetime_start = datetime(2026, 1, 1)
                if trial.datetime_complete:
                    took = timedelta(seconds=self.took[trial.number])
                    trial.datetime_complete = trial.datetime_start + took
            return found

        monkeypatch.setattr(self.queue.trials, "get_trials", get_trials)
        monkeypatch.setattr(progress, "seconds_since", lambda moment: self.elapsed)

    def finish(self, worker: str, seconds: float, state: str = "done") -> None:
        trial = self.queue.claim(worker)
        name = trial.user_attrs["job"]
        label = next(job.point.label for job in self.queue.study.jobs if job.name == name)
        record = {
            **{"name": name, "label": label, "seed": 1, "state": state, "why": "it diverged"},
            **{"measured": self.queue.study.measurement},
            "metrics": {"best_val_loss": 2.5, "seconds": seconds},
        }
        self.took[trial.number] = seconds
        self.queue.finish(trial, [record])


def test_time_left_follows_from_the_runs_of_a_point_and_the_workers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(bench, monkeypatch)
    with clock.queue.register_worker() as worker:
        assert find_standing(clock.queue, 1)[:2] == (6, 0)
        assert find_standing(clock.queue, 1).seconds_left is None
        clock.finish(worker, 60)
        assert find_standing(clock.queue, 1).seconds_left == 300
        clock.finish(worker, 120)  # the other point is slower: two of each are left
        assert find_standing(clock.queue, 1).seconds_left == 360
        assert find_standing(clock.queue, 2).seconds_left == 240
        clock.queue.claim(worker)
        clock.elapsed = 20
        assert find_standing(clock.queue, 1).seconds_left == 40 + 60 + 120 + 120
        clock.elapsed = 1e9  # a laptop slept
        assert find_standing(clock.queue, 1).seconds_left == 60 + 120 + 120


def test_a_run_that_failed_says_nothing_about_the_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(bench, monkeypatch)
    with clock.queue.register_worker() as worker:
        clock.finish(worker, 1, state="failed")
        standing = find_standing(clock.queue, 1)
        assert (standing.n_done, standing.seconds_left) == (1, None)


def test_a_search_counts_points(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"optim.lr": {"low": 1e-4, "high": 1e-1}}
    clock = Clock(bench, monkeypatch, axes=axes, search="tpe", trials=4)
    with clock.queue.register_worker() as worker:
        trial = clock.queue.claim(worker)
        runs = [
            {"name": job.name, "state": "done", "measured": clock.queue.study.measurement}
            | {"metrics": {"best_val_loss": 1.0}}
            for job in clock.queue.jobs(trial)
        ]
        clock.took[trial.number] = 30
        clock.queue.finish(trial, runs)
    standing = find_standing(clock.queue, 1)
    assert (standing.n_units, standing.n_done, len(standing.records)) == (4, 1, 3)
    assert standing.seconds_left == 90
    shown = Progress(clock.queue, 1)
    assert shown.words(standing) == "1 of 4 points, about 90 s left"


def test_without_a_bar_each_run_is_a_line_that_says_how_many(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(bench, monkeypatch)
    with clock.queue.register_worker() as worker, Progress(clock.queue, 1) as shown:
        clock.finish(worker, 60)
        shown.look()
        shown.look()
        clock.finish(worker, 60)
        clock.finish(worker, 60)
        shown.look()
        for _ in range(3):
            clock.finish(worker, 60)
        shown.look()
    told = capsys.readouterr().err.splitlines()
    line = "best validation loss 2.5000 nats (1:00 of training)"
    assert told == [
        "tiny: 0 of 6",
        f"rate=0, seed 1: {line}; 1 of 6, about 5 min left",
        f"rate=0.3, seed 1: {line}",
        f"rate=0, seed 1: {line}; 3 of 6, about 3 min left",
        f"rate=0.3, seed 1: {line}",
        f"rate=0, seed 1: {line}",
        f"rate=0.3, seed 1: {line}; 6 of 6",
    ]


class Screen(io.StringIO):
    """A terminal so wide, that a person looks at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_bar_fits_its_terminal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    clock, screen = Clock(bench, monkeypatch), Screen()
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    with clock.queue.register_worker() as worker, Progress(clock.queue, 1) as shown:
        clock.finish(worker, 60)
        shown.look()
        clock.finish(worker, 60)
        shown.look()
        drawn = screen.getvalue()
    lines = [line for line in re.split(r"[\r\n]", drawn) if "|" in line]
    assert [line.partition(" |")[0] for line in lines][-1] == "2 of 6, about 4 min left"
    assert lines[0].startswith("0 of 6 |")
    assert all(len(line) < columns + 1 for line in lines)
    assert len(lines[-1]) > columns - 3
    assert "rate=0, seed 1: best validation loss" in drawn
