"""Studies: every run is checked before the first is trained, and none is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import RATES, Bench
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.config.reader import shipped_configs
from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.data.batches import batch_at
from gptlite.data.prepare import prepare
from gptlite.errors import ConfigError, DivergedError
from gptlite.measure import suites
from gptlite.runs import start
from gptlite.runs.directory import hold_directory
from gptlite.runs.session import watch_nothing
from gptlite.studies import study
from gptlite.studies.config import Job, Point, StudyConfig, load_study
from gptlite.studies.queue import Queue
from gptlite.studies.table import compare_words, table_lines


def test_a_grid_is_the_product_of_its_axes_seed_by_seed(bench: Bench) -> None:
    axes = {"dropout.rate": [0, 0.1], "model.n_layer": [1, 2]}
    made = load_study(bench.write(axes=axes, points={"a": {}, "b": {"optim.lr": 0.01}}))
    labels = [(job.point.label, job.seed) for job in made.jobs]
    assert labels[:3] == [
        ("rate=0, n_layer=1, a", 1),
        ("rate=0, n_layer=1, b", 1),
        ("rate=0, n_layer=2, a", 1),
    ]
    assert len(labels) == len({job.name for job in made.jobs}) == 16
    assert [seed for _, seed in labels] == [1] * 8 + [2] * 8
    last = made.jobs[-1].run
    assert (last.dropout.rate, last.model.n_layer, last.optim.lr, last.seed) == (0.1, 2, 0.01, 2)


def test_a_run_of_a_study_keeps_the_name_that_it_had_before_keys_were_added() -> None:
    """Else a study begun with an earlier version would train all of its runs again."""
    values = {"data": {"source": "text.txt"}, "train": {"max_steps": 10}, "seed": 3}
    job = Job(Point({}, {}, "base"), 3, RunConfig.model_validate(values))
    assert job.name == "base-seed-3-882e9ab7"
    other = RunConfig.model_validate({**values, "distill": {"teachers": ["a"]}})
    assert Job(job.point, 3, other).name != job.name


def test_every_run_is_checked_first_and_all_problems_are_told(bench: Bench) -> None:
    path = bench.folder / "bad.yaml"
    path.write_text(
        f"base: {bench.base}\nset: {{train.max_step: 9}}\n"
        "axes:\n  dropout.rate: [0, 1.5]\n  model.n_embd: [32, 33]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert list(caught.value.problems) == [
        f"{path}:2:7: train.max_step: unknown key 'max_step'; did you mean 'max_steps'?",
        f"{path}:5:22: model.n_embd: 33 is not divisible by model.n_head 2",
        f"{path}:4:21: dropout.rate: must be at least 0 and less than 1, or auto (got 1.5)",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("axs: 3", "axs: unknown key; did you mean 'axes'?"),
        ("seeds: []", "seeds: expected a list of"),
        ("seeds: [1, 1]", "seeds: lists a seed twice"),
        ("axes: {seed: [1]}", "axes.seed: list them under seeds"),
        ("set: {out_dir: x}", "set.out_dir: the study names the directories"),
        ("axes: {dropout.rate: []}", "axes.dropout.rate: is empty"),
        ("axes: {dropout.rate: [0, 0]}", "axes.dropout.rate: lists a value twice"),
        ("axes: {dropout.rate: {low: 0, high: 1}}", "a range needs search: tpe"),
        ("search: tpe", "search: tpe needs axes"),
        ("baseline: x", "baseline: no point 'x'; there are: none"),
        ("baseline: {dropout.rate: 3}", "baseline.dropout.rate: 3 is not on that axis"),
        ("evaluate: [los]", "evaluate.0: expected one of loss, calibration,"),
        ("search: tpe\naxes: {optim.lr: {low: 1, high: 0}}", "low must be below high"),
        ("axes: {optim.lr: 3}", "axes.optim.lr: expected a list or a mapping, got 3"),
        ("axes: {optim.lr: {low: 1}}", "axes.optim.lr.high: required"),
        ("axes: {optim.lr: {low: 1, high: x}}", "axes.optim.lr.high: expected a number, got 'x'"),
        ("axes: {optim.lr: {low: 1, high: 2, by: 1}}", "by: unknown key; known here: low, high"),
        ("points: {a: 3}", "points.a: expected a mapping, got 3"),
        ("points: {a: {seed: 3}}", "points.a.seed: list them under seeds"),
        ("set: {dropout: 3, dropout.rate: 0}", "set.dropout.rate: dropout is given too"),
        ("axes: {optim.lr: [1]}\npoints: {a: {optim.lr: 2}}", "points.a.optim.lr: is an axis"),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(bench: Bench, text: str, why: str) -> None:
    path = bench.folder / "bad.yaml"
    path.write_text(f"base: {bench.base}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2:" if "\n" not in text else f"{path}:3:")
    assert why in problem


def test_a_missing_base_is_said(bench: Bench) -> None:
    path = bench.folder / "bad.yaml"
    path.write_text("seeds: [1]\n")
    with pytest.raises(ConfigError, match="base: required"):
        load_study(path)


def test_a_study_knows_the_suites_there_are() -> None:
    schema = StudyConfig.model_json_schema()["properties"]["evaluate"]
    assert schema["items"]["enum"] == list(suites.SUITES)


def test_shipped_studies_are_valid() -> None:
    paths = sorted((shipped_configs() / "studies").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        assert all(len(job.run.sources) == 1 for job in load_study(path).jobs)


def test_runs_with_one_seed_are_pairs(bench: Bench) -> None:
    """The same initial weights and the same batches, whatever else differs."""
    jobs = load_study(bench.write(**RATES)).jobs
    assert [job.seed for job in jobs] == [1, 1, 2, 2]
    files = prepare(jobs[0].run)
    rows = files.rows("train", 16)
    weights, batches = [], []
    for job in jobs:
        model = GPT.of_run(job.run, files.meta["vocab_size"])
        weights.append(model.token_embedding.weight.sum().item())
        batches.append(batch_at(rows, seed=job.run.seed, step=3, batch_size=4).inputs.tolist())
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert batches[0] == batches[1] != batches[2] == batches[3]


def test_a_study_trains_measures_and_compares(bench: Bench) -> None:
    found = bench.run(**RATES, evaluate=["loss", "calibration"])
    assert json.loads((bench.out / "study.json").read_text()) == found
    assert [run["state"] for run in found["runs"]] == ["done"] * 4
    run = found["runs"][0]
    rows = (Path(run["directory"]) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["val/loss"] for row in rows if "val/loss" in row]
    assert run["metrics"]["best_val_loss"] == min(losses)
    assert {"loss.loss", "calibration.ece", "loss.dropout_penalty"} <= set(run["metrics"])
    assert list(Path(run["directory"]).glob("eval/calibration-val-*.json"))
    none, some = found["points"]
    assert (none["label"], some["label"]) == ("rate=0", "rate=0.3")
    values = some["metrics"]["best_val_loss"]["values"]
    assert values == [
        r["metrics"]["best_val_loss"] for r in found["runs"] if r["point"] == some["point"]
    ]
    (compared,) = (c for c in found["comparisons"] if c["metric"] == "best_val_loss")
    gains = [a - b for a, b in zip(values, none["metrics"]["best_val_loss"]["values"], strict=True)]
    assert compared["difference"] == pytest.approx(sum(gains) / 2)
    assert (compared["label"], compared["against"], compared["n"]) == ("rate=0.3", "rate=0", 2)
    lines = list(table_lines(found))
    assert lines[0] == "tiny: 4 of 4 runs done"
    assert any("above seed noise" in line for line in lines)


def test_what_is_finished_is_not_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the same command, nor when points or measurements are added to the study."""
    first = bench.run(**RATES, evaluate=[])
    before = bench.summaries()
    trained = []
    train = start.train

    def noting(run: Any, directory: Path, **rest: Any) -> Any:
        trained.append(directory.name)
        return train(run, directory, **rest)

    monkeypatch.setattr(start, "train", noting)
    assert bench.run(**RATES, evaluate=[]) == first
    assert not trained
    more = bench.run(**RATES, evaluate=["loss"])
    assert not trained
    assert all("loss.loss" in run["metrics"] for run in more["runs"])
    bench.run(axes={"dropout.rate": [0, 0.3, 0.5]}, evaluate=["loss"])
    assert len(trained) == 2
    bench.run(axes={"dropout.rate": [0, 0.3]}, evaluate=["loss"], set={"optim.lr": 0.002})
    assert len(trained) == 6
    assert before.items() <= bench.summaries().items()


