"""What metrics.jsonl holds also reaches those who are asked to; none of them touches training."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import types
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop

from gptlite.errors import UserError
from gptlite.runs import sinks
from gptlite.runs.start import train

Rows = list[dict[str, Any]]


def rows_of(directory: Path) -> Rows:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: Rows) -> Rows:
    timed = ("elapsed_seconds", "tokens_per_second")
    return [{name: row[name] for name in row if name not in timed} for row in rows]


class Recorder:
    """A module with wandb's words that remembers what it is told."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.begun: list[dict[str, Any]] = []
        self.rows: Rows = []
        self.finished = 0

    def init(self, **options: Any) -> "Recorder":
        self.begun.append(options)
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        assert row.get("step", step) == step
        self.rows.append({"step": step, **row})

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def board(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(sinks, "find_spec", lambda name: True)
    return recorder


@pytest.mark.parametrize("board", ["wandb", "trackio"], indirect=True)
def test_a_board_gets_every_row_and_a_resumed_run_goes_on_there(
    workshop: Workshop, board: Recorder
) -> None:
    log = {"sinks": [board.__name__], "project": "mine"}
    train(workshop.run(log=log), workshop.folder / "run")
    assert board.rows == rows_of(workshop.folder / "run")
    train(workshop.run(log=log, train={"max_steps": 10}), workshop.folder / "run", resume=True)
    assert board.rows == rows_of(workshop.folder / "run")
    assert board.finished == 2
    first, second = board.begun
    assert (first["project"], first["name"]) == ("mine", "run")
    new = "never" if board.__name__ == "trackio" else "allow"  # it knows runs by their names
    assert (first["resume"], second["resume"]) == (new, "allow")
    assert first["config"]["model"]["n_layer"] == 2
    assert first.get("id") == second.get("id")


@pytest.mark.parametrize("board", ["wandb"], indirect=True)
def test_a_board_that_fails_is_left_and_training_is_as_without(
    workshop: Workshop, board: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workshop.run(), workshop.folder / "plain")

    def fail(row: dict[str, Any], step: int) -> None:
        if step == 3:
            raise ConnectionError("no\nroute")
        board.rows.append(row)

    board.log = fail  # type: ignore[method-assign]
    train(workshop.run(log={"sinks": ["wandb"]}), workshop.folder / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "log.sinks" in line]
    assert told == ["log.sinks: wandb failed and gets no more rows: no"]
    assert [row["step"] for row in board.rows] == [1, 2]
    plain, run = (without_times(rows_of(workshop.folder / name)) for name in ("plain", "run"))
    assert plain == run


def test_a_missing_package_is_one_line_before_anything_is_trained(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    run = workshop.run(log={"sinks": ["wandb", "tensorboard"]})
    with pytest.raises(UserError) as refused:
        train(run, workshop.folder / "run")
    assert refused.value.problems == (
        "log.sinks needs wandb and tensorboard: pip install wandb tensorboard",
    )
    assert refused.value.exit_code == 2
    assert not (workshop.folder / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_s_files_say_what_the_rows_say(workshop: Workshop) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = {"sinks": ["tensorboard"]}
    train(workshop.run(log=log), workshop.folder / "run")
    train(workshop.run(log=log, train={"max_steps": 10}), workshop.folder / "run", resume=True)
    events = EventAccumulator(str(workshop.folder / "run" / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "val/loss", "dropout/embedding", "lr"):
        rows = [row for row in rows_of(workshop.folder / "run") if name in row]
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found.keys() == {row["step"] for row in rows}
        assert [found[row["step"]] for row in rows] == pytest.approx([row[name] for row in rows])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_forgets_what_a_resumed_run_does_again(workshop: Workshop) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, end, value in ((0, 5, 1.0), (3, 4, 2.0)):
        board = sinks.TensorBoard(sinks.RunInfo(workshop.run(), workshop.folder, "id", begin))
        for step in range(begin + 1, end + 1):
            board.write({"step": step, "loss": value})
        board.close()
    events = EventAccumulator(str(workshop.folder / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_nothing_is_imported_that_was_not_asked_for(workshop: Workshop) -> None:
    """The real modules are not there, or are traps."""
    traps = {name: types.ModuleType(name) for name in ("wandb", "trackio")}
    with pytest.MonkeyPatch.context() as patch:
        for name, trap in traps.items():
            patch.setitem(sys.modules, name, trap)
        train(workshop.run(), workshop.folder / "run")
    assert all(not hasattr(trap, "init") for trap in traps.values())


def test_wandb_offline_writes_a_run(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(workshop.run(log={"sinks": ["wandb"]}), workshop.folder / "run")
    (offline,) = (workshop.folder / "run" / "wandb").glob("offline-run-*")
    (file,) = offline.glob("*.wandb")
    wanted, until = (b"val/loss", b"dropout/embedding"), time.monotonic() + 60
    while time.monotonic() < until and not all(name in file.read_bytes() for name in wanted):
        time.sleep(0.05)  # a process of its own writes it, and may do so after the run's end
    assert all(name in file.read_bytes() for name in wanted)


TRACKED = """
import sys
from pathlib import Path
from conftest import Workshop
from gptlite.runs.start import train

workshop, log = Workshop(Path(sys.argv[1])), {"sinks": ["trackio"], "project": "mine"}
train(workshop.run(log=log), workshop.folder / "run")
train(workshop.run(log=log, train={"max_steps": 10}), workshop.folder / "run", resume=True)
train(workshop.run(log=log), workshop.folder / "other" / "run")
"""


def test_trackio_keeps_the_rows_of_each_run(tmp_path: Path) -> None:
    """The package itself, in a process of its own: it reads TRACKIO_DIR once, and prints."""
    if find_spec("trackio") is None:
        pytest.skip("the trackio extra is not installed")
    boards = tmp_path / "boards"
    ran = subprocess.run(
        [sys.executable, "-c", TRACKED, str(tmp_path)],
        **{"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "check": True},
        env={**os.environ, "TRACKIO_DIR": str(boards), "HF_HUB_OFFLINE": "1"},
    )
    assert ran.stdout == ""
    assert "mine" in ran.stderr
    assert "\x1b" not in ran.stderr
    assert "log.sinks" not in ran.stderr
    assert "Warning" not in ran.stderr
    with closing(sqlite3.connect(boards / "mine.db")) as database:
        found = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    rows: dict[str, Rows] = {}
    for run_id, step, metrics in found:
        rows.setdefault(run_id, []).append({"step": step, **json.loads(metrics)})
    first, other = rows.values()  # of one name, and yet not one run
    assert first == rows_of(tmp_path / "run")
    assert other == rows_of(tmp_path / "other" / "run")
