"""Who holds a folder or a file: one process, until it lets go or ends, however that happens.

Not the library filelock: it cannot say who holds a lock, and where a file system has none it falls
back to a file that a killed process leaves behind.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

from gptlite import storage
from gptlite.terminal import tell

LOCK = ".lock"
"""The file in a folder that is locked."""
SECONDS_BETWEEN_LOOKS = 0.05


@contextmanager
def hold_folder(folder: Path, waiting: str = "") -> Iterator[None]:
    """Wait until the folder is ours, and hold it inside; `waiting` is said once."""
    with open_lock(folder) as file:
        while acquire(file) is not None:
            if waiting:
                tell(f"{folder}: {waiting}")
            waiting = ""
        yield


def open_lock(folder: Path) -> TextIO:
    """The lock's file; never what a link points to, as it is emptied and written."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    return os.fdopen(storage.open_regular(folder / LOCK, flags), "a+", errors="replace")


def acquire(file: TextIO) -> str | None:
    """Make the lock ours; else who has it. Where there are no locks, a warning must do.

    Who holds it says so a moment after taking it and until just before the end; who only looks
    holds it for a moment.
    """
    holder = ""
    for _ in range(5):
        try:
            lock(file)
            return None
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or holder
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except (ImportError, OSError) as error:
            why = getattr(error, "strerror", None) or "not on this system"
            warning = f"{file.name}: cannot be locked ({why}); let no other run write here"
            tell(warning)
            return None
    return holder or "another process"


def lock(file: IO[Any]) -> None:
    """BlockingIOError if it is locked; another OSError, or ImportError, where nothing can be:
    Windows, and some network file systems."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IO[Any]) -> bool | None:
    """Lock a file, if nobody has; whether that went well. None: there are no locks here."""
    try:
        lock(file)
        return True
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None


def lock_new_folder(folder: Path) -> TextIO | None:
    """The lock of a new folder, which says that its process lives; None if the folder is gone."""
    with suppress(FileNotFoundError):
        file = open_lock(folder)
        if try_lock(file) is not False and folder.is_dir():
            return file
        file.close()
    return None


def discard_abandoned(path: Path) -> None:
    """Remove a file or folder that nobody holds any more; where there are no locks, who knows."""
    with suppress(OSError), open_lock(path) if path.is_dir() else path.open() as file:
        if try_lock(file):
            storage.discard(path)
