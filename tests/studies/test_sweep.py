"""Studies of options: what they say becomes a file that goes on with the same runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Bench
from typer.testing import CliRunner, Result

from gptlite.cli.main import app
from gptlite.errors import ConfigError
from gptlite.studies import estimate
from gptlite.studies.config import load_study
from gptlite.studies.sweep import is_new, make_sweep, study_folder, sweep_file, write_sweep


def call(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["study", *words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def desk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(bench.folder)
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    return bench.folder


def sweep(*sweeps: str, configs: tuple[str, ...] = ("base.yaml",), **more: Any) -> Any:
    given: dict[str, Any] = {"overrides": [], "n_seeds": 2, "folder": None, **more}
    return make_sweep(configs, sweeps, **given)


def test_a_sweep_is_trained_and_both_the_options_and_its_file_go_on_with_it(desk: Path) -> None:
    words = ["--config", "base.yaml", "--sweep", "dropout.rate=0,0.3", "--seeds", "2"]
    first = call(*words, "--set", "train.max_steps=4")
    assert "studies/base-rate.yaml: 4 runs (2 points, 2 seeds), about " in first.stderr
    assert "base-rate: 4 of 4 runs done" in first.stdout
    assert "numbers: studies/base-rate/study.json" in first.stderr
    assert "report: studies/base-rate/report.html" in first.stderr
    written = yaml.safe_load((desk / "studies/base-rate.yaml").read_text())
    assert written == {
        "base": "base.yaml",
        "set": {"train.max_steps": 4},
        "axes": {"dropout.rate": [0, 0.3]},
        "seeds": [1, 2],
    }
    ends = {path: path.stat().st_mtime_ns for path in desk.glob("studies/*/runs/*/summary.json")}
    assert len(ends) == 4
    again = call(*words, "--set", "train.max_steps=4")
    assert "4 runs (2 points, 2 seeds), all of them trained" in again.stderr
    of_file = call("studies/base-rate.yaml")
    assert first.stdout == again.stdout == of_file.stdout
    assert ends == {path: path.stat().st_mtime_ns for path in ends}
    more = call(*words[:-1], "3", "--set", "train.max_steps=4")
    assert "6 runs (2 points, 3 seeds), 2 of them left, about " in more.stderr
    assert ends == {path: path.stat().st_mtime_ns for path in ends}


def test_a_dry_run_says_how_many_runs_and_writes_nothing(desk: Path) -> None:
    axes = ["--sweep", "dropout.rate=0,0.3", "--sweep", "model.n_layer=1,2,3"]
    words = ["--config", "base.yaml", *axes, "--dry-run", "--workers", "2"]
    told = call(*words).stdout.splitlines()
    assert told[0].startswith("base-rate-n_layer: 18 runs (6 points, 3 seeds), about ")
    assert told[0].endswith(" with 2 workers")
    assert told[1:3] == ["  rate=0, n_layer=1", "  rate=0, n_layer=2"]
    assert not (desk / "studies").exists()
    document = json.loads(call(*words, "--json").stdout)
    assert (document["name"], document["n_runs"], document["n_left"]) == (
        *("base-rate-n_layer", 18),
        18,
    )
    assert document["seconds"] > 0


def test_a_dry_run_of_a_file_counts_what_is_left(desk: Path, bench: Bench) -> None:
    path = bench.write(axes={"dropout.rate": [0, 0.3]}, evaluate=["loss", "knockout"])
    told = call(str(path), "--dry-run").stdout
    assert "tiny: 4 runs (2 points, 2 seeds), about " in told
    assert "; not counted: knockout" in told
    search = bench.write(axes={"optim.lr": {"low": 1e-4, "high": 1e-2}}, search="tpe", trials=5)
    assert "tiny: 10 runs (5 points, 2 seeds), about " in call(str(search), "--dry-run").stdout


def test_values_are_those_of_yaml(desk: Path) -> None:
    """As for --set: numbers, words, lists and mappings; and the file reads back the same."""
    made = sweep(
        "optim.lr=3e-4, 1e-3",
        "train.early_stop=never,5",
        "dropout.sites.layer={rate: 0.1},0.2",
        'sample.prompts=["a, b"],["c"]',
        overrides=["dropout.preset=none"],
    )
    assert made.config.axes == {
        "optim.lr": [3e-4, 1e-3],
        "train.early_stop": ["never", 5],
        "dropout.sites.layer": [{"rate": 0.1}, 0.2],
        "sample.prompts": [["a, b"], ["c"]],
    }
    path = desk / f"{made.name}.yaml"
    write_sweep(path, made)
    read = load_study(path)
    assert (read.name, read.config) == (made.name, made.config)
    assert [job.name for job in read.jobs] == [job.name for job in made.jobs]


@pytest.mark.parametrize(
    ("sweeps", "overrides", "problem"),
    [
        (["dropout.rte=0,1"], [], "--sweep dropout.rte: unknown key 'rte'; did you mean 'rate'?"),
        (
            ["dropout.rate=0,1.5"],
            [],
            "--sweep dropout.rate: must be at least 0 and less than 1, or auto (got 1.5)",
        ),
        (["optim.lr=1", "optim.lr=2"], [], "--sweep optim.lr: given twice"),
        (["optim.lr=1,2,1"], [], "--sweep optim.lr: lists a value twice"),
        (
            ["optim.lr"],
            [],
            "--sweep optim.lr: expected key=value,value, as in --sweep dropout.rate=0,0.1,0.2",
        ),
        (["optim.lr="], [], "--sweep optim.lr: no value given; write --sweep optim.lr=VALUE"),
        (["seed=1,2"], [], "--sweep seed: list them under seeds, or give --seeds"),
        (["optim.lr=1,2"], ["optim.lr=3"], "--set optim.lr: is an axis too; one of them must go"),
        (["optim.lr=1"], ["optim.l=3"], "--set optim.l: unknown key 'l'; did you mean 'lr'?"),
        (
            ["optim.lr=1"],
            ["optim.lr"],
            "--set optim.lr: expected key=value, as in --set optim.lr=3e-4",
        ),
        (["optim.lr=1]"], [], "--sweep optim.lr: invalid YAML: "),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    desk: Path, sweeps: list[str], overrides: list[str], problem: str
) -> None:
    words = [word for text in sweeps for word in ("--sweep", text)]
    words += [word for text in overrides for word in ("--set", text)]
    told = call("--config", "base.yaml", *words, code=2).stderr
    assert told.startswith(problem)
    assert told.count("\n") == 1
    assert not (desk / "studies").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "FILE: missing; give a study, or --config and --sweep"),
        (["--sweep", "optim.lr=1"], "FILE: missing; give a study, or --config and --sweep"),
        (["--config", "base.yaml"], "--sweep: missing; say what to vary, as in --sweep "),
        (["a.yaml", "--config", "base.yaml", "--seeds", "2"], "--config, --seeds: not beside a "),
        (["--config", "no", "--sweep", "optim.lr=1"], "no: no such file, and no shipped config"),
    ],
)
def test_a_file_or_options_but_not_both(desk: Path, words: list[str], problem: str) -> None:
    told = call(*words, code=2).stderr
    assert told.startswith(problem)
    assert told.count("\n") == 1


def test_a_file_that_says_otherwise_is_not_written_over(desk: Path) -> None:
    made = sweep("dropout.rate=0,0.3")
    path = desk / "s.yaml"
    write_sweep(path, made)
    assert not is_new(path, made)
    assert is_new(path, sweep("dropout.rate=0,0.1,0.3", n_seeds=3))  # its runs all stay
    for other in (
        sweep("dropout.rate=0,0.1"),
        sweep("dropout.rate=0,0.3", n_seeds=1),
        sweep("dropout.rate=0,0.3", overrides=["optim.lr=0.01"]),
        sweep("dropout.rate=0,0.3", "optim.lr=0.01"),
    ):
        with pytest.raises(ConfigError, match="is another study; run it by `gptlite study"):
            is_new(path, other)
    path.write_text(path.read_text() + "evaluate: [calibration]\n")
    with pytest.raises(ConfigError, match="is another study"):
        is_new(path, made)


def test_a_file_goes_on_in_the_folder_beside_it(desk: Path) -> None:
    assert study_folder(desk / "mine.yaml") == Path("studies/mine")
    (desk / "mine").mkdir()
    assert study_folder(desk / "mine.yaml") == Path("studies/mine")
    (desk / "mine" / "study.yaml").write_text("")  # as every study has
    assert study_folder(desk / "mine.yaml") == desk / "mine"
    assert sweep_file(desk / "mine") == desk / "mine.yaml"


def test_a_study_has_the_name_of_its_folder(desk: Path) -> None:
    assert sweep("optim.lr=1", folder=desk / "mine").name == "mine"
    assert sweep("dropout.rate=0", configs=("base.yaml", "base.yaml")).name == "base-base-rate"
    one = sweep("dropout.sites.key=0", "dropout.sites.head=0")
    assert one.name == "base-key-head"
