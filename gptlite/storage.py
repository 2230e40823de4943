"""Every file that must survive is written and read back here. No torch, no knowledge of runs.

A file appears whole: written beside its place, synced, renamed, and its folder synced. `disk` holds
the operations that touch the disk; tests put another in its place to record, cut or fail each one.
A sealed file is JSON with the sha256 of its own text, so that any changed byte is found.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptlite.errors import ConfigError, StorageError

LEFT_BEHIND = re.compile(r"\.(tmp|old)-.+-[0-9a-f]{8}\Z")
"""Names of what is being written or deleted; a killed process leaves them."""
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flags
NO_WAITING = getattr(os, "O_NONBLOCK", 0)


class Disk:
    """The operations, each as the system has it; they raise OSError."""

    def fill(self, path: Path, write: Callable[[Path], object]) -> None:
        """Make a new file by calling `write`; nothing that is there is followed or overwritten."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | NO_LINKS | os.O_WRONLY, 0o666))
        write(path)

    def append(self, path: Path, data: bytes) -> None:
        handle = open_regular(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)

    def sync(self, path: Path) -> None:
        """Make a file's content, or the names in a folder, survive a loss of power."""
        if os.name == "nt" and path.is_dir():  # Windows cannot sync a folder
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def delete(self, path: Path) -> None:
        os.unlink(path)

    def delete_folder(self, path: Path) -> None:
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


disk = Disk()


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path` that no other process takes and `remove_leftovers` knows."""
    return path.with_name(f".{kind}-{path.name}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; a link goes, not what it points to."""
    if path.is_symlink() or not path.is_dir():
        disk.delete(path)
        return
    for inside in path.iterdir():
        remove(inside)
    disk.delete_folder(path)


def discard(path: Path) -> None:
    """Remove if possible: what cannot be removed must not hide the error that led here."""
    with suppress(OSError):
        remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left; only for who holds the folder."""
    for path in folder.iterdir():
        if LEFT_BEHIND.match(path.name):
            discard(path)


def make_folders(path: Path) -> None:
    """The folder and those above it, synced into place."""
    if not path.is_dir():
        make_folders(path.parent)
        try:
            disk.make_folder(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        disk.sync(path.parent)


def require_folder(name: str, path: Path) -> None:
    """Raises ConfigError, which begins with `name`, where a file stands in the place of a folder
    to be made or written to."""
    for place in (path, *path.parents):
        if os.path.isdir(place):
            return
        if os.path.lexists(place):
            whose = "" if place == path else f"{place} "
            raise ConfigError(f"{name} {path}: {whose}is not a directory")


def require_place_for_file(name: str, path: Path) -> None:
    """Raises ConfigError, which begins with `name`, where no file can be written."""
    if os.path.isdir(path):
        raise ConfigError(f"{name} {path}: is a directory; give the file to write")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"{name} {path}: no directory {path.parent}")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new, after any crash."""
    part = temporary_path(path)
    try:
        disk.fill(part, lambda new: new.write_bytes(data))
        disk.sync(part)
        disk.rename(part, path)
        disk.sync(path.parent)
    except OSError as error:
        discard(part)
        raise StorageError(f"{path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode(errors="replace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def seal(value: dict[str, Any]) -> str:
    """JSON of a mapping with the sha256 of its text as last entry."""
    sha256 = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return json.dumps({**value, "sha256": sha256}, indent=1) + "\n"


def unseal(text: str) -> dict[str, Any]:
    """The mapping that was sealed. Raises ValueError if one character is not as it was."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or "sha256" not in value:
            raise ValueError("has no sha256 of its own, so gptlite did not write it")
        inside = {name: part for name, part in value.items() if name != "sha256"}
        whole = seal(inside) == text
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON of ours (nested too deep)") from None
    if not whole:
        raise ValueError("damaged (sha256 differs)")
    return inside


def open_regular(path: Path, flags: int = os.O_RDONLY, *, links: bool = False) -> int:
    """A handle. Raises OSError for what is no file: a pipe, a device, or a link."""
    if path.is_symlink() and not links:
        raise OSError(errno.ELOOP, "is a symbolic link; only files themselves are used", str(path))
    handle = os.open(path, flags | NO_WAITING | (0 if links else NO_LINKS), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle


def read_regular(path: Path, most: int) -> str:
    """The text of a file of at most `most` bytes. Raises OSError or ValueError."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"larger than {most} bytes")
        raw = file.read(size)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start}") from None


def file_digest(path: Path, *, links: bool = False) -> str:
    """sha256 of a file. Raises OSError for what is no regular file."""
    with os.fdopen(open_regular(path, links=links), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
