"""The seeds of a point as one model, and what is measured on text that no choice has seen."""

import json
from functools import partial

import pytest
from conftest import RATES, Bench

from gptlite.data.prepare import open_split
from gptlite.errors import ConfigError
from gptlite.measure.ensemble import run_ensemble
from gptlite.measure.suites import FULL
from gptlite.runs.trained import load_trained
from gptlite.studies.table import table_lines


def test_the_seeds_of_each_point_are_measured_as_one_model_once(bench: Bench) -> None:
    table = ["best_val_loss", "ensemble.mean_of_logits.loss"]
    found = bench.run(**RATES, ensembles=True, table=table)
    files = sorted((bench.out / "ensembles").iterdir())
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    for point in found["points"]:
        records = [run for run in found["runs"] if run["label"] == point["label"]]
        members = [load_trained(bench.out / "runs" / run["name"], "best") for run in records]
        first = members[0]
        split = partial(open_split, first.run, first.tokenizer, "val")
        want = run_ensemble(members, "val", split, FULL)["mean_of_logits"]["loss"]["value"]
        ours = point["metrics"]["ensemble.mean_of_logits.loss"]
        assert (ours["mean"], ours["low"]) == (want, None)
        assert want < point["metrics"]["best_val_loss"]["mean"]
    lines = "\n".join(table_lines(found))
    assert "ensemble.mean_of_logits.loss, mean" in lines
    again = bench.run(**RATES, ensembles=True, table=table)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert again["points"] == found["points"]


def test_a_point_that_lacks_a_seed_has_no_ensemble_yet(bench: Bench) -> None:
    from gptlite.studies.config import load_study
    from gptlite.studies.ensembles import members_by_point

    study = load_study(bench.write(**RATES))
    records = [
        {"state": "done", "label": "a", "name": "a1"},
        {"state": "done", "label": "a", "name": "a2"},
        {"state": "done", "label": "b", "name": "b1"},
        {"state": "failed", "label": "b", "name": "b2"},
    ]
    assert [[r["name"] for r in members] for members in members_by_point(study, records)] == [
        ["a1", "a2"]
    ]


def test_runs_are_measured_on_the_test_text(bench: Bench) -> None:
    found = bench.run(**RATES, set={"data.test_share": 0.5}, split="test", seeds=[1])
    for run in found["runs"]:
        metrics = run["metrics"]
        assert metrics["loss.loss"] != metrics["best_val_loss"]
        (path,) = (bench.out / "runs" / run["name"] / "eval").glob("loss-test-step-*.json")
        assert json.loads(path.read_text())["loss"] == metrics["loss.loss"]
    # What was measured on another split counts as not measured.
    again = bench.run(**RATES, set={"data.test_share": 0.5}, seeds=[1])
    for run in again["runs"]:
        assert run["metrics"]["loss.loss"] == pytest.approx(run["metrics"]["best_val_loss"])


def test_a_test_split_that_is_not_kept_is_refused_before_training(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="split: test, but data.test_share keeps no text"):
        bench.run(**RATES, split="test")
    assert not (bench.out / "runs").exists()
