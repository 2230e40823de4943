"""Disks that fail, and what a loss of power can leave of the operations of a run.

`RecordingDisk` notes every operation of storage.Disk below a folder. `crash_states` replays each
beginning of them into what may be on the disk after the power is gone: content that was not synced
is lost, zeroed or torn, names that were not synced are there or not, in any order (POSIX promises
no more).
"""

import errno
import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlite import storage
from gptlite.storage import Disk

BLOCKS = (512, 4096)
CONTENTS = ("kept", "lost", "zeroed", *BLOCKS)
"""What becomes of bytes that were not synced; a number: torn at that many."""


def set_disk(disk: Disk) -> None:
    """All of gptlite's storage on this disk."""
    storage.disk = disk


@contextmanager
def use_disk(disk: Disk) -> Iterator[None]:
    before = storage.disk
    set_disk(disk)
    try:
        yield
    finally:
        set_disk(before)


class WatchedDisk(Disk):
    """Calls `interfere(operation, path)` ahead of every operation that changes something."""

    def __init__(self) -> None:
        self.n_operations = 0

    def interfere(self, operation: str, path: Path) -> None:
        """May raise, or never return."""

    def announce(self, operation: str, path: Path) -> None:
        self.n_operations += 1
        self.interfere(operation, path)

    def fill(self, path: Path, write: Callable[[Path], object]) -> None:
        self.announce("fill", path)
        super().fill(path, write)

    def append(self, path: Path, data: bytes) -> None:
        self.announce("append", path)
        super().append(path, data)

    def sync(self, path: Path) -> None:
        self.announce("sync", path)
        super().sync(path)

    def make_folder(self, path: Path) -> None:
        self.announce("make_folder", path)
        super().make_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self.announce("rename", old)
        super().rename(old, new)

    def delete(self, path: Path) -> None:
        self.announce("delete", path)
        super().delete(path)

    def delete_folder(self, path: Path) -> None:
        self.announce("delete_folder", path)
        super().delete_folder(path)


