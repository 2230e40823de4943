"""No file, whatever it holds, runs code, writes elsewhere, hangs or ends in a traceback.

The cases are in hostile.py, which runs them all in one watched process.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import Case
from test_bad_input import _own_folder  # noqa: F401

CASES = {case.name: case for case in hostile.cases()}


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every case, by its name."""
    folder = tmp_path_factory.mktemp("hostile")
    surroundings = {**os.environ, "CC": "none", "PYTHONDONTWRITEBYTECODE": "1", "CI": "true"}
    command = [sys.executable, hostile.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hostile_file_is_refused_in_words(case: Case, happened: dict[str, Any]) -> None:
    got = happened[case.name]
    assert not got["foreign"], got
    assert got["code"] in case.codes, got
    assert re.search(case.says, got["stderr"]), got
    if case.lines is not None and got["code"]:
        assert got["lines"] == case.lines, got
    assert got["seconds"] < 2, got


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hostile_file_runs_nothing_and_writes_nothing_elsewhere(
    case: Case, happened: dict[str, Any]
) -> None:
    got = happened[case.name]
    assert not got["canary"]
    assert got["secret"] == "kept"
    assert not got["seen"]
    if case.command[0] != "train" and got["code"]:
        assert not got["made"]


@pytest.mark.parametrize("name", hostile.PLAIN_PICKLES)
def test_the_canaries_sing(name: str) -> None:
    """A pickle that harms nobody would prove nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "gptlite_canary", raising=False)
        pickle.loads(hostile.PLAIN_PICKLES[name])
    assert Path("canary").exists()


def test_the_watch_sees_what_it_is_there_for(tmp_path: Path) -> None:
    watch = hostile.Watch()
    watch.folder = tmp_path / "inside"
    (tmp_path / "evil.py").write_text("canary = 1")
    script = compile("canary = 1", str(watch.folder / "evil.py"), "exec")
    events: dict[str, tuple[Any, ...]] = {
        **{name: ("x",) for name in hostile.WATCHED},
        "compile": ("canary = 1", "x"),
        "exec": (script,),
        "open": (str(tmp_path / "x"), "w", os.O_WRONLY),
        **{name: (str(tmp_path / "x"), str(tmp_path / "y")) for name in hostile.WRITES},
    }
    for name, arguments in events.items():
        watch.seen.clear()
        with pytest.raises(hostile.Forbidden):
            watch(name, arguments)
        assert watch.seen, name