def test_each_point_is_compared_with_the_baseline_of_its_own_other_axes(bench: Bench) -> None:
    axes = {"dropout.rate": [0, 0.3], "optim.lr": [0.001, 0.002]}
    found = bench.run(axes=axes, baseline={"dropout.rate": 0}, evaluate=[], seeds=[1])
    pairs = {(c["label"], c["against"]) for c in found["comparisons"]}
    assert pairs == {
        ("rate=0.3, lr=0.001", "rate=0, lr=0.001"),
        ("rate=0.3, lr=0.002", "rate=0, lr=0.002"),
    }
    assert all(c["above_seed_noise"] is None for c in found["comparisons"])


def test_a_run_that_diverges_is_an_outcome(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    train = start.train

    def wild(run: Any, directory: Path, **rest: Any) -> Any:
        if run.optim.lr > 1:
            raise DivergedError("step 3: loss nan")
        return train(run, directory, **rest)

    monkeypatch.setattr(start, "train", wild)
    points = {"wild": {"optim.lr": 2.0}, "tame": {}}
    found = bench.run(points=points, seeds=[1], evaluate=[])
    assert [run["state"] for run in found["runs"]] == ["failed", "done"]
    assert found["runs"][0]["why"] == "step 3: loss nan"
    assert found["points"][0]["metrics"] == {}
    assert bench.run(points=points, seeds=[1], evaluate=[]) == found
    assert "  wild, seed 1: failed: step 3: loss nan" in table_lines(found)


def test_only_what_is_done_is_averaged_and_compared(bench: Bench) -> None:
    """A run that was given up has losses too, of a model that was not trained to the end."""
    path = bench.write(**RATES, evaluate=[], seeds=[1])
    records = study.run_study(path, bench.out, 1, None)["runs"]
    given_up = [
        {**run, "state": "pruned"} if run["label"] == "rate=0.3" else run for run in records
    ]
    found = study.results(load_study(path), given_up, bench.out)
    assert [bool(point["metrics"]) for point in found["points"]] == [True, False]
    assert found["comparisons"] == []


def test_a_search_tries_points_and_gives_hopeless_ones_up(bench: Bench) -> None:
    keys = {
        "axes": {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.n_layer": [1, 2]},
        **{"search": "tpe", "trials": 6, "evaluate": [], "seeds": [1]},
        "set": {"train.eval_interval": 2},
    }
    found = bench.run(**keys)
    assert len(found["runs"]) == 6
    assert {run["state"] for run in found["runs"]} <= {"done", "pruned"}
    assert all(1e-4 <= run["point"]["optim.lr"] <= 1e-1 for run in found["runs"])
    assert len({run["point"]["optim.lr"] for run in found["runs"]}) == 6
    assert bench.run(**keys) == found
    assert len(bench.run(**{**keys, "trials": 7})["runs"]) == 7


def test_a_database_does_as_well_as_the_journal(bench: Bench) -> None:
    path, url = bench.write(**RATES, evaluate=[], seeds=[1]), f"sqlite:///{bench.folder}/db"
    found = study.run_study(path, bench.out, 1, url)
    before = bench.summaries()
    assert [run["state"] for run in found["runs"]] == ["done"] * 2
    assert study.run_study(path, bench.out, 1, url) == found
    assert bench.summaries() == before
    assert not (bench.out / "journal.log").exists()


def test_a_search_that_is_measured_anew_tries_the_same_points(bench: Bench) -> None:
    keys = {
        "axes": {"optim.lr": {"low": 1e-4, "high": 1e-1}},
        **{"search": "tpe", "trials": 2, "seeds": [1]},
    }
    first = bench.run(**keys, evaluate=[])
    before = bench.summaries()
    again = bench.run(**keys, evaluate=["loss"])
    assert bench.summaries() == before
    assert [run["point"] for run in again["runs"]] == [run["point"] for run in first["runs"]]
    assert all("loss.loss" in run["metrics"] for run in again["runs"])


def test_a_search_gives_nothing_up_in_the_first_quarter(bench: Bench) -> None:
    class Hopeless:
        def report(self, value: float, step: int) -> None: ...
        def should_prune(self) -> bool:
            return True

    made = load_study(bench.write(axes={"optim.lr": [1, 2]}, search="tpe"))
    watch = study.watcher(Hopeless(), made, [])
    watch(24, 100, 9.0)
    with pytest.raises(study.Pruned, match="step 25"):
        watch(25, 100, 9.0)
    study.watcher(Hopeless(), made, [{"state": "done"}])(100, 100, 9.0)  # only its first seed


def test_a_point_that_is_being_tried_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search may try one point twice at a time."""
    made = load_study(bench.write(**RATES, seeds=[1], evaluate=[]))
    queue, (job, _) = Queue(made, bench.out), made.jobs
    directory = bench.out / "runs" / job.name
    directory.mkdir(parents=True)
    other = ExitStack()
    other.enter_context(hold_directory(directory))
    waited = []

    def sleep(seconds: float) -> None:
        if not waited and seconds == 1:
            waited.append(seconds)
            other.close()

    monkeypatch.setattr(time, "sleep", sleep)
    assert study.run_job(queue, job, 1, watch_nothing)["state"] == "done"
    assert waited == [1]


def test_the_command_prints_and_says_what_is_wrong(bench: Bench) -> None:
    path, runner = bench.write(**RATES, evaluate=[], seeds=[1]), CliRunner()
    arguments = ["study", str(path), "--out-dir", str(bench.out)]
    assert "2 of 2 runs done" in runner.invoke(app, arguments).stdout
    page = (bench.out / "report.html").read_text()
    assert "Best validation loss over dropout.rate" in page
    document = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert document["name"] == "tiny"
    missing = runner.invoke(app, ["study", str(bench.folder / "no.yaml")])
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    bad = runner.invoke(app, [*arguments, "--storage", "nosuch://x"])
    assert (bad.exit_code, bad.stderr.count("\n")) == (2, 1)


def test_workers_that_are_told_to_stop_save_first(bench: Bench) -> None:
    path = bench.write(**RATES, set={"train.max_steps": 100_000}, seeds=[1])
    command = [sys.executable, "-m", "gptlite", "study", str(path), "--out-dir", str(bench.out)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    logs, until = bench.out / "runs", time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if sum(log.stat().st_size > 0 for log in logs.glob("*/metrics.jsonl")) == 2:
            break
        time.sleep(0.02)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert told.count("saved; go on with: the same command") == 2
    assert len(list(logs.glob("*/checkpoints/last"))) == 2


def test_two_workers_killed_and_started_again_lose_nothing_and_repeat_nothing(bench: Bench) -> None:
    """And what comes out equals, to the last bit, what one uninterrupted worker makes."""
    keys = {
        "axes": {"dropout.rate": [0, 0.3]},
        **{
            "seeds": [1, 2],
            "evaluate": ["loss"],
            "set": {"train.max_steps": 40, "attention": "math"},
        },
    }
    path = bench.write(**keys)
    command = [sys.executable, "-m", "gptlite", "study", str(path), "--out-dir", str(bench.out)]
    first = subprocess.Popen([*command, "--workers", "2"], start_new_session=True)
    until = time.monotonic() + 120
    while len(bench.summaries()) < 2 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    for pid in [int(path.name.split("-")[-2]) for path in bench.out.glob("workers/*")]:
        os.kill(pid, signal.SIGKILL)
    first.kill()
    first.wait()
    before = bench.summaries()
    assert len(before) >= 2
    study.run_study(path, bench.out, 1, None)
    assert len(bench.summaries()) == 4
    assert before.items() <= bench.summaries().items()
    begun = [path.read_text().count("done: ") for path in bench.out.glob("runs/*/train.log")]
    assert max(begun) == 1  # none where the kill came between the summary and the last line
    found = json.loads((bench.out / "study.json").read_text())
    straight = study.run_study(path, bench.folder / "straight", 1, None)
    clock = {"seconds"}
    for a, b in zip(found["runs"], straight["runs"], strict=True):
        assert (a["label"], a["seed"]) == (b["label"], b["seed"])
        metrics = ({k: v for k, v in r["metrics"].items() if k not in clock} for r in (a, b))
        assert next(metrics) == next(metrics)


def test_a_difference_of_nothing_has_no_minus() -> None:
    nothing = {"difference": -1e-9, "low": -1e-7, "high": 1e-7, "p": 0.9}
    words = compare_words({**nothing, "above_seed_noise": False, "against": "rate=0"})
    assert words == "+0.0000 [+0.0000, +0.0000], p 0.9 to rate=0; above seed noise: no"
