"""The shape of the code: who may import whom, sizes, docstrings, and the README's picture of it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptlite"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    "errors words keys storage digests locks terminal machine",
    "config",
    "data",
    "core",
    "measure interchange distributed",
    "planning",
    "runs",
    "studies report",
    "serve",
    "cli",
)
"""From the ground up. A package imports only from floors below; the files of the lowest one, and of
one package, import each other without a circle."""
GROUND = frozenset(FLOORS[0].split())
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
TORCH_FREE = (
    "cli config data interchange.families interchange.foreign_config "
    "interchange.foreign_tokenizer "
    "interchange.hf_config interchange.hf_tokenizer "
    "report runs.directory runs.interrupts runs.launch runs.origin runs.results studies"
)
"""Packages and modules that describe; those on the lowest floor do too."""
CORE_FILES, CORE_LINES = 18, 2840
"""At most to read for who wants to understand core/train.py with all that it imports."""
UNPICKLERS = {"pickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "code"}
ONLY_IN = {
    "ctypes": {"core.decode", "core.loops", "planning.memory"},
    "subprocess": {"core.loops"},
    "runpy": set(),
    "imp": set(),
}
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
ALONE = """
import torch
from gptlite.config.reader import validate
from gptlite.config.strict_yaml import Document
from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.generate import Generation
from gptlite.core.train import Trainer
from gptlite.data.prepare import prepare

torch.set_num_threads(1)
run = validate(Document({
    "device": "cpu", "dtype": "float32", "compile": False, "attention": "math",
    "data": {"source": "text.txt", "cache_dir": "cache"},
    "tokenizer": {"kind": "byte"},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": 16},
    "optim": {"lr": 0.01, "warmup_steps": 0},
    "train": {"max_steps": 60, "batch_size": 8, "micro_batch_size": 8, "recompute": False},
}))
files = prepare(run)
trainer = Trainer(run, files.rows("train", 16), files.meta["vocab_size"])
for update in trainer.updates(trainer.max_steps):
    pass
batches = files.rows("val", 16).sweep(8, None)
print(measure(trainer.model, batches, run, byte_lengths(files.tokenizer)).loss)
for result in Generation(trainer.model, files.tokenizer, ["the "], run.sample, seed=1).results():
    print(result["text"])
"""
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Modules of ours that a file names, as in config.run."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "gptlite":
            module = str(node.module).removeprefix("gptlite").lstrip(".")
            inside = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name for name in inside if file_of(name).exists()} or {module} - {""}
    return found


def file_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def needed(module: str) -> set[str]:
    """A module, and all that it imports, and so on."""
    todo, seen = {module}, set()
    while todo:
        seen |= todo
        todo = {below for name in todo for below in imports(file_of(name))} - seen
    return seen


def called(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_every_file_has_a_floor() -> None:
    tops = {name_of(path).partition(".")[0] for path in FILES} - {"__init__", "__main__"}
    assert tops == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = name_of(path).partition(".")[0]
    if own in ("__init__", "__main__"):
        return
    for module in imports(path):
        other = module.partition(".")[0]
        same = other == own or {own, other} <= GROUND
        assert same or FLOOR[other] < FLOOR[own], f"{name_of(path)} -> {module}"


def test_no_circle() -> None:
    names = {name_of(path) for path in FILES}
    done: set[str] = set()
    while done < names:
        ready = {name for name in names - done if imports(file_of(name)) <= done}
        assert ready, f"a circle among {sorted(names - done)}"
        done |= ready


def test_packages_import_nothing_by_themselves() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert not imports(path)


def test_describing_needs_no_torch() -> None:
    tops = set(TORCH_FREE.split()) | GROUND
    modules = [name_of(path) for path in FILES if not path.stem.startswith("__")]
    chosen = [name for name in modules if {name, name.partition(".")[0]} & tops]
    names = ", ".join(f"gptlite.{name}" for name in chosen)
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_stands_alone(tmp_path: Path) -> None:
    """Trains, evaluates and generates where all floors above are gone."""
    for names in FLOORS[:4]:
        for name in names.split():
            source = PACKAGE / name
            if source.is_dir():
                shutil.copytree(source, tmp_path / "gptlite" / name)
            else:
                (tmp_path / "gptlite").mkdir(exist_ok=True)
                shutil.copy(file_of(name), tmp_path / "gptlite")
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "gptlite")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 200)
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "alone.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 2.5


def test_the_trainer_is_read_in_an_evening() -> None:
    files = [file_of(name) for name in needed("core.train")]
    assert len(files) <= CORE_FILES
    assert sum(len(path.read_text().splitlines()) for path in files) <= CORE_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert len(docstring.splitlines()) <= 12


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    """The bodies of commands are mostly their options."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and path.parent.name != "cli":
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_calls_list_their_arguments(path: Path) -> None:
    """A tuple that is taken apart at once says nothing and hides which argument is which."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            starred = [a.value for a in node.args if isinstance(a, ast.Starred)]
            assert not any(isinstance(value, ast.Tuple) for value in starred), node.lineno


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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_runs_foreign_code(path: Path) -> None:
    assert not list(foreign_code(tree(path), name_of(path)))


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
    assert not list(foreign_code(ast.parse("import ctypes, subprocess"), "core.loops"))


def test_the_readme_shows_the_tree_as_it_is() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("gptlite/\n", 1)[1].split("```", 1)[0]
    shown = re.findall(r"^  (\w+)(?:/|\.py)", block, re.MULTILINE)
    assert sorted(shown) == sorted(FLOOR)


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
