"""Digests of large files, computed once and kept in a ledger with what the file looked like.

A file is taken for the one that was hashed while its device, inode, size and times of change are
what they were; whoever deletes the ledger has everything hashed again. A disk that turns a bit of a
file by itself is found only then. Files that are small together are hashed every time.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptlite import machine, storage
from gptlite.errors import DataError, StorageError

LARGE_BYTES = 1 << 26
MOST_BYTES = 1 << 28
"""Of a ledger: about 600,000 files."""
SETTLED_NS = 2_000_000_000
"""A file that was changed later than this before it was hashed may change again unseen: file
systems count time in steps of up to two seconds."""
FileStates = dict[Path, list[int]]
"""Files with the state of each before it was read."""


def digests_of(files: list[Path], ledger: Path, digest: Callable[[Path], str]) -> list[str]:
    """What `digest` says of each file. Raises what it raises."""
    before = file_states(files)
    if sum(state[2] for state in before.values()) < LARGE_BYTES:
        return [digest(file) for file in files]
    known = read_ledger(ledger)
    entries = {file: known.get(os.path.abspath(file), {}) for file in files}
    todo = [file for file in files if entries[file].get("seen") != before[file]]
    with ThreadPoolExecutor(machine.count_cores()) as threads:  # hashing lets other threads run
        entries |= {
            file: {"seen": before[file], "sha256": sha256}
            for file, sha256 in zip(todo, threads.map(digest, todo), strict=True)
        }
    if todo:
        settled = {os.path.abspath(f): entries[f] for f in todo if is_settled(f, before[f])}
        left = {name: entry for name, entry in known.items() if os.path.exists(name)}
        with suppress(OSError, StorageError):  # a folder that is only read: hashed every time
            storage.make_folders(ledger.parent)
            storage.write_text(ledger, storage.seal({"files": left | settled}))
    return [entries[file]["sha256"] for file in files]


def file_states(files: list[Path]) -> FileStates:
    return {file: file_state(file) for file in files}


def file_state(file: Path) -> list[int]:
    """What changes with a file's content. A link is looked at itself, so it never equals a file."""
    now = file.stat() if file.is_file() else file.lstat()
    is_link = stat.S_ISLNK(file.lstat().st_mode)
    return [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, int(is_link)]


def is_settled(file: Path, before: list[int]) -> bool:
    return file_state(file) == before and time.time_ns() - max(before[3], before[4]) > SETTLED_NS


def read_ledger(ledger: Path) -> dict[str, Any]:
    """What is known; nothing if the ledger is damaged."""
    try:
        files: dict[str, Any] = storage.unseal(storage.read_regular(ledger, MOST_BYTES))["files"]
        return {name: {"seen": e["seen"], "sha256": str(e["sha256"])} for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def require_unchanged(before: FileStates) -> Iterator[None]:
    """DataError if one of them changes meanwhile; what fails inside may come from that alone."""
    try:
        yield
    except OSError:  # says itself which file it is about
        raise
    except Exception:
        check_unchanged(before)
        raise
    check_unchanged(before)


def check_unchanged(before: FileStates) -> None:
    for file, was in before.items():
        try:
            now = file_state(file)
        except OSError:
            now = []
        if now[:4] != was[:4]:  # device, inode, size, time; what only names it anew changes ctime
            change = f"{was[2]} bytes, then {now[2]}" if now else "it is gone"
            why = "changed while it was read, so nothing of it is kept; give a copy that rests"
            raise DataError(f"data.source: {file}: {why} ({change})")
