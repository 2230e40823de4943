"""The pair of models for who has none: alike but for dropout, kept, and gone on with."""

import shutil
from pathlib import Path

from gptlite.runs.demo import RATES, STEPS, demo_run, is_finished, train_demo
from gptlite.runs.resume import forbidden_changes
from gptlite.runs.trained import load_trained

FEW = 3


def weights(path: Path) -> bytes:
    return max(path.glob("checkpoints/step-*/model.safetensors")).read_bytes()


def test_two_runs_are_trained_once_gone_on_with_and_the_same_each_time(tmp_path: Path) -> None:
    told: list[str] = []
    paths = train_demo(tmp_path / "one", told.append, steps=FEW)
    assert [path.relative_to(tmp_path / "one").as_posix() for path in paths] == list(RATES)
    assert all(map(is_finished, paths))
    assert [line.partition(":")[0] for line in told] == [name for name in RATES for _ in (1, 2)]
    written = [(path / "summary.json").stat().st_mtime_ns for path in paths]

    told.clear()
    assert train_demo(tmp_path / "one", told.append, steps=FEW) == paths
    assert told == [f"{name}: there already" for name in RATES]
    assert written == [(path / "summary.json").stat().st_mtime_ns for path in paths]

    again = train_demo(tmp_path / "two", told.append, steps=FEW)
    assert [*map(weights, paths)] == [*map(weights, again)]
    assert weights(paths[0]) != weights(paths[1])
    for path, rate in zip(paths, RATES.values(), strict=True):
        of = load_trained(path, "last")
        assert (of.step, of.problems, of.notes) == (FEW, [], [])
        assert max(of.run.dropout.rates().values()) == rate

    (again[1] / "summary.json").unlink()
    shutil.rmtree(again[1] / "checkpoints")
    told.clear()
    train_demo(tmp_path / "two", told.append, steps=FEW)
    assert told[0] == "with-dropout: there already"
    assert told[1].startswith("without-dropout: training")
    assert weights(again[1]) == weights(paths[1])


def test_they_differ_by_dropout_alone(tmp_path: Path) -> None:
    runs = [demo_run(tmp_path, rate, STEPS) for rate in RATES.values()]
    assert list(forbidden_changes(*runs)) == ["dropout.rate: 0.2 -> 0.0"]
