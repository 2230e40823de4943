"""The shape of the code: who may import whom, sizes, docstrings, and the README's picture of it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptlite"
FILES = sorted(PACKAGE.glob("*.py"))

MAY_IMPORT = {
    "errors": "",
    "machine": "",
    "storage": "errors",
    "world": "config model",
    "torchrun": "distributed errors world",
    "heartbeat": "output",
    "distributed": "config errors exits heartbeat model world",
    "interrupts": "errors world",
    "exits": "errors output",
    "output": "errors",
    "charts": "",
    "verdict": "",
    "network_drawing": "",
    "run_files": "errors strict_yaml verdict",
    "figures": "charts network_drawing run_files verdict",
    "report": "charts errors figures run_directory run_files storage verdict",
    "study_config": "config config_reader config_words errors section strict_yaml",
    "database": "errors",
    "trials": "database errors keys run_directory storage study_config",
    "comparison": "errors intervals",
    "study": (
        "auto comparison config config_reader devices errors exits machine metrics output "
        "prepare run_directory session start storage study_config suites trained trials"
    ),
    "keys": "",
    "section": "",
    "scaling": "section",
    "dropout_config": "section",
    "config": "dropout_config machine section",
    "strict_yaml": "errors",
    "config_words": "config errors strict_yaml",
    "config_reader": "config config_words errors origin strict_yaml",
    "hf_config": "config dropout_config errors storage",
    "hf_tokenizer": "tokenizer",
    "foreign_tokenizer": "errors hf_config hf_tokenizer marks storage tokenizer",
    "origin": "errors foreign_tokenizer hf_config strict_yaml tokenizer",
    "hf": "checkpoint config errors storage tensor_files",
    "torch_file": "errors storage",
    "nanogpt": "errors tokenizer torch_file",
    "export": (
        "checkpoint config_reader errors generate hf hf_config hf_tokenizer storage tokenizer "
        "trained"
    ),
    "importing": (
        "checkpoint config config_reader devices errors foreign_tokenizer hf hf_config keys "
        "model nanogpt origin output run_directory storage strict_yaml tokenizer"
    ),
    "tokenizer": "bpe config errors marks storage",
    "marks": "",
    "readers": "config errors",
    "remote": "config errors readers run_directory storage",
    "sources": "config errors readers remote storage",
    "ledger": "errors machine storage",
    "workers": "errors machine",
    "bpe": "workers",
    "data": "errors keys ledger storage tokenizer",
    "split": "",
    "unknown": "config errors output readers tokenizer",
    "encoding": "config data errors machine output readers split tokenizer unknown",
    "shards": "config data encoding errors machine output run_directory storage tokenizer workers",
    "prepare": (
        "config data encoding errors ledger origin output run_directory shards sources split "
        "storage tokenizer unknown"
    ),
    "loops": "",
    "devices": "config errors loops machine world",
    "masks": "dropout_config keys loops",
    "dropout": "dropout_config errors keys masks",
    "kernels": "loops masks",
    "decode": "kernels loops masks",
    "loss": "data",
    "model": "config decode dropout dropout_config kernels keys loss masks",
    "optim": "config world",
    "run_directory": "errors storage",
    "metrics": "errors storage",
    "sinks": "config config_reader errors",
    "tensor_files": "errors storage world",
    "checkpoint": "config errors model scaling section storage tensor_files world",
    "memory": "config errors loops loss machine world",
    "auto": "config devices dropout errors loops masks memory model world",
    "trained": "checkpoint config config_reader devices errors model tokenizer world",
    "evaluate": "config data devices dropout errors keys loss masks memory model tokenizer world",
    "intervals": "keys",
    "knockout": "config data devices dropout errors evaluate intervals keys loss model",
    "importance": "intervals knockout model",
    "calibration": "config data devices dropout errors evaluate intervals keys masks model",
    "suites": (
        "calibration data dropout errors evaluate importance intervals knockout metrics storage "
        "trained world"
    ),
    "generate": "config dropout errors keys model tokenizer",
    "audit": (
        "auto config data devices dropout dropout_config errors evaluate loss masks model scaling"
    ),
    "rehearsal": "auto config data dropout_config evaluate generate memory storage train world",
    "plan": "audit auto config data memory metrics model prepare rehearsal train world",
    "train": (
        "auto checkpoint config data devices dropout errors evaluate keys masks model optim "
        "scaling tensor_files world"
    ),
    "resume": (
        "auto checkpoint config data dropout errors importing loops optim origin run_directory "
        "tensor_files"
    ),
    "records": "checkpoint metrics sinks storage",
    "session": (
        "checkpoint config_reader data errors evaluate generate interrupts keys metrics plan "
        "records resume sinks tokenizer train"
    ),
    "start": (
        "auto checkpoint config config_reader data devices errors generate interrupts memory "
        "plan prepare resume run_directory session sinks storage train trained world"
    ),
    "foreign_config": "config_reader errors storage strict_yaml",
    "options": "config_reader config_words",
    "config_cli": "config config_reader errors exits foreign_config options output",
    "harness": "devices errors evaluate generate metrics trained",
    "interactive": "config errors strict_yaml",
    "budget": "auto config data metrics plan rehearsal strict_yaml",
    "recipe": (
        "budget config config_reader data devices errors metrics prepare readers rehearsal "
        "run_directory sources storage strict_yaml"
    ),
    "launch": "config config_reader errors readers recipe resume run_directory sources world",
    "interchange_cli": "errors exits export importing options output run_directory trained",
    "cli": (
        "audit config_cli config_reader errors exits generate harness interactive "
        "interchange_cli launch loops machine options output plan prepare recipe report "
        "run_directory sources start study suites torchrun trained"
    ),
    "__main__": "cli",
    "__init__": "",
}
"""An arrow that is not listed is an error; importing the package for its version is not."""

TORCH_FREE = (
    "errors machine storage interrupts world torchrun exits output keys section dropout_config "
    "config strict_yaml config_words config_reader foreign_config hf_config hf_tokenizer origin "
    "marks foreign_tokenizer study_config trials tokenizer bpe readers remote sources ledger "
    "workers data split unknown encoding shards "
    "prepare loops charts verdict network_drawing run_files figures report launch"
)
UNPICKLERS = {"pickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "code"}
ONLY_IN = {"ctypes": {"loops", "memory"}, "subprocess": {"loops"}, "runpy": set(), "imp": set()}
RUNNERS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
    *("torch.load", "torch.hub", "torch.jit", "torch.package", "yaml.load", "yaml.load_all"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "importlib.import_module"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.posix_spawn", "pty.spawn"),
    *("shutil.unpack_archive", "numpy.lib.format.read_array"),
}
METHODS = {"extractall", "extract", "unpack_archive", "allow_pickle", "weights_only"}
"""Forbidden whatever they are called on."""
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "gptlite":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("gptlite."):
            found.add(str(node.module).split(".")[1])
    return found


def called(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_follow_the_diagram(path: Path) -> None:
    assert imported(path) <= set(MAY_IMPORT[path.stem].split())


def test_the_diagram_has_no_circle_and_no_arrow_too_many() -> None:
    assert set(MAY_IMPORT) == {path.stem for path in FILES}
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {n for n, below in MAY_IMPORT.items() if set(below.split()) <= done} - done
        assert ready, "a circle"
        done |= ready
    unused = {n: set(MAY_IMPORT[n].split()) - imported(PACKAGE / f"{n}.py") for n in MAY_IMPORT}
    assert not any(unused.values()), unused


def test_describing_needs_no_torch() -> None:
    names = ", ".join(f"gptlite.{name}" for name in TORCH_FREE.split())
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert len(docstring.splitlines()) <= 12


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_functions_are_short(path: Path) -> None:
    """The bodies of commands are mostly their options."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and path.stem != "cli":
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def foreign_code(source: ast.Module, module: str) -> Iterator[str]:
    """What could run code that a file holds."""
    aliases = {"np": "numpy"}
    for node in ast.walk(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            above = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = above + alias.name
                aliases[alias.asname or alias.name] = name
                top = name.split(".")[0]
                if top in UNPICKLERS or module not in ONLY_IN.get(top, {module}):
                    yield f"import {top}"
    for node in ast.walk(source):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, *rest = called(node).split(".")
            name = ".".join([aliases.get(first, first), *rest])
            inside = {".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 2)}
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                yield node.attr
            yield from inside & (FORBIDDEN | (RUNNERS if isinstance(node, ast.Name) else set()))
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            first, *rest = called(node.func).split(".")
            name = ".".join([aliases.get(first, first), *rest])
            if name == "numpy.load" and given.get("allow_pickle") is not False:
                yield "numpy.load"
            for keyword in ("shell", "trust_remote_code"):
                if given.get(keyword, False) is not False:
                    yield keyword


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_that_runs_foreign_code(path: Path) -> None:
    assert not list(foreign_code(tree(path), path.stem))


RUNS_FOREIGN_CODE = """
import pickle
import pickle as harmless
from pickle import loads
import _pickle
import shelve
import marshal
import dill
import cloudpickle
from joblib import load
def f(): import pickle
torch.load(path)
from torch import load; load(path)
import torch as t; t.load(path)
load = torch.load
torch.load(path, weights_only=True)
torch.hub.load("a", "b")
torch.jit.load(path)
yaml.load(text, yaml.SafeLoader)
yaml.unsafe_load(text)
yaml.full_load(text)
from yaml import unsafe_load; unsafe_load(text)
class L(yaml.UnsafeLoader): pass
eval(text)
exec(text)
compile(text, "a", "exec")
run = eval
__import__(name)
importlib.import_module(name)
np.load(path)
numpy.load(path, allow_pickle=True)
np.load(path, allow_pickle=maybe)
from numpy import load; load(path)
anything(text, shell=True)
anything(text, shell=maybe)
archive.extractall()
archive.extract(name)
open(path).extractall()
shutil.unpack_archive(path)
from shutil import unpack_archive; unpack_archive(path)
AutoModel.from_pretrained(name, trust_remote_code=True)
os.system(text)
os.popen(text)
import ctypes
import subprocess
from subprocess import run
"""


@pytest.mark.parametrize("line", RUNS_FOREIGN_CODE.split("\n")[1:-1])
def test_what_runs_foreign_code_is_found(line: str) -> None:
    """A gate that lets all through would be no gate."""
    assert list(foreign_code(ast.parse(line), "model"))


def test_what_only_looks_so_is_let_through() -> None:
    lines = "model.eval(); re.compile(x); model.compile(); np.load(p, allow_pickle=False)"
    assert not list(foreign_code(ast.parse(lines), "model"))
    assert not list(foreign_code(ast.parse("import ctypes, subprocess"), "loops"))


def test_the_readme_shows_the_tree_as_it_is() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("gptlite/\n", 1)[1].split("```", 1)[0]
    shown = re.findall(r"^  (\w+)\.py", block, re.MULTILINE)
    assert sorted(shown) == sorted({path.stem for path in FILES} - {"__init__", "__main__"})


def test_the_readme_lists_the_shipped_configs() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in text


@pytest.mark.parametrize("name", ["config.md", "cli.md"])
def test_the_references_are_what_the_code_says(name: str) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "make_reference.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / name).read_text().startswith("# ")
