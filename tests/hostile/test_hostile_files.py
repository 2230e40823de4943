"""No file, whatever it holds, runs code, writes elsewhere, hangs or ends in a traceback.

The cases are in hostile.py; watched.py runs them in a process of its own.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
import watched
from hostile import STEP, Case, reseal
from safetensors.torch import load_file, save_file
from test_bad_input import _own_folder, invoke, trained_run  # noqa: F401

from gptlite import storage
from gptlite.core.weights import FILES
from gptlite.data import tokenizers
from gptlite.errors import CheckpointError, DataError
from gptlite.runs import checkpoint
from gptlite.runs.checkpoint import RunState

CASES = {case.name: case for case in hostile.cases()}


@pytest.fixture(scope="module")
def what_happens(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """By the name of a case; one process runs one after the other."""
    folder = tmp_path_factory.mktemp("hostile")
    surroundings = {**os.environ, "CC": "none", "PYTHONDONTWRITEBYTECODE": "1", "CI": "true"}
    surroundings["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, watched.__file__, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        (folder / "stderr").open("w+") as stderr,
        subprocess.Popen(command, stderr=stderr, env=surroundings, **pipes) as process,
    ):

        def ask(name: str) -> dict[str, Any]:
            print(json.dumps(name), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, (folder / "stderr").read_text()[-3000:]
            return dict(json.loads(answer))

        yield ask


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hostile_file_is_refused_in_words_and_does_nothing(
    case: Case, what_happens: Callable[[str], dict[str, Any]]
) -> None:
    got = what_happens(case.name)
    assert not got["foreign"], got
    assert got["code"] in case.codes, got
    assert re.search(case.says, got["stderr"]), got
    if case.lines is not None and got["code"]:
        assert got["lines"] == case.lines, got
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
    watch = watched.Watch()
    watch.folder = tmp_path / "inside"
    (tmp_path / "evil.py").write_text("canary = 1")
    script = compile("canary = 1", str(watch.folder / "evil.py"), "exec")
    events: dict[str, tuple[Any, ...]] = {
        **{name: ("x",) for name in watched.WATCHED},
        "compile": ("canary = 1", "x"),
        "exec": (script,),
        "open": (str(tmp_path / "x"), "w", os.O_WRONLY),
        **{name: (str(tmp_path / "x"), str(tmp_path / "y")) for name in watched.WRITES},
    }
    for name, arguments in events.items():
        watch.seen.clear()
        with pytest.raises(watched.Forbidden):
            watch(name, arguments)
        assert watch.seen, name


# State and weights that are sealed well and mean harm


@pytest.fixture
def copy(run: Path) -> Path:
    return Path(shutil.copytree(run, "copy"))


WILD: list[Any] = [
    None,
    "x",
    "",
    [],
    {},
    True,
    1.5,
    -1,
    10**30,
    1e308,
    [[1]],
    {"a": [1]},
    "\x1b[2J",
]
WILD_STATES = [
    *({name: value} for name in RunState.model_fields for value in WILD),
    *({"pending": {"step": 2, name: value}} for name in ("train/loss", "a") for value in WILD),
    *({"best": {"step": value, "val_loss": 1.0, "val_bits_per_byte": None}} for value in WILD),
    *({"files": {name: "0" * 64}} for name in ("../config.yaml", "/nowhere", "a\0b", "state.json")),
    {"unknown": 1},
]


@pytest.mark.parametrize("values", WILD_STATES, ids=str)
def test_a_state_of_wild_values_is_refused_or_does_no_harm(
    values: dict[str, Any], copy: Path
) -> None:
    reseal(**values)
    for command in (["generate", "--run", "copy"], ["train", "--resume", "copy"]):
        result = invoke(*command)
        assert result.exit_code in (0, 2, 3), result.output
        assert "\x1b" not in result.output
        assert len(result.stderr) < 3000


def test_the_newest_good_checkpoint_stands_in_for_a_damaged_best(copy: Path) -> None:
    for step in (1, 3):
        other = shutil.copytree(STEP, STEP.parent / checkpoint.folder_name(step))
        saved = storage.unseal((other / "state.json").read_text())
        (other / "state.json").write_text(storage.seal({**saved, "step": step}))
    for harm in (hostile.flip, Path.unlink):
        harm(STEP / FILES[0])
        for command in ("generate", "eval"):
            result = invoke(command, "--run", "copy")
            assert result.exit_code == 0, result.output
            line, *others = result.stderr.splitlines()
            assert [other.partition(":")[0] for other in others] == ["report"] * (command == "eval")
            assert f"{STEP / FILES[0]}: " in line
            assert line.endswith("; using the one of step 3")
    assert sorted(path.name for path in STEP.parent.iterdir()) == [
        *("best", "last", "step-00000001", "step-00000002", "step-00000003")
    ]


@pytest.mark.parametrize("name", ["../../config.yaml", "../last", "state.json"])
def test_a_state_that_vouches_for_other_files_is_refused(name: str, copy: Path) -> None:
    files = storage.unseal((STEP / "state.json").read_text())["files"]
    reseal(files={**files, name: storage.file_digest(STEP / name)})
    with pytest.raises(CheckpointError, match="names other files than"):
        checkpoint.read_state(STEP)


HARMLESS = ("name with an escape", "name a number")


@pytest.mark.parametrize("name", sorted(set(hostile.TOKENIZERS) - set(HARMLESS)))
def test_a_hostile_tokenizer_is_refused_by_itself(name: str) -> None:
    """Not only because the weights would not fit."""
    with pytest.raises(DataError):
        tokenizers.from_json(hostile.TOKENIZERS[name]())


def weights(**values: torch.Tensor | None) -> None:
    """Change tensors of the weights by name; None leaves one out."""
    have = {**load_file(STEP / FILES[0]), **values}
    save_file({name: value for name, value in have.items() if value is not None}, FILES[0])
    hostile.write_sealed(FILES[0], Path(FILES[0]).read_bytes())


WRONG_WEIGHTS: dict[str, Any] = {
    "missing": ({"norm.weight": None}, r"1 weights do not fit this model: norm\.weight"),
    "extra": ({"norm.more": torch.ones(3)}, r"1 weights do not fit this model: norm\.more"),
    "shape": ({"norm.weight": torch.ones(9)}, r"1 weights do not fit this model: norm\.weight"),
    "empty": ({"norm.weight": torch.ones(0)}, r"1 weights do not fit this model: norm\.weight"),
    "scalar": ({"norm.weight": torch.ones(())}, r"1 weights do not fit this model: norm\.weight"),
    "dtype": ({"norm.weight": torch.ones(8).half()}, r"1 weights do not fit this model: norm\.w"),
    "integers": ({"norm.weight": torch.ones(8).long()}, r"1 weights do not fit this model: norm"),
    "nan": ({"norm.weight": torch.full((8,), torch.nan)}, r"not finite in norm\.weight"),
    "infinite": ({"norm.bias": torch.full((8,), -torch.inf)}, r"not finite in norm\.bias"),
    "escape": ({"\x1b[2J": torch.ones(1)}, r"do not fit this model: \\x1b\[2J"),
}


@pytest.mark.parametrize(("values", "says"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(values: dict[str, Any], says: str, copy: Path) -> None:
    weights(**values)
    for command in (*hostile.used(), ["train", "--resume", "copy"]):
        result = invoke(*command)
        assert result.exit_code == 3, result.output
        assert re.search(says, result.stderr.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_of_a_wrapped_model_are_explained(prefix: str, copy: Path) -> None:
    named = load_file(STEP / FILES[0])
    save_file({prefix + name: value for name, value in named.items()}, FILES[0])
    hostile.write_sealed(FILES[0], Path(FILES[0]).read_bytes())
    result = invoke("generate", "--run", "copy")
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"; every name begins with '{prefix}': save the model inside the wrapper")


def test_weights_alone_do_not_resume(copy: Path) -> None:
    files = storage.unseal((STEP / "state.json").read_text())["files"]
    (STEP / FILES[1]).unlink()
    reseal(files={FILES[0]: files[FILES[0]]})
    assert invoke("generate", "--run", "copy").exit_code == 0
    result = invoke("train", "--resume", "copy")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].endswith("use init_from for weights only")


@pytest.mark.parametrize("number", [1, 3, 99, None, "2", {"a": 1}, "9" * 10_000])
def test_another_format_is_said(number: Any, copy: Path) -> None:
    reseal(format=number, gptlite="9.9\x1b[2J\n" + "9" * 10_000)
    result = invoke(*hostile.used()[0])
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert "written by gptlite '9.9" in line
    assert len(line) < 200
    assert "\x1b" not in line


def test_a_state_too_deep_for_python_is_refused(copy: Path) -> None:
    """Some versions of Python parse deeper than they write."""
    path = STEP / "state.json"
    for depth in (500, 900, 960, 990, 1500, 100_000):
        path.write_text('{"a": ' + "[" * depth + "]" * depth + ', "sha256": ""}')
        with pytest.raises(CheckpointError):
            checkpoint.read_state(STEP)
