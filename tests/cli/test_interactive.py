"""A line in, its continuation out; what is said with a colon changes what follows."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop
from typer.testing import CliRunner

from gptlite.cli import interactive
from gptlite.cli.main import app
from gptlite.config.run import SampleConfig
from gptlite.errors import ConfigError
from gptlite.runs.start import train

Asked = list[tuple[str, float, int]]


def spoken(monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[str, Asked]:
    """What is written to these lines, and every (text, temperature, seed) that was continued."""
    asked: Asked = []
    written: list[str] = []

    def continue_(prompt: str, options: SampleConfig, seed: int) -> Iterator[str]:
        asked.append((prompt, options.temperature, seed))
        if prompt == "stop":
            yield "half"
            raise KeyboardInterrupt
        if prompt == "odd":
            raise ConfigError("character 'o' is not known")
        yield f"+{len(asked)}"

    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    interactive.converse(continue_, SampleConfig(), 1, written.append)
    return "".join(written), asked


def test_lines_are_continued_and_an_empty_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written, asked = spoken(monkeypatch, "one\n\n\ntwo")
    assert asked == [("one", 0.8, 1), ("one+1", 0.8, 1), ("one+1+2", 0.8, 1), ("two", 0.8, 1)]
    assert written == "one+1\none+1+2\none+1+2+3\ntwo+4\n"


def test_options_change_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n:temperature 0\na\n:seed 9\na\n:again\n:top_k 3\n:quit\nnever"
    _, asked = spoken(monkeypatch, text)
    assert asked == [("a", 0.8, 1), ("a", 0.0, 1), ("a", 0.0, 9), ("a", 0.0, 10)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (":temperature -1", ":temperature: cannot be '-1'"),
        (":seed x", ":seed: cannot be 'x'"),
        (":top_k", ":top_k: cannot be ''"),
        (":help", "temperature 0.8"),
        (":nonsense 3", "seed 1, max_new_tokens 200"),
        ("odd", "character 'o' is not known"),
        ("stop", "half [stopped]"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    written, asked = spoken(monkeypatch, f"{line}\nafter\n")
    assert told in written
    assert asked[-1] == ("after", 0.8, 1)


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert interactive.bold("a") == "a"
    monkeypatch.setattr(sys, "stdout", Screen())
    assert interactive.bold("a\x1b[2J") == "\x1b[1ma\\x1b[2J\x1b[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert interactive.bold("a") == "a"


def test_lines_are_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readline: Any = pytest.importorskip("readline", reason="not on this system")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    keep = interactive.load_history()
    readline.add_history("the first line")
    keep()
    readline.clear_history()
    interactive.load_history()
    assert readline.get_history_item(1) == "the first line"
    readline.clear_history()


def test_a_run_talks(workshop: Workshop) -> None:
    train(workshop.run(), workshop.folder / "run")
    run = str(workshop.folder / "run")
    lines = ":max_new_tokens 5\nThe\n:temperature 0\nThe\n"
    result = CliRunner().invoke(app, ["generate", "--run", run, "-i"], input=lines)
    assert result.exit_code == 0, result.output
    one = CliRunner().invoke(
        app,
        ["generate", "--run", run, "--prompt", "The", "--max-new-tokens", "5"],
    )
    assert result.stdout.startswith(one.stdout)
    result = CliRunner().invoke(app, ["generate", "--run", run, "-i", "--prompt", "x"])
    assert result.exit_code == 2
    assert "--interactive: takes no --prompt" in result.output
