"""About how long a study takes, from the cost of its lightest and of its heaviest point."""

from typing import Any

import pytest
from conftest import Bench

from gptlite.data.prepare import prepare
from gptlite.planning import rehearsal
from gptlite.planning.rehearsal import Costs, EvaluationPace
from gptlite.studies import estimate
from gptlite.studies.config import load_study
from gptlite.studies.estimate import estimate_study, run_seconds, seconds_of_points

FREE = Costs(0.0, 0.0, EvaluationPace(0.0, 64), 0.0, 0.0)


def test_a_run_is_its_updates_looks_saves_and_what_is_done_once(bench: Bench) -> None:
    keys: dict[str, Any] = {"train.max_steps": 20, "train.eval_interval": 8}
    made = load_study(bench.write(set={**keys, "train.save_interval": 10}))
    run = made.jobs[0].run
    files = prepare(run)
    assert run_seconds(FREE._replace(begin=5.0, sample=2.0), run, files) == 7
    assert run_seconds(FREE._replace(update=3.0), run, files) == 60
    assert run_seconds(FREE._replace(save=1.0), run, files) == 3 + 2  # looks save the best one
    look = EvaluationPace(1.0, 64).seconds_for(
        files.rows("val", 16).n_swept, files.rows("train", 16).n_rows
    )
    assert run_seconds(FREE._replace(evaluation=EvaluationPace(1.0, 64)), run, files) == 4 * look
    train = run.train.model_copy(update={"max_minutes": 0.5})
    timed = run.model_copy(update={"train": train})
    assert run_seconds(FREE._replace(update=3.0, begin=5.0), timed, files) == 35


def test_points_lie_between_the_lightest_and_the_heaviest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def rehearse(run: Any, files: Any, seconds: float) -> Costs:
        tried.append((run.model.n_layer, run.dropout.rate, run.train.threads, run.compile))
        return FREE._replace(update=float(run.model.n_layer))

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(estimate, "threads_of_each", lambda workers: 8 // workers)
    axes = {"model.n_layer": [2, 1, 3], "dropout.rate": [0, 0.1]}
    made = load_study(bench.write(axes=axes, set={"train.threads": "auto"}))
    each = seconds_of_points(made, 2)
    assert each == pytest.approx([16, 16, 8, 8, 24, 24])  # 8 updates
    assert tried == [(1, 0.0, 4, False), (3, 0.1, 4, False)]
    assert estimate_study(made, bench.out, 1).seconds == pytest.approx(2 * 96)
    assert estimate_study(made, bench.out, 12).seconds == pytest.approx(24)
    one = load_study(bench.write(axes={"dropout.rate": [0]}))
    assert seconds_of_points(one, 2) == [16]


def test_a_precision_is_chosen_once_for_all_points(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(estimate, "fastest", lambda *of: asked.append(of) or "bfloat16")
    axes = {"dtype": ["float32", "auto"], "dropout.rate": [0, 0.1]}
    runs = estimate.as_trained(load_study(bench.write(axes=axes)), 1)
    assert [run.dtype for run in runs] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert len(asked) == 1
