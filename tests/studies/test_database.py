"""A study's database: what is wrong with it is one line without its password, and loses nothing."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import RATES, Bench
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.errors import ConfigError, StorageError, UserError
from gptlite.runs.directory import describe_environment
from gptlite.studies import study
from gptlite.studies.config import load_study
from gptlite.studies.database import StudyStorage
from gptlite.studies.queue import Queue
from gptlite.words import mask_passwords, passwords

optuna = pytest.importorskip("optuna", reason="the study extra is not installed")
sqlalchemy = pytest.importorskip("sqlalchemy", reason="the study extra is not installed")
LOST = sqlalchemy.exc.OperationalError("SELECT", {}, Exception("server gone\nand more"))


@pytest.mark.parametrize(
    ("text", "told", "secrets"),
    [
        ("postgresql://me:pw@h:1/db", "postgresql://me:***@h:1/db", {"pw"}),
        ("--storage=p://me:a@b%26c@h/db", "--storage=p://me:***@h/db", {"a@b%26c", "a@b&c"}),
        ("p://me@h/d?password=pw&x=1", "p://me@h/d?password=***&x=1", {"pw"}),
        ("p://h:54/d and me@there", "p://h:54/d and me@there", set()),
        ("https://h/a?b=c", "https://h/a?b=c", set()),
    ],
)
def test_passwords_of_urls_are_not_told(text: str, told: str, secrets: set[str]) -> None:
    assert mask_passwords(text) == told
    assert passwords(text) == secrets


@pytest.mark.parametrize(
    "url", ["nosuch://me:secret@h/db", "no url", "postgresql://me:secret@h:x/"]
)
def test_what_is_no_url_is_a_wrong_option(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StudyStorage(tmp_path / "journal.log", url).open_study("tiny")
    (line,) = refused.value.problems
    assert line.startswith("--storage ")
    assert "no database URL" in line
    assert "secret" not in line


def test_a_driver_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    store = StudyStorage(tmp_path / "journal.log", "postgresql+psycopg://me:secret@h/db")
    with pytest.raises(UserError) as refused:
        store.open_study("tiny")
    assert refused.value.problems == (
        "--storage postgresql+psycopg://me:***@h/db: needs psycopg[binary]: "
        "pip install 'psycopg[binary]'",
    )


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="no driver for PostgreSQL is installed")
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/db"
    with pytest.raises(StorageError, match="refused") as refused:
        StudyStorage(tmp_path / "journal.log", url).open_study("tiny")
    assert "secret" not in str(refused.value)


def test_a_reason_with_the_password_is_not_told(tmp_path: Path) -> None:
    store = StudyStorage(tmp_path, "p://me:sec%26ret@h/db")
    assert store.reason(ValueError("bad word sec&ret")) == "ValueError"
    assert store.reason(ValueError("bad word\nsec&ret")) == "bad word"
    assert store.reason(ValueError()) == "ValueError"


def test_who_comes_while_the_tables_are_made_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several hosts that open a new database at once, all but one are told it exists."""
    tries, begin = [], optuna.storages.RDBStorage.__init__
    already = sqlalchemy.exc.IntegrityError("CREATE", {}, Exception("duplicate key"))

    def third(self: Any, url: str, **options: Any) -> None:
        tries.append(url)
        if len(tries) < 3:
            raise already
        begin(self, url, **options)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", third)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert StudyStorage(tmp_path, f"sqlite:///{tmp_path}/db").open_study("tiny").get_trials() == []
    assert len(tries) == 3


@pytest.mark.parametrize("when", ["claim", "finish"])
def test_a_database_that_goes_in_the_middle_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, url = bench.write(**RATES, evaluate=[], seeds=[1]), f"sqlite:///{bench.folder}/db"
    arguments = ["study", str(path), "--out-dir", str(bench.out), "--storage", url]
    whole, calls = getattr(Queue, when), []

    def second_fails(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise LOST
        return whole(*given)

    monkeypatch.setattr(Queue, when, second_fails)
    lost = CliRunner().invoke(app, arguments)
    start, *runs, told = lost.stderr.splitlines()
    assert (lost.exit_code, start) == (5, "tiny: 0 of 2")
    assert [line.partition("nats")[0][:30] for line in runs] == ["rate=0, seed 1: best validatio"]
    assert told.endswith("server gone; what is done is kept, and the same command goes on")
    before = bench.summaries()
    assert len(before) == (1 if when == "claim" else 2)
    assert "2 of 2 runs done" in CliRunner().invoke(app, arguments).stdout
    assert before.items() <= bench.summaries().items()


def test_what_a_run_raises_is_not_the_databases(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StudyStorage(tmp_path, None).translate_errors():
        raise ZeroDivisionError


def test_of_machines_that_choose_at_once_the_first_counts(bench: Bench) -> None:
    """Else half of the runs would have the other machine's precision."""
    made, url = load_study(bench.write(**RATES)), f"sqlite:///{bench.folder}/db"
    machines = [Queue(made, bench.folder / name, url) for name in "ab"]
    together = threading.Barrier(2)

    def settle(queue: Queue) -> list[str]:
        def choose() -> str:
            together.wait()
            return queue.folder.name

        return [queue.settle_once("dtype", choose), queue.settle_once("dtype", choose)]

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(settle, machines)
    assert a == b
    assert a[0] == a[1]


def test_searching_machines_do_not_draw_the_same_points(bench: Bench) -> None:
    axes = {"optim.lr": {"low": 1e-4, "high": 1e-1}}
    made = load_study(bench.write(axes=axes, search="tpe", trials=6))
    url = f"sqlite:///{bench.folder}/db"
    machines = [Queue(made, bench.folder / name, url) for name in "ab"]
    drawn = [queue.coordinates(queue.claim("x"))["optim.lr"] for _ in "123" for queue in machines]
    assert len(set(drawn)) == 6


def test_a_machine_goes_on_with_what_it_has_begun(bench: Bench) -> None:
    """Elsewhere it would be trained from its beginning."""
    made = load_study(bench.write(**RATES))
    queue, begun = Queue(made, bench.out), made.jobs[2].name
    (bench.out / "runs" / begun).mkdir(parents=True)
    (bench.out / "runs" / begun / "config.yaml").touch()
    with queue.register_worker() as worker:
        claimed = [queue.claim(worker).user_attrs["job"] for _ in made.jobs]
    assert claimed == [begun, *(job.name for job in made.jobs if job.name != begun)]


def test_who_is_still_at_work_elsewhere_is_told(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an empty folder of that name says that it will not come back."""
    path, url = bench.write(**RATES, evaluate=[], seeds=[1]), f"sqlite:///{bench.folder}/db"
    Queue(load_study(path), bench.folder / "elsewhere", url).claim("far-17-1")
    found = study.run_study(path, bench.out, 1, url)
    assert [run["state"] for run in found["runs"]].count("done") == 1
    assert "tiny: far-17-1 is still at 1 of the trials" in capsys.readouterr().err
    (bench.out / "workers" / "far-17-1").mkdir()
    found = study.run_study(path, bench.out, 1, url)
    assert [run["state"] for run in found["runs"]] == ["done", "done"]
    assert "still" not in capsys.readouterr().err


def test_the_run_does_not_write_the_password_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gptlite", "study", "--storage", "p://me:secret@h/db"])
    assert "secret" not in json.dumps(describe_environment())
