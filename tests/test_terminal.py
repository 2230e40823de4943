"""What a terminal would obey is shown, not obeyed, wherever the text comes from."""

import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from screen import open_terminal
from test_bad_input import invoke

from gptlite import terminal
from gptlite.cli.main import app
from gptlite.words import CONTROL, escape_controls

ESCAPES = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\x7f"
SHOWN = r"\x1b[31m\x1b]0;title\x07\x9b2J\r\x08\x7f"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def test_streams_are_asked_in_one_place() -> None:
    folder = Path(terminal.__file__).parent
    asking = [path.name for path in folder.rglob("*.py") if ".isatty(" in path.read_text()]
    assert asking == ["terminal.py"]


@pytest.mark.parametrize("text", ["", "a short line", "a" * 200, " ".join(["word"] * 60)])
def test_a_folded_line_fits_and_loses_nothing(text: str) -> None:
    lines = terminal.fold(f"head: {text}", indent=6).split("\n")
    assert " ".join(" ".join(lines).split()) == f"head: {text}".strip()
    assert all(line.startswith("      ") for line in lines[1:])
    assert all(len(line) <= 80 for line in lines) or " " not in text
    assert terminal.fold("") == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text of escapes, in a folder and with a config whose names have some."""
    folder = tmp_path_factory.mktemp("escapes") / "in \x1b[31m\r\x07"
    folder.mkdir()
    text = folder / f"text {ESCAPES}.txt"
    text.write_bytes(("\x1b[31m \x9b\r\x07" * 100).encode())
    config = {
        "data": {"source": str(text), "cache_dir": str(folder / "cache")},
        "tokenizer": {"kind": "char"},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8},
        "optim": {"warmup_steps": 0},
        "train": {"max_steps": 2, "batch_size": 2, "eval_batches": 1, "threads": 1},
        "sample": {"max_new_tokens": 30, "prompts": ["\x1b[31m\x07"], "interval": 1},
    }
    (folder / f"config {ESCAPES}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def told(trained: Path) -> Any:
    """How the run of `trained` was made."""
    config = str(trained / f"config {ESCAPES}.yaml")
    result = invoke("train", "-c", config, "--out-dir", str(trained / "run"))
    assert result.exit_code == 0, result.output
    return result


def on_a_terminal(*arguments: str, stream: str = "stdout") -> tuple[str, Any]:
    """What a terminal gets on this stream, and the exit code."""
    with pytest.MonkeyPatch.context() as patch, open_terminal(80) as (screen, written):
        patch.setattr(f"sys.{stream}", screen)
        try:
            app(arguments)
        except SystemExit as ended:
            code = ended.code
    return written.text.replace("\r\n", "\n"), code


def generate(folder: Path, *more: str) -> list[str]:
    run = ["generate", "--run", str(folder / "run"), "--max-new-tokens", "40"]
    return [*run, "--prompt", "\x1b[31m\r\x9b\x07", *more]


@pytest.mark.parametrize("more", [[], ["--num-samples", "2"], ["--json"]], ids=" ".join)
def test_a_terminal_is_shown_what_a_model_writes(more: list[str], trained: Path, told: Any) -> None:
    out, code = on_a_terminal(*generate(trained, *more))
    assert code == 0
    assert not OBEYED.search(out)
    shown = r"\u001b[31m\r\u009b\u0007" if "--json" in more else r"\x1b[31m\r\x9b\x07"
    assert shown in out


def test_a_pipe_gets_every_byte(trained: Path, told: Any) -> None:
    result = invoke(*generate(trained))
    assert result.stdout_bytes.startswith("\x1b[31m\r\x9b\x07".encode())


def test_json_is_plain_text_that_says_the_same(trained: Path, told: Any) -> None:
    result = invoke(*generate(trained, "--json"))
    assert not OBEYED.search(result.stdout)
    told_in_json = json.loads(result.stdout)
    assert told_in_json["results"][0]["prompt"] == "\x1b[31m\r\x9b\x07"
    assert told_in_json["run"] == str(trained / "run")


def test_training_shows_samples_and_names_in_its_lines(trained: Path, told: Any) -> None:
    log = (trained / "run" / "train.log").read_text()
    for text in (told.stderr, log):
        assert not OBEYED.search(text)
        assert r"\x1b[31m\x07" in text.split("sample at step 2:")[1]
        assert SHOWN in text
    assert "\x1b[31m\x07" in (trained / "run/samples/step-00000002.txt").read_text()


COMMANDS: dict[str, list[str]] = {
    "show": ["config", "show", "-c", "{config}"],
    "show json": ["config", "show", "-c", "{config}", "--json"],
    "check": ["config", "check", "-c", "{config}"],
    "prepare": ["prepare", "-c", "{config}"],
    "prepare json": ["prepare", "-c", "{config}", "--json"],
    "plan": ["plan", "-c", "{config}"],
    "plan json": ["plan", "-c", "{config}", "--json"],
    "eval": ["eval", "--run", "{run}"],
    "eval json": ["eval", "--run", "{run}", "--json"],
    "eval file": ["eval", "--run", "{run}", "--split", "{text}"],
    "resume": ["train", "--resume", "{run}"],
    "resume other": ["train", "--resume", "{run}", "--set", "seed=3"],
    "taken": ["train", "-c", "{config}", "--out-dir", "{run}"],
    "prompt file": ["generate", "--run", "{run}", "--prompt-file", "{text}"],
    "command": ["{escapes}"],
    "subcommand": ["config", "{escapes}"],
    "option": ["train", "--{escapes}"],
    "argument": ["train", "{escapes}"],
    "no config": ["train", "-c", "{escapes}"],
    "no config file": ["train", "-c", "{escapes}.yaml"],
    "no run": ["generate", "--run", "{escapes}"],
    "no resume": ["train", "--resume", "{escapes}"],
    "no checkpoint": ["generate", "--run", "{run}", "--checkpoint", "{escapes}"],
    "no prompt file": ["generate", "--run", "{run}", "--prompt-file", "{escapes}"],
    "no split": ["eval", "--run", "{run}", "--split", "{escapes}"],
    "no suite": ["eval", "--run", "{run}", "--suite", "{escapes}"],
    "unknown prompt": ["generate", "--run", "{run}", "--prompt", "Z{escapes}"],
    "no number": ["generate", "--run", "{run}", "--top-k", "{escapes}"],
    "no fraction": ["generate", "--run", "{run}", "--temperature", "{escapes}"],
    "no seed": ["generate", "--run", "{run}", "--seed", "{escapes}"],
    "set": ["config", "check", "-c", "{config}", "--set", "{escapes}"],
    "set key": ["config", "check", "-c", "{config}", "--set", "{escapes}=1"],
    "set value": ["config", "check", "-c", "{config}", "--set", "seed={escapes}"],
    "set text": ["config", "check", "-c", "{config}", "--set", 'device="\\x1b[31m\\x9b"'],
    "set source": ["prepare", "-c", "{config}", "--set", 'data.source="\\x1b[31m\\x9b"'],
    "set cache": ["prepare", "-c", "{config}", "--set", 'data.cache_dir="{folder}/\\x1b[31m"'],
    "set init": [
        "train",
        "-c",
        "{config}",
        "--out-dir",
        "{folder}/new",
        "--set",
        'init_from="\\e"',
    ],
    "config": ["config", "check", "-c", "{folder}/bad.yaml"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_says_what_a_terminal_obeys(
    command: list[str], trained: Path, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "bad.yaml").write_text('"\\e[31m": 1\nseed: "\\e[31m\\x9b\\a"\n')
    names = {
        "{config}": str(trained / f"config {ESCAPES}.yaml"),
        "{text}": str(trained / f"text {ESCAPES}.txt"),
        **{"{run}": str(trained / "run"), "{folder}": str(trained), "{escapes}": ESCAPES},
    }
    for name, value in names.items():
        command = [word.replace(name, value) for word in command]
    result = invoke(*command)
    assert result.exit_code in (0, 2, 3)
    said = result.stderr if command[0] == "generate" else result.output
    assert not OBEYED.search(said), [c for c in said if OBEYED.match(c)]


def test_what_is_shown_has_nothing_left_to_obey() -> None:
    every = "".join(map(chr, range(0x3000)))
    assert not CONTROL.search(escape_controls(every))
    assert CONTROL.sub("", every) in re.sub(r"\\(x|u)[0-9a-f]+|\\[nrt]", "", escape_controls(every))
    assert escape_controls(ESCAPES) == SHOWN
    assert escape_controls("a\nb\tc", keep="\n\t") == "a\nb\tc"


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, True),
        ({"CI": "true"}, False),
        ({"TERM": "dumb"}, False),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),  # as if unset, says no-color.org
        ({"FORCE_COLOR": "1", "CI": "true"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_of_an_error_the_place_alone_is_red_on_a_terminal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    coloured: bool,
) -> None:
    config = tmp_path / "run \x1b[32m.yaml"
    config.write_text("model: {n_layer: 2.5}\ndropout: {rate: 2}\n")
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = ("config", "check", "--config", str(config))
    screen, code = on_a_terminal(*command, stream="stderr")
    before, after = ("\x1b[31m", "\x1b[0m") if coloured else ("", "")
    place = re.escape(f"{before}{tmp_path}/run \\x1b[32m.yaml:") + r"\d+:\d+" + re.escape(after)
    lines = screen.splitlines()
    assert code == 2
    assert len(lines) >= 2
    assert all(re.fullmatch(rf"{place}: [^\x1b]+", line) for line in lines), lines


def test_an_error_in_a_file_has_no_colour_unless_it_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in invoke("config", "check", "--config", "no.yaml").stderr
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert invoke("config", "check", "--config", "no.yaml").stderr.count("\x1b") == 2


def test_a_notebook_has_bars_though_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class ZMQInteractiveShell:
        pass

    stream = io.StringIO()
    assert not terminal.in_notebook()
    assert not terminal.wants_bar("auto", stream)
    notebook = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    assert terminal.wants_bar("auto", stream)
    assert not terminal.wants_bar("plain", stream)
    prompt = types.SimpleNamespace(get_ipython=lambda: object())
    monkeypatch.setitem(sys.modules, "IPython", prompt)
    assert not terminal.wants_bar("auto", stream)
