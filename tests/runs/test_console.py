"""What `train` says: on terminals of three widths, into a file, and in train.log."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, Workshop, merged
from screen import Screen, open_terminal
from typer.testing import CliRunner

from gptlite.cli.main import app
from gptlite.planning import rehearsal
from gptlite.runs import console, metrics, session
from gptlite.runs.console import BESIDE, NARROWEST, Console

SCREENS = Path(__file__).parent / "screens"
"""What the terminals show: WRITE_SCREENS=1 writes them anew, to be read before they are kept."""
ROW = {"train/loss": 1.5, "tokens_per_second": 12_345.0}
EVALUATED = {**ROW, "val/loss": 2.0}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone looks at the terminal."""
    for name in ("CI", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands, and a model writes what a test expects of it."""

    class Generation:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def results(self) -> list[dict[str, Any]]:
            return [{"prompt": "The", "text": " sea is that of the day"}]

    monkeypatch.setattr(session, "Generation", Generation)
    monkeypatch.setattr(session.time, "perf_counter", lambda: 100.0)
    monkeypatch.setattr(metrics.Meter, "rate", lambda self: 12_345.0)
    monkeypatch.setattr(rehearsal, "foresee", lambda *_: 66.0)


@pytest.fixture
def desk(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A folder with tiny.yaml, to work in."""
    monkeypatch.chdir(workshop.folder)
    settings = {
        "data": {"source": "text.txt", "cache_dir": "cache"},
        "dropout": {"preset": "gpt2", "rate": 0.1, "schedule": {"mode": "early", "until": 0.5}},
        "sample": {"interval": 4},
    }
    Path("tiny.yaml").write_text("# 1 minute\n" + yaml.safe_dump(merged(TINY, settings)))
    return workshop


def train_on_a_terminal(columns: int, *more: str) -> str:
    """Every byte that a terminal gets."""
    with open_terminal(columns) as (screen, written), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        with pytest.raises(SystemExit) as ended:
            app(["train", "--config", "tiny.yaml", *more])
    assert ended.value.code == 0, written.text
    return written.text


def hide_digits(text: str) -> str:
    """Losses are not the same on every processor."""
    return re.sub(r"\d\.\d{3,}", lambda number: re.sub(r"\d", "0", number[0]), text)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_it_so(columns: int, desk: Workshop, watched: None, still: None) -> None:
    """In the middle, with the bar, and at the end, without it."""
    bytes_ = train_on_a_terminal(columns)
    bar = bytes_.index("left", bytes_.index("sample at step 4")) + len("left")
    middle, end = (str(Screen(columns, part)) for part in (bytes_[:bar], bytes_))
    shown = hide_digits(f"{middle}{'=' * columns}\n{end}")
    file = SCREENS / f"{columns}.txt"
    if os.environ.get("WRITE_SCREENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown)
    assert shown == file.read_text()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_bar_is_clipped_and_none_is_left(columns: int, desk: Workshop, watched: None) -> None:
    screen = Screen(columns, train_on_a_terminal(columns))
    assert screen.passed
    for bar in screen.passed:
        assert len(bar) <= columns
        assert bar.endswith(" left")
    assert not re.search(r"^ *\d+% ", str(screen), re.MULTILINE)


def test_the_log_is_the_same_with_a_bar_and_without(
    desk: Workshop, watched: None, still: None
) -> None:
    train_on_a_terminal(80, "--out-dir", "run")
    with_bar = Path("run/train.log").read_text()
    Path("run").rename("before")
    result = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--out-dir", "run"])
    assert result.exit_code == 0, result.output
    assert Path("run/train.log").read_text() == with_bar
    evaluations = re.findall(r"^step (\d)/8 .* val ", with_bar, re.MULTILINE)
    assert evaluations == ["4", "8"]


def test_the_end_is_the_last_that_is_said(desk: Workshop, watched: None) -> None:
    lines = str(Screen(200, train_on_a_terminal(200, "--out-dir", "a run"))).splitlines()
    assert lines[-5:-1] == [
        "report: a run/report.html",
        "next: gptlite generate --run 'a run' --interactive",
        "next: gptlite eval --run 'a run'",
        "next: gptlite serve 'a run'",
    ]
    assert lines[-1].startswith("done: 8 updates in ")
    assert Path("a run/train.log").read_text().splitlines()[-5:] == lines[-5:]


def test_samples_appear_once_and_when_they_are_taken(desk: Workshop, watched: None) -> None:
    said = str(Screen(80, train_on_a_terminal(80)))
    order = re.findall(r"^(step \d|sample at step \d)", said, re.MULTILINE)
    assert order == ["step 4", "sample at step 4", "step 8", "sample at step 8"]


def test_reasons_are_in_the_log_and_shown_if_asked_for(desk: Workshop) -> None:
    plain = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--out-dir", "plain"])
    asked = CliRunner().invoke(app, ["train", "-v", "--config", "tiny.yaml", "--out-dir", "asked"])
    assert "auto: " not in plain.stderr
    for text in (asked.stderr, Path("plain/train.log").read_text()):
        assert "auto: attention = " in text
        assert "memory: about " in text


def lines_of(console_: Console) -> list[str]:
    assert console_.log is not None
    return console_.log.read_text().splitlines() if console_.log.exists() else []


@pytest.mark.parametrize(("columns", "shown"), [(20, 0), (30, 1), (60, 2)])
def test_notes_are_shown_where_there_is_room(
    columns: int, shown: int, tmp_path: Path, watched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.log has them all, unfolded, whatever the terminal."""
    head, notes = ["one two three four five six"], ["note: a first one", "note: and a second one"]
    with open_terminal(columns) as (screen, written):
        monkeypatch.setattr("sys.stderr", screen)
        said = Console(tmp_path / "train.log", "bar", total=10, start=0)
        said.say_head(head, notes, 2 if columns < 60 else 3)
    assert written.text.count("note: ") == shown
    assert max(map(len, written.text.splitlines())) <= columns
    assert lines_of(said) == [*head, *notes]


def test_an_evaluation_leaves_a_line_and_other_rows_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(console.time, "perf_counter", lambda: float(next(clock)))
    shown = Console(tmp_path / "train.log", "lines", total=10, start=0)
    for step in range(1, 7):
        shown.advance()
        shown.show_progress(step, EVALUATED if step == 5 else ROW, 2.0 if step > 4 else None)
    shown.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert lines_of(shown) == ["step 5/10  loss 1.500  val 2.000  12.3k tok/s  0:18 left"]
    passing = [line for line in err.splitlines() if "val" not in line]
    assert passing[0] == "step 1/10  loss 1.500  12.3k tok/s  0:18 left"
    assert 1 < len(passing) < 5, "not every row has a line"


def test_the_last_line_has_nothing_left(tmp_path: Path) -> None:
    shown = Console(tmp_path / "train.log", "lines", total=5, start=0)
    shown.show_progress(5, EVALUATED, 2.0)
    assert lines_of(shown) == ["step 5/5  loss 1.500  val 2.000  12.3k tok/s"]


@pytest.mark.parametrize(
    ("columns", "beside"),
    [
        (120, "99000/100000  loss 1.500  val 2.000  12.3k tok/s  1:00:00 left"),
        (80, "99000/100000  loss 1.500  val 2.000  12.3k tok/s  1:00:00 left"),
        (70, "99000/100000  loss 1.500  val 2.000  1:00:00 left"),
        (60, "99000/100000  loss 1.500  1:00:00 left"),
        (50, "99000/100000  1:00:00 left"),
        (20, "99000/100000  1:00:00 left"),
    ],
)
def test_what_stands_beside_a_bar_leaves_in_order(
    columns: int, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "time_left", lambda self: "1:00:00 left")
    shown = Console(None, "lines", total=100_000, start=0)
    shown.show_progress(99_000, ROW, 2.0)
    assert shown.describe_progress(columns) == beside
    assert len(beside) + BESIDE + NARROWEST <= columns or columns < 60


@pytest.mark.parametrize("given", ["", "0", "wide", "100"])
def test_how_wide_a_terminal_is(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stderr, whatever stdout is; some terminals say 0."""
    monkeypatch.setenv("COLUMNS", given)
    for size, columns in ((60, 60), (0, 80)):
        with open_terminal(size) as (stream, _):
            assert console.columns_of(stream) == (100 if given == "100" else columns)
    with open(os.devnull, "w") as stream:
        assert console.columns_of(stream) == (100 if given == "100" else 80)
