"""`--help` of every command: a word for each value, units and defaults, groups, nothing cut."""

import re
import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from gptlite.cli.main import app


def all_commands(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {" ".join(path): command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= all_commands(inner, (*path, name))
    return found


COMMANDS = all_commands(get_command(app))
TYPES = re.compile(r"<\w|\blist\[|\b(int|float|str|bool|range|INTEGER|FLOAT|PATH|Path|STRING)\b")


def shown(command: str, width: int = 80) -> str:
    words = [*command.split(), "--help"]
    result = CliRunner().invoke(app, words, terminal_width=width - 2, prog_name="gptlite")
    assert result.exit_code == 0, result.output
    return result.output


def test_there_are_all_commands() -> None:
    assert {"", "train", "config", "config list", "import"} <= set(COMMANDS)
    assert len(COMMANDS) > 16


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_has_a_word_and_says_what_it_does(command: str) -> None:
    text = shown(command)
    assert not TYPES.search(text), text
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name
        assert parameter.metavar or parameter.is_flag, parameter.name
        if parameter.default not in (None, False, ""):
            assert "[default: " in text or "; default: " in text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_is_cut_nor_too_wide(command: str, width: int) -> None:
    help_text = shown(command, width).partition("\n  Examples:")[0]
    for line in help_text.splitlines():
        assert len(line) <= width, line
        assert line.startswith("Usage") or not line.endswith("..."), line
    words = " ".join(help_text.split())
    for inner in getattr(COMMANDS[command], "commands", {}).values():
        assert " ".join(inner.help.partition("\n\n")[0].split()) in words


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("generate", ["Arguments", "Model", "Text", "Sampling", "Other options"]),
        ("train", ["Config", "Text", "Run directory", "Other options"]),
        ("report", ["Arguments", "Options"]),
        ("config", ["Options", "Commands"]),
    ],
)
def test_options_stand_in_groups(command: str, groups: list[str]) -> None:
    assert re.findall(r"^(\S.*):$", shown(command), re.MULTILINE) == groups


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom gptlite.cli.main import app\n"
        f"for command in {list(COMMANDS)!r}:\n"
        "    try: app([*command.split(), '--help'])\n"
        "    except SystemExit as e: assert not e.code\n"
        "    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(COMMANDS)


def test_units_ranges_and_defaults_are_said() -> None:
    text = " ".join(shown("serve").split())
    for words in (
        "--timeout SECONDS Longest time for an answer, in seconds. [1 to 86400; default: 600]",
        "--max-body BYTES Largest request, in bytes. [1000 to 1,073,741,824; default: 1,000,000]",
        "--host ADDRESS Address to listen at; one that other machines reach needs --token. "
        "[default: 127.0.0.1]",
    ):
        assert words in text
    assert "--config CONFIG" in (plan := " ".join(shown("plan").split()))
    assert "later ones win. [required]" in plan
    assert shown("study").startswith("Usage: gptlite study [OPTIONS] [FILE]\n")
    assert shown("look").startswith("Usage: gptlite look [OPTIONS] TEXT\n")
    assert shown("report").startswith("Usage: gptlite report [OPTIONS] [RUN...]\n")
