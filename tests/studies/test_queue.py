"""The queue of a study: every run is one worker's, whoever dies and whoever asks at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import RATES, Bench

from gptlite.studies.config import Study, load_study
from gptlite.studies.queue import Queue


def test_a_dead_workers_run_is_taken_up_and_a_living_ones_is_not(bench: Bench) -> None:
    queue = Queue(load_study(bench.write(**RATES)), bench.out)
    with queue.register_worker() as worker:
        mine = queue.claim(worker)
        other = Queue(queue.study, bench.out)
        theirs = other.claim(worker)
        assert mine.user_attrs["job"] != theirs.user_attrs["job"]
        two = [other.claim(worker).user_attrs["job"] for _ in range(2)]
        assert other.claim(worker) is None
    with queue.register_worker() as worker:  # all of them died with their worker
        again = [queue.claim(worker).user_attrs["job"] for _ in range(4)]
    assert again == [job.name for job in queue.study.jobs]
    assert {mine.user_attrs["job"], theirs.user_attrs["job"], *two} == set(again)


def test_a_worker_on_a_disk_that_cannot_be_seen_counts_as_living(bench: Bench) -> None:
    queue = Queue(load_study(bench.write(**RATES, seeds=[1])), bench.out)
    queue.claim("another-machine-17")
    with queue.register_worker() as worker:
        assert queue.claim(worker) is not None
        assert queue.claim(worker) is None


def test_machines_without_a_common_disk_do_no_run_twice(bench: Bench) -> None:
    """Three with nothing but a database between them, all asking at once."""
    made = load_study(bench.write(axes={"optim.lr": [0.001, 0.002, 0.003, 0.004]}, seeds=[1]))
    url = f"sqlite:///{bench.folder}/db"
    machines = [Queue(made, bench.folder / name, url) for name in "abc"]
    together = threading.Barrier(len(machines))

    def all_of(queue: Queue) -> list[str]:
        claimed = []
        with queue.register_worker() as worker:
            together.wait()
            while (trial := queue.claim(worker)) is not None:
                claimed.append(trial.user_attrs["job"])
                queue.finish(trial, [ended(claimed[-1], made)])
        return claimed

    with ThreadPoolExecutor(len(machines)) as pool:
        claimed = [name for names in pool.map(all_of, machines) for name in names]
    assert sorted(claimed) == sorted(job.name for job in made.jobs)


def ended(name: str, made: Study, state: str = "done", loss: float = 1.0) -> dict[str, Any]:
    return {
        **{"name": name, "state": state, "measured": made.measurement},
        "metrics": {"best_val_loss": loss},
    }


def test_a_claim_that_another_made_first_is_let_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine's trial is not seen until ours is written."""
    made = load_study(bench.write(**RATES, seeds=[1]))
    here, there = (
        Queue(made, bench.folder / name, f"sqlite:///{bench.folder}/db") for name in "ab"
    )
    begin = here.begin

    def late(worker: str, job: str) -> Any:
        monkeypatch.setattr(here, "begin", begin)
        there.claim("another-machine-17")
        return begin(worker, job)

    monkeypatch.setattr(here, "begin", late)
    with here.register_worker() as worker:
        assert here.claim(worker).user_attrs["job"] == made.jobs[1].name
        assert here.claim(worker) is None


def test_a_search_is_not_drawn_to_runs_that_diverged(bench: Bench) -> None:
    axes = {"optim.lr": {"low": 1e-4, "high": 1e-1}}
    queue = Queue(load_study(bench.write(axes=axes, search="tpe", trials=3)), bench.out)
    with queue.register_worker() as worker:
        for state in ("failed", "pruned", "done"):
            trial = queue.claim(worker)
            queue.jobs(trial)
            queue.finish(trial, [ended(state, queue.study, state, loss=0.5)])
        assert queue.claim(worker) is None
    told = [(trial.state.name, trial.value) for trial in queue.trials.trials]
    assert told == [("FAIL", None), ("PRUNED", None), ("COMPLETE", 0.5)]
