"""Where text comes from: files, globs, folders, https, and the documentation of this Python.

A source becomes a list of files; a file becomes a stream of (text, ends a document). Nothing is
held whole except a single record of a .jsonl or .csv.
"""

import ast
import codecs
import csv
import gc
import glob
import hashlib
import http.client
import json
import os
import platform
import stat
import sys
import sysconfig
import urllib.error
import urllib.request
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from gptlite import storage
from gptlite.config import DataConfig, RunConfig
from gptlite.errors import ConfigError, DataError, StorageError

SUFFIXES = (".txt", ".md", ".jsonl", ".csv")
NO_TEXT = {
    *(".parquet", ".bin", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".npy", ".npz"),
    *(".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".safetensors", ".gguf", ".h5"),
}
CHUNK = 1 << 20
TIMEOUT_SECONDS = 10
MAX_DOWNLOAD = 1 << 37

Chunk = tuple[str, bool]
"""Some text, and whether a document ends with it."""


def locate(run: RunConfig) -> list[Path]:
    """The files that a run reads, in order. Raises DataError if one is not there or not a file."""
    files = [file for source in run.sources for file in locate_one(source, run.data)]
    for file in files:
        check_regular(file)
    if run.data.sha256 is not None:
        found = [storage.file_digest(file, links=True) for file in files]
        if found != [run.data.sha256]:
            where, got = run.sources[0], ", ".join(found)
            raise DataError(f"{where}: sha256 is {got}, data.sha256 says {run.data.sha256}")
    return files


def locate_one(source: str, data: DataConfig) -> list[Path]:
    if source == "python-docs":
        return [python_docs(Path(data.cache_dir))]
    if source.startswith("https://"):
        return [download(source, str(data.sha256), Path(data.cache_dir))]
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # a name too long is for check_regular to report
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise DataError(f"data.source: {source}: no {' '.join(SUFFIXES)} file in this folder")
        return files
    if not os.path.exists(path) and glob.has_magic(source):
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if not file.is_dir()]
        if not files:
            raise DataError(f"data.source: {source}: matches no file")
        return files
    return [path]


def check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data.source: {path}: {why}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"data.source: {path}: not a regular file")
    if path.suffix.lower() in NO_TEXT:
        kinds = " ".join(SUFFIXES)
        raise DataError(f"data.source: {path}: {path.suffix} is not text; give {kinds}")
    if not os.access(path, os.R_OK):
        raise DataError(f"data.source: {path}: Permission denied")


def read_file(path: Path, data: DataConfig) -> Iterator[Chunk]:
    """The documents of one file, in pieces; empty documents are left out."""
    if path.suffix == ".jsonl":
        yield from read_jsonl(path, data.text_field)
    elif path.suffix == ".csv":
        yield from read_csv(path, data.text_field)
    elif data.layout == "documents":
        yield from read_lines(path)
    else:
        ends_later = ""
        for text in decoded(path):
            if ends_later:
                yield ends_later, False
            ends_later = text
        if ends_later:
            yield ends_later, True


def decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a mebibyte at a time; a byte order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        at, first = 0, True
        while raw := file.read(CHUNK):
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise not_utf8(path, at - waiting + error.start) from None
            yield text.removeprefix("\ufeff") if first else text
            at, first = at + len(raw), False
        left = len(decoder.getstate()[0])
        if left:
            raise not_utf8(path, at - left)


def not_utf8(path: Path, at: int) -> DataError:
    return DataError(f"data.source: {path}: not valid UTF-8 at byte {at}; convert it to UTF-8")


def read_lines(path: Path) -> Iterator[Chunk]:
    """Every non-empty line as a document, however long it is."""
    begun, held = False, ""
    for text in decoded(path):
        text, held = held + text, ""
        if text.endswith("\r"):  # its newline may be in the next piece
            text, held = text[:-1], "\r"
        *lines, rest = text.split("\n")
        for line in lines:
            line = line.removesuffix("\r")
            if line or begun:
                yield line, True
            begun = False
        if rest:
            yield rest, False
            begun = True
    if begun or held:
        yield held, True


def read_jsonl(path: Path, field: str) -> Iterator[Chunk]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(records(path, file), 1):
            if not line.strip():
                continue
            place = f"data.source: {path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error})") from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{place}: no text in field '{field}' (data.text_field)")
            if text:  # JSON can spell half a surrogate pair, which UTF-8 cannot
                yield text.encode(errors="replace").decode(), True


def read_csv(path: Path, field: str) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(records(path, file))
        if field not in (rows.fieldnames or ()):
            columns = ", ".join(rows.fieldnames or ()) or "none"
            raise DataError(
                f"data.source: {path}: no column '{field}' (data.text_field); columns: {columns}"
            )
        for row in rows:
            if row[field]:
                yield row[field], True


def records(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError:
        for _ in decoded(path):  # the slow reader knows the place
            pass
        raise


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


def download(url: str, sha256: str, cache_dir: Path) -> Path:
    """Fetch a file once; what does not have the digest is not kept."""
    suffix = Path(url.split("?")[0]).suffix or ".txt"
    target = cache_dir / "downloads" / f"{sha256[:16]}{suffix}"
    if target.is_file() and storage.file_digest(target, links=True) == sha256:
        return target
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gptlite"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if not response.url.startswith("https://"):
                raise DataError(f"{url}: redirected to an address that is not https")
            return keep(target, received(response), sha256, url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise DataError(
            f"data.source: {url}: cannot be fetched ({why}); download it elsewhere and give the "
            "file: --set data.source=FILE"
        ) from None


def received(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The bytes of a response; a broken connection is a URLError, to tell it from a full disk."""
    try:
        while part := response.read(CHUNK):
            yield part
    except (OSError, http.client.HTTPException) as error:
        raise urllib.error.URLError(error) from None


def keep(target: Path, parts: Iterator[bytes], sha256: str | None, name: str) -> Path:
    """Write to a temporary file beside `target`, check, rename."""
    part = storage.temporary(target)
    got, size = hashlib.sha256(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            part.open("wb") as file,
            tqdm(unit="B", unit_scale=True, desc="fetch", disable=None, delay=2) as bar,
        ):
            for data in parts:
                size += len(data)
                if size > MAX_DOWNLOAD:
                    raise DataError(f"{name}: larger than {MAX_DOWNLOAD >> 30} GiB")
                got.update(data)
                file.write(data)
                bar.update(len(data))
        if sha256 is not None and got.hexdigest() != sha256:
            raise DataError(f"{name}: sha256 is {got.hexdigest()}, data.sha256 says {sha256}")
        storage.disk.sync(part)
        storage.disk.rename(part, target)
    except OSError as error:
        if isinstance(error, urllib.error.URLError):
            raise
        raise StorageError(f"{target.parent}: {error.strerror}") from None
    finally:
        storage.discard(part)
    return target


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
        return keep(target, lines, None, "python-docs")
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
