"""Where text comes from: files, globs, folders, https, remote storage, the Hub, this Python's docs.

A source becomes a list of files on this machine; what has to be fetched is kept in the cache.
"""

import ast
import gc
import glob
import json
import os
import platform
import stat
import sysconfig
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from gptlite import storage
from gptlite.config.run import DataConfig, RunConfig
from gptlite.data import readers, remote
from gptlite.data.readers import SUFFIXES, file_kind
from gptlite.errors import ConfigError, DataError

NO_TEXT = {
    *(".bin", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".npy", ".npz"),
    *(".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".safetensors", ".gguf", ".h5"),
    *(".pdf", ".rtf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".xls", ".xlsx", ".pptx"),
}
VERSES = Path(__file__).parent / "verses.txt"
"""Verse in the public domain: Lewis Carroll's "Jabberwocky" and "The Walrus and the Carpenter"
(1871) and "How doth the little crocodile" (1865), Edward Lear's "The Owl and the Pussy-Cat" (1871)
and William Blake's "The Tyger" (1794)."""
BUILT_IN = ("python-docs", "verses")
"""Names of texts that are there without a file of the user's."""
MOST_LOOKED_INTO = 100
"""Files whose beginning is looked at for what may be meant otherwise."""


def locate(run: RunConfig) -> list[Path]:
    """The files that a run reads, in order. Raises DataError if one is not there or not a file."""
    files = locate_all(run.sources, run.data)
    if run.data.sha256 is not None:
        found = [storage.file_digest(file, links=True) for file in files]
        if found != [run.data.sha256]:
            where, got = run.sources[0], ", ".join(found)
            raise DataError(f"{where}: sha256 is {got}, data.sha256 says {run.data.sha256}")
    return files


def locate_val(run: RunConfig) -> list[Path]:
    """The files of data.val_source, if there is one. Raises DataError, as `locate`."""
    try:
        return locate_all(run.val_sources, run.data)
    except DataError as error:
        raise DataError(str(error).replace("data.source: ", "data.val_source: ", 1)) from None


def locate_all(named: Sequence[str], data: DataConfig) -> list[Path]:
    files = [file for source in named for file in locate_one(source, data)]
    for file in files:
        check_regular(file)
    return files


def locate_one(source: str, data: DataConfig) -> list[Path]:
    if source == "python-docs":
        return [python_docs(Path(data.cache_dir))]
    if source == "verses":
        return [VERSES]
    if "\0" in source:
        raise DataError(f"data.source: {source}: contains a NUL character")
    if source.startswith("https://"):
        return [remote.download(source, str(data.sha256), Path(data.cache_dir))]
    if "://" in source:
        return remote.fetch(source, data)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # a name too long is for check_regular to report
        files, others = search_folder(path, data)
        if not files:
            endings = " ".join((*SUFFIXES, *data.include))
            there = f" (but {list_endings(others)}; data.include)" if others else ""
            raise DataError(f"data.source: {source}: no {endings} file in this folder{there}")
        return files
    if not os.path.exists(path) and glob.has_magic(source):
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if not file.is_dir()]
        if not files:
            raise DataError(f"data.source: {source}: matches no file")
        return files
    return [path]


def search_folder(folder: Path, data: DataConfig) -> tuple[list[Path], Counter[str]]:
    """The files that are read, in order, and how many others there are, by their endings."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.source: {error.filename}: {error.strerror}")

    files, others = [], Counter[str]()
    for inside, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not readers.is_hidden(name)]
        for path in (Path(inside, name) for name in names if not readers.is_hidden(name)):
            if readers.is_searched(PurePath(path.name), data) and path.is_file():
                files.append(path)
            else:
                others[file_kind(path) or "no ending"] += 1
    return sorted(files), others


def list_endings(endings: Counter[str]) -> str:
    """The most frequent ones, and how many more there are."""
    most = endings.most_common(4)
    left = endings.total() - sum(n for _, n in most)
    return ", ".join([*(f"{name} {n}" for name, n in most), *([f"{left} more"] if left else [])])


def find_repeats(files: list[Path], listing: list[dict[str, Any]]) -> Iterator[str]:
    """Links, and copies under other names, count too."""
    first: dict[str, int] = {}
    digests = [about["sha256"] for about in listing]
    again = [
        number
        for number, about in enumerate(listing)
        if about["bytes"] and first.setdefault(about["sha256"], number) != number
    ]
    if again:
        file, other = files[again[0]], files[first[digests[again[0]]]]
        n = f"{len(again)} of {len(files)} files have the content of another one"
        why = "what is validated on may have been trained on"
        yield f"data.source: {n} ({file} that of {other}): {why}"


def remarks(run: RunConfig, files: list[Path], listing: list[dict[str, Any]]) -> Iterator[str]:
    """What whoever gave these sources may not know of them, a line each."""
    for source in (*run.sources, *run.val_sources):
        path = Path(os.path.expanduser(source))
        read, others = search_folder(path, run.data) if path.is_dir() else ([], Counter())
        if others:
            n = f"{others.total()} of {len(read) + others.total()} files skipped"
            endings = f"{list_endings(others)}; data.include takes more endings"
            yield f"data.source: {source}: {n}: {endings}"
    yield from find_repeats(files, listing)
    if run.data.separator is None:
        plain = [file for file in files[:MOST_LOOKED_INTO] if readers.is_plain(file)]
        marked = next((file for file in plain if readers.has_marks(file)), None)
        if marked is not None:
            yield (
                f"data.source: {marked}: has lines that say <|endoftext|>, which stay text; "
                'data.separator: "<|endoftext|>" makes them ends of documents'
            )


def check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data.source: {path}: {why}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"data.source: {path}: not a regular file")
    if file_kind(path) in NO_TEXT:
        kinds = " ".join(SUFFIXES)
        raise DataError(f"data.source: {path}: {file_kind(path)} is not text; give {kinds}")
    if not os.access(path, os.R_OK):
        raise DataError(f"data.source: {path}: Permission denied")


def read_prompt(path: Path) -> str:
    """The whole text of `--prompt-file`."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"--prompt-file {path}: not a regular file")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt-file {path}: not valid UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"--prompt-file {path}: {error.strerror}") from None


def python_docs(cache_dir: Path) -> Path:
    """The language reference and the docstrings of the standard library of this Python, as .jsonl.

    Real English text with no download; it differs between Python versions, so its sha256 is
    recorded with every run.
    """
    target = cache_dir / "downloads" / f"python-docs-{platform.python_version()}.jsonl"
    if target.is_file():
        return target
    lines = (json.dumps({"text": text}).encode() + b"\n" for text in documentation())
    collects = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and looking for some takes as long as parsing
    try:
        return remote.save_to_cache(target, lines, None, "python-docs")
    finally:
        if collects:
            gc.enable()


def documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text.strip() + "\n"
    for file in sorted(modules(Path(sysconfig.get_path("stdlib")))):
        text = "\n\n".join(docstrings(file))
        if len(text) > 200:
            yield text + "\n"


def modules(library: Path) -> Iterator[Path]:
    """The standard library's modules, past all that is installed beside them."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for folder, inside, names in os.walk(library):
        inside[:] = set(inside) - left_out
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            if not file.relative_to(library).parts[0].startswith(("config-", "_pyrepl")):
                yield file


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, each after its name."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in statements(tree):
        if not isinstance(node, (ast.Module, *named)):
            continue
        text = ast.get_docstring(node)
        if text and len(text) > 40:
            yield f"{node.name}: {text}" if isinstance(node, named) else text


HOLD_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk goes, but past expressions, which are most of a tree and hold no docstrings."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for field in node._fields:
            inside = getattr(node, field, None)
            if isinstance(inside, list) and inside and isinstance(inside[0], HOLD_STATEMENTS):
                todo.extend(inside)
