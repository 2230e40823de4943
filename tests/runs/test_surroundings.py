"""The commands in odd surroundings: no reader, no terminal, no colour, no locale, no home.

In a process of its own, because that is what these are about.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prose
from test_bad_input import BASE, trained_run  # noqa: F401 - a fixture
from typer.testing import CliRunner

from gptlite.cli.main import app

PLAIN = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
"""No home, no terminal, no locale."""
ODD = {
    "dumb": {"TERM": "dumb"},
    "no colour": {"NO_COLOR": "1", "TERM": "xterm-256color"},
    "C": {"LC_ALL": "C", "LANG": "C"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "20 columns": {"COLUMNS": "20"},
    "0 columns": {"COLUMNS": "0", "LINES": "0"},
    "no number of columns": {"COLUMNS": "wide"},
}
GENERATE = ("generate", "--prompt", "the end", "--max-new-tokens", "3", "--run")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": PLAIN, **options}
    return subprocess.Popen([sys.executable, "-m", "gptlite", *arguments], **pipes)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    assert b"a bug" not in err
    return process.returncode, (out or b"").decode(), err.decode()


def reader_has_gone(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    return finish(process)


@pytest.mark.parametrize(
    "command", ["config show -c train.yaml", "config schema", "prepare -c train.yaml"]
)
def test_a_reader_that_has_gone_is_no_failure(command: str) -> None:
    Path("text.txt").write_text(prose(100))
    Path("train.yaml").write_text(BASE)
    code, _, err = reader_has_gone(*command.split())
    assert (code in (0, 141), err) == (True, "")


def test_generating_for_nobody_ends_quietly(run: Path) -> None:
    assert reader_has_gone(*GENERATE, str(run)) == (0, "", "")


@pytest.mark.parametrize("command", ["config show -c train.yaml --json", "config schema", "--help"])
def test_a_closed_stdout_is_no_failure(command: str) -> None:
    Path("train.yaml").write_text(BASE)
    shell = f"{sys.executable} -m gptlite {command} >&-"
    done = subprocess.run(["sh", "-c", shell], env=PLAIN, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_environment_changes_nothing(odd: dict[str, str]) -> None:
    Path("train.yaml").write_text(BASE + "optim:\n  lr: [é]\n", encoding="utf-8")
    helping = start("train", "--help", env={**PLAIN, **odd})
    checking = start("config", "check", "-c", "train.yaml", env={**PLAIN, **odd})
    code, out, err = finish(helping)
    assert (code, err, "\x1b" in out) == (0, "", False)
    assert "--config" in out
    code, out, err = finish(checking)
    assert (code, out, "\x1b" in err) == (2, "", False)
    assert re.fullmatch(r"train.yaml:6:7: optim.lr: expected a number .*\n", err)


def test_generation_in_an_odd_environment(run: Path) -> None:
    usual = CliRunner().invoke(app, [*GENERATE, str(run)])
    odd = {key: value for each in ODD.values() for key, value in each.items()}
    assert usual.stdout.startswith("the end")
    assert finish(start(*GENERATE, str(run), env={**PLAIN, **odd})) == (0, usual.stdout, "")


@pytest.mark.parametrize("name", ["dumb", "no colour"])
def test_a_terminal_without_colour_gets_none(name: str) -> None:
    ours, theirs = os.openpty()
    process = start("trian", env={**PLAIN, **ODD[name]}, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(1 << 16):
                shown += part
        except OSError:  # how Linux says that the other end has closed
            pass
    assert process.wait(60) == 2
    assert b"Did you mean 'train'?" in shown
    assert b"\x1b" not in shown


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=["python", "cpu", "cuda"],
)
def test_too_little_memory_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("gptlite.runs.origin.load_run", fail)
    result = CliRunner().invoke(app, ["config", "check", "-c", "debug"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("gptlite: out of memory; lower train.memory_gib")
