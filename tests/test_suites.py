"""Every suite on a small run, through the command."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import EVERYWHERE, Workshop
from typer.testing import CliRunner

from gptlite import suites
from gptlite.cli import app
from gptlite.errors import ConfigError
from gptlite.start import train
from gptlite.suites import SUITES, Effort, Measurement
from gptlite.trained import load_trained

SMALL = Effort(64, 32, (0, 0.5, 1), 2, (1, 3))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workshop = Workshop(tmp_path_factory.mktemp("suites"))
    dropout = EVERYWHERE.model_dump(mode="json")
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16}
    directory = workshop.folder / "run"
    train(workshop.run(dropout=dropout, model=model), directory)
    return directory


def call(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["eval", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_all_suites_are_measured_and_written_down(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "FAST", SMALL)
    out = json.loads(call("--run", str(run_dir), "--suite", "all", "--fast", "--json").stdout)
    assert set(SUITES) < set(out)
    for name in SUITES:
        saved = json.loads((run_dir / "eval" / f"{name}-val-step-00000008.json").read_text())
        assert saved == {**{key: out[key] for key in ("run", "step", "split")}, **out[name]}
    assert all(math.isfinite(number) for number in numbers(out))
    curves = out["knockout"]["kinds"]
    assert (
        set(curves) == set(out["importance"]["kinds"]) == {"head", "neuron", "layer", "dimension"}
    )
    for kind in curves.values():
        for ablation in ("zero", "mean"):
            orders = kind[ablation]
            assert set(orders) == {"random", "most_first", "least_first"}
            assert all(order["loss"][0] == out["knockout"]["loss"] for order in orders.values())
            assert len({order["loss"][-1] for order in orders.values()}) == 1
    assert len(out["loss"]["loss_by_position"]) == 16
    gap = out["loss"]["loss"] - out["loss"]["train_loss"]
    assert out["loss"]["generalisation_gap"] == pytest.approx(gap)
    assert out["mc-dropout"]["passes"] == [1, 3]


def test_measuring_again_gives_the_same_numbers(run_dir: Path) -> None:
    trained = load_trained(run_dir, "best")
    from gptlite.prepare import prepare

    def once() -> Any:
        arguments = (trained, "val", ["all"], lambda: prepare(trained.run))
        return suites.evaluate(*arguments, effort=SMALL)

    assert once() == once()


def test_a_text_file_of_one_row_can_be_measured(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the of and")
    trained = load_trained(run_dir, "best")
    found = suites.evaluate(
        *(trained, str(tmp_path / "one.txt"), ["knockout", "importance", "mc-dropout"]),
        *(lambda: None,),
        effort=SMALL,
    )
    assert found["knockout"]["targets"] == 9


def test_the_rows_that_rank_units_are_not_those_they_are_measured_on(run_dir: Path) -> None:
    from gptlite.prepare import prepare

    trained = load_trained(run_dir, "best")
    of = Measurement(trained, "val", lambda: prepare(trained.run))
    ranked = {tuple(row) for row in of.spread(64, 1).inputs.tolist()}
    measured = {tuple(row) for row in of.spread(64, 0).inputs.tolist()}
    assert len(ranked) == len(measured) == 6
    assert not ranked & measured


def test_single_units_are_measured_in_float32_whatever_the_run(run_dir: Path) -> None:
    """What one neuron does to the loss is less than bfloat16 rounds away."""
    from gptlite.prepare import prepare

    trained = load_trained(run_dir, "best")
    half = replace(trained, run=trained.run.model_copy(update={"dtype": "bfloat16"}))
    of = Measurement(half, "val", lambda: prepare(half.run), effort=SMALL)
    assert (of.ranking.run.dtype, of.subject.run.dtype) == ("float32", "bfloat16")


def test_results_are_printed_with_their_intervals(run_dir: Path) -> None:
    lines = call("--run", str(run_dir), "--suite", "calibration,loss").stdout.splitlines()
    assert lines[0].endswith("step 8, val:")
    (ece,) = (line.split() for line in lines if line.startswith("  ece "))
    value, low, high = (float(word.strip("[],")) for word in ece[1:])
    assert low <= value <= high
    assert any(line.startswith("  perplexity ") for line in lines)


def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no suite 'losss'; there are: loss, calibration"):
        suites.named(["losss"])


def test_only_the_loss_can_be_measured_with_dropout_on() -> None:
    with pytest.raises(ConfigError, match="--dropout-active"):
        suites.evaluate(*(None, "val", ["all"], lambda: None), dropout_active=True)  # type: ignore[arg-type, return-value]


def test_a_model_without_dropout_says_so(workshop: Workshop) -> None:
    train(workshop.run(dropout={"preset": "none"}), workshop.folder / "run")
    trained = load_trained(workshop.folder / "run", "best")
    found = suites.evaluate(trained, "val", ["mc-dropout"], lambda: workshop.files())
    assert "no dropout" in found["mc-dropout"]["note"]
