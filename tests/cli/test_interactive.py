"""A line in, its continuation out; what is said with a colon changes what follows."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Workshop
from typer.testing import CliRunner

from gptlite.cli import interactive
from gptlite.cli.main import app
from gptlite.config.run import SampleConfig
from gptlite.errors import ConfigError
from gptlite.runs.start import train


class Talk(NamedTuple):
    written: str
    said: list[str]
    asked: list[tuple[str, float, int]]
    """Every (text, temperature, seed) that was continued."""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def spoken(monkeypatch: pytest.MonkeyPatch, text: str) -> Talk:
    """What comes of these lines."""
    asked: list[tuple[str, float, int]] = []
    written: list[str] = []

    def continue_(prompt: str, options: SampleConfig, seed: int) -> Iterator[str]:
        asked.append((prompt, options.temperature, seed))
        if prompt == "stop":
            yield "half"
            raise KeyboardInterrupt
        if prompt == "odd":
            raise ConfigError("character 'o' is not known")
        yield f"+{len(asked)}"

    said: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    interactive.converse(continue_, SampleConfig(), 1, written.append, said.append)
    return Talk("".join(written), said, asked)


def test_lines_are_continued_and_an_empty_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written, said, asked = spoken(monkeypatch, "one\n\n\ntwo")
    assert said == []
    assert asked == [("one", 0.8, 1), ("one+1", 0.8, 1), ("one+1+2", 0.8, 1), ("two", 0.8, 1)]
    assert written == "one+1\none+1+2\none+1+2+3\ntwo+4\n"


def test_options_change_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n:temperature 0\na\n:seed 9\na\n:again\n:top_k 3\n:quit\nnever"
    written, said, asked = spoken(monkeypatch, text)
    assert asked == [("a", 0.8, 1), ("a", 0.0, 1), ("a", 0.0, 9), ("a", 0.0, 10)]
    assert said == ["temperature: 0.8 -> 0.0", "seed: 1 -> 9", "seed 10", "top_k: none -> 3"]
    assert written == "a+1\na+2\na+3\na+4\n"


def test_an_option_is_set_under_either_spelling_and_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = spoken(monkeypatch, ":top-k 3\n:top_k none\n:top_p 0.5\n").said
    assert said == ["top_k: none -> 3", "top_k: 3 -> none", "top_p: none -> 0.5"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (":temperature -1", ":temperature: must be at least 0 (got -1)"),
        (":temperature hot", ":temperature: expected a number at least 0, got 'hot'"),
        (":temperature none", ":temperature: expected a number at least 0, got 'none'"),
        (":seed x", ":seed: expected an integer of at least 0 (got 'x')"),
        (":top_k", ":top-k: expected a positive integer, got ''"),
        (":help", "  :temperature 0.8"),
        (":temprature 1", ":temprature: no such command; :help lists them; did you mean"),
        ("odd", "character 'o' is not known"),
        ("stop", "stopped"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    _, said, asked = spoken(monkeypatch, f"{line}\nafter\n")
    assert any(one.startswith(told) for one in said), said
    assert asked[-1] == ("after", 0.8, 1)


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert interactive.mark_prompt("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr(sys, "stdout", Screen())
    assert interactive.mark_prompt("a\x1b[2J") == "\x1b[1ma\\x1b[2J\x1b[0m"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert interactive.mark_prompt("a") == "a ▸ "


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


def test_someone_who_types_is_greeted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["It was"])

    class Text:
        text = " so"

    class Generation:
        def __init__(self, prompts: list[str], options: SampleConfig, *, seed: int) -> None:
            self.prompts = prompts

        def pieces(self) -> list[type[Text]]:
            return [Text]

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(interactive, "load_history", lambda: lambda: None)
    interactive.talk(Generation, SampleConfig(), 1, "runs/a, step 8")
    shown = capsys.readouterr()
    assert shown.out == "It was so\n"
    assert shown.err.startswith("runs/a, step 8: type the beginning of a text")
    for command in (":again", ":temperature", ":help", ":quit"):
        assert command in shown.err


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
    assert result.stderr == "max_new_tokens: 8 -> 5\ntemperature: 0.8 -> 0.0\n"
    result = CliRunner().invoke(app, ["generate", "--run", run, "-i", "--prompt", "x"])
    assert result.exit_code == 2
    assert "--interactive: takes no --prompt" in result.output