class FailingDisk(WatchedDisk):
    """From operation `first` on, `times` operations fail with this errno, after half their work."""

    def __init__(self, first: int, number: int, times: int = 10**9) -> None:
        super().__init__()
        self.first, self.number, self.times = first, number, times
        self.n_failed = 0

    def interfere(self, operation: str, path: Path) -> None:
        removes = operation.startswith("delete") and self.number in (errno.ENOSPC, errno.EDQUOT)
        if self.n_operations >= self.first and self.n_failed < self.times and not removes:
            self.n_failed += 1
            raise OSError(self.number, os.strerror(self.number), str(path))

    def fill(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            super().fill(path, write)
        except OSError:
            if not path.exists() and self.n_failed:
                fill_half(path, write)
            raise

    def append(self, path: Path, data: bytes) -> None:
        try:
            super().append(path, data)
        except OSError:
            if self.n_failed:
                Disk.append(self, path, data[: len(data) // 2])
            raise


def fill_half(path: Path, write: Callable[[Path], object]) -> None:
    Disk().fill(path, write)
    os.truncate(path, path.stat().st_size // 2)


class DyingDisk(WatchedDisk):
    """Kills its process at operation `at`, with half of that operation done.

    With `inside`, only operations below a folder of that name are counted.
    """

    def __init__(self, at: int, inside: str = "") -> None:
        super().__init__()
        self.at, self.inside = at, inside

    def is_counted(self, path: Path) -> bool:
        return not self.inside or self.inside in path.parts

    def announce(self, operation: str, path: Path) -> None:
        if self.is_counted(path):
            super().announce(operation, path)

    def fill(self, path: Path, write: Callable[[Path], object]) -> None:
        if self.is_counted(path) and self.n_operations + 1 == self.at:
            fill_half(path, write)
        super().fill(path, write)

    def append(self, path: Path, data: bytes) -> None:
        if self.is_counted(path) and self.n_operations + 1 == self.at:
            Disk.append(self, path, data[: len(data) // 2])
        super().append(path, data)

    def interfere(self, operation: str, path: Path) -> None:
        if self.n_operations == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Operation:
    kind: str
    path: Path
    """Below the folder that is recorded; `rename`: the old one."""
    data: bytes = b""
    """What is in the file after `fill`, what `append` adds."""
    new: Path = Path()
    site: str = ""
    """Where in gptlite a `sync` is asked for."""
    note: Any = None
    """Of `note`: what the run has told its user until here."""


class RecordingDisk(Disk):
    """Does everything and remembers it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []

    def add(self, kind: str, path: Path, **more: Any) -> None:
        if path.is_relative_to(self.root):
            self.operations.append(Operation(kind, path.relative_to(self.root), **more))

    def note(self, value: Any) -> None:
        self.operations.append(Operation("note", Path(), note=value))

    def fill(self, path: Path, write: Callable[[Path], object]) -> None:
        super().fill(path, write)
        self.add("fill", path, data=path.read_bytes())

    def append(self, path: Path, data: bytes) -> None:
        super().append(path, data)
        self.add("append", path, data=data)

    def sync(self, path: Path) -> None:
        super().sync(path)
        caller = sys._getframe(1)
        site = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {caller.f_code.co_name}"
        self.add("sync", path, site=site)

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.add("make_folder", path)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.add("rename", old, new=new.relative_to(self.root))

    def delete(self, path: Path) -> None:
        super().delete(path)
        self.add("delete", path)

    def delete_folder(self, path: Path) -> None:
        super().delete_folder(path)
        self.add("delete_folder", path)


@dataclass(eq=False)
class File:
    content: bytes = b""
    synced: bytes = b""

    def content_left(self, what: str | int) -> bytes:
        """After the power was gone."""
        if what == "kept" or self.content == self.synced:
            return self.content
        new = self.content[len(self.synced) :]
        if what == "lost":
            return self.synced
        if what == "zeroed":
            return self.synced + bytes(len(new))
        assert isinstance(what, int)
        return self.synced + new[: (len(new) // 2 // what) * what]


@dataclass(eq=False)
class Folder:
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)
    """Changes of names since the last sync, each of them whole or not at all."""

    def change(self, **names: "File | Folder | None") -> None:
        self.pending.append(names)
        for name, node in names.items():
            if node is None:
                self.now.pop(name, None)
            else:
                self.now[name] = node

    def entries_left(self, done: list[bool]) -> dict[str, "File | Folder"]:
        """After the power was gone, with these of the pending changes done."""
        entries = dict(self.synced)
        for names, is_done in zip(self.pending, done, strict=True):
            for name, node in names.items() if is_done else ():
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        return entries


class Volume:
    """What is in memory and on the disk after some operations."""

    def __init__(self) -> None:
        self.root = Folder()

    def folder(self, path: Path) -> Folder:
        node: File | Folder = self.root
        for part in path.parts:
            assert isinstance(node, Folder)
            node = node.now[part]
        assert isinstance(node, Folder)
        return node

    def apply(self, operation: Operation) -> None:
        path, name = operation.path, operation.path.name
        parent = self.folder(path.parent)
        if operation.kind == "fill":
            parent.change(**{name: File(operation.data)})
        elif operation.kind == "append":
            if name not in parent.now:
                parent.change(**{name: File()})
            file = parent.now[name]
            assert isinstance(file, File)
            file.content += operation.data
        elif operation.kind == "make_folder":
            parent.change(**{name: Folder()})
        elif operation.kind == "rename":
            assert operation.new.parent == path.parent
            parent.change(**{name: None, operation.new.name: parent.now[name]})
        elif operation.kind.startswith("delete"):
            parent.change(**{name: None})
        elif operation.kind == "sync":
            node = parent.now[name] if name else self.root
            if isinstance(node, File):
                node.synced = node.content
            else:
                node.synced, node.pending = dict(node.now), []

    def folders(self) -> Iterator[Folder]:
        """Every folder that a crash may leave: those deleted but not yet on the disk, too."""
        todo: list[File | Folder] = [self.root]
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if isinstance(node, Folder) and id(node) not in seen:
                seen.add(id(node))
                yield node
                todo += [*node.now.values(), *node.synced.values()]
                todo += [new for names in node.pending for new in names.values() if new]


def choose_changes(folders: list[Folder], rng: random.Random) -> Iterator[dict[Folder, list[bool]]]:
    """Which changes of names are on the disk: all, none, all but one, one alone, and some."""
    places = [(folder, at) for folder in folders for at in range(len(folder.pending))]
    chosen: list[set[int]] = [set(range(len(places))), set()]
    chosen += [{n} for n in range(len(places))]
    chosen += [set(range(len(places))) - {n} for n in range(len(places))]
    chosen += [{n for n in range(len(places)) if rng.random() < 0.5} for _ in range(2)]
    for there in {frozenset(each): None for each in chosen}:
        done: dict[Folder, list[bool]] = {folder: [] for folder in folders}
        for number, (folder, _) in enumerate(places):
            done[folder].append(number in there)
        yield done


def files_left(
    entries: dict[str, File | Folder], done: dict[Folder, list[bool]], what: str | int
) -> Iterator[tuple[Path, bytes | None]]:
    """(path, content) of every file and (path, None) of every folder that is left."""
    for name, node in sorted(entries.items()):
        if isinstance(node, File):
            yield Path(name), node.content_left(what)
            continue
        yield Path(name), None
        for path, content in files_left(node.entries_left(done.get(node, [])), done, what):
            yield Path(name) / path, content


def crash_states(
    operations: list[Operation], seed: int, *, without: str = ""
) -> Iterator[tuple[list[tuple[Path, bytes | None]], Any]]:
    """Every distinct content of the disk after a loss of power, with the last note before it.

    `without` names the site of syncs that do nothing.
    """
    rng, volume = random.Random(seed), Volume()
    seen, note = set(), None
    for operation in operations:
        if operation.kind == "note":
            note = operation.note
        elif not (operation.kind == "sync" and operation.site == without):
            volume.apply(operation)
        folders = list(volume.folders())
        for done in choose_changes([f for f in folders if f.pending], rng):
            entries = volume.root.entries_left(done.get(volume.root, []))
            for what in CONTENTS:
                tree = list(files_left(entries, done, what))
                name = hashlib.blake2b(repr((tree, note)).encode()).digest()
                if name not in seen:
                    seen.add(name)
                    yield tree, note


def lay_out(tree: list[tuple[Path, bytes | None]], target: Path) -> None:
    target.mkdir()
    for path, content in tree:
        if content is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(content)
