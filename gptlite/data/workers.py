"""Jobs done by processes of their own, which end when this one does, however it ends.

Each process has one job at a time, handed to it over a pipe. What it has to say (which file it is
at, how far it came, what it made or what went wrong) comes back on the pipe; when something kills
it, the pipe ends, and the file that it was at is known.
"""

import multiprocessing
import multiprocessing.connection as connections
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gptlite import machine
from gptlite.errors import UserError

WORTH_TELLING = 1 << 20
"""Bytes; less is told together with what follows."""
Moved = Callable[[Path, int], None]
Do = Callable[[Any, Moved], Any]
"""A job, and whom to tell of each piece of text that was read, to what comes of it. Can be pickled:
it travels once to each process."""


class Worker:
    """A process from the parent's side, with the job it has and the file it is at."""

    def __init__(self, do: Do) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(do, theirs), daemon=True)
        with signals_held_back():
            self.process.start()
        theirs.close()  # else its end would not be seen when the process dies

    def begin(self, number: int, job: Any, first: Path) -> None:
        self.number, self.at = number, first
        self.pipe.send(job)

    def died(self) -> UserError:
        self.process.join(10)
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with {code}"
        return UserError(
            f"data.source: {self.at}: the process that read it {how}; "
            "the same command goes on from what is done"
        )


def work(do: Do, jobs: Sequence[Any], firsts: Sequence[Path], moved: Moved) -> list[Any]:
    """What comes of each job. The first error of any ends them all and is raised here.

    `firsts` are the files that jobs begin with.
    """
    results: list[Any] = [None] * len(jobs)
    waiting = iter(list(zip(range(len(jobs)), jobs, firsts, strict=True)))
    workers: dict[Any, Worker] = {}
    try:
        for _ in range(min(machine.count_cores(), len(jobs))):
            worker = Worker(do)
            workers[worker.pipe] = worker
        busy = [w.pipe for w in workers.values() if begun(w, waiting)]
        while busy:
            for pipe in connections.wait(busy):
                worker = workers[pipe]
                kind, *said = heard(worker)
                if kind == "at":
                    worker.at = said[0]
                    moved(*said)
                elif kind == "failed":
                    raise said[0]
                else:
                    results[worker.number] = said[0]
                    if not begun(worker, waiting):
                        busy.remove(worker.pipe)
        return results
    finally:
        for worker in workers.values():
            worker.process.kill()
        for worker in workers.values():
            worker.process.join()
            worker.pipe.close()


def begun(worker: Worker, waiting: Iterator[tuple[int, Any, Path]]) -> bool:
    """Whether there was a job for it."""
    job = next(waiting, None)
    if job is None:
        return False
    try:
        worker.begin(*job)
    except OSError:
        raise worker.died() from None
    return True


def heard(worker: Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        raise worker.died() from None


@contextmanager
def signals_held_back() -> Iterator[None]:
    """A process begun inside never gets them: whoever asks us to leave asks its parent only, who
    kills it. (A Ctrl-C reaches all processes of a terminal.)"""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which takes signals in again as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(do: Do, pipe: "Connection[Any, Any]") -> None:
    """A worker's life."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # nobody listens any more: the parent is gone
        while True:
            job = pipe.recv()
            told = Told(pipe)
            try:
                result = do(job, told)
                told.send()
                pipe.send(("done", result))
            except BaseException as error:  # noqa: BLE001 - a panic of tiktoken is no Exception
                pipe.send(("failed", portable(error)))


def leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connections.wait([parent.sentinel])
    os._exit(1)


def portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note; in words if it could not be made again there."""
    place = traceback.format_exc()
    if not isinstance(error, UserError | OSError | MemoryError):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error


class Told:
    """Tells the parent of what was read, in messages that are worth one."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self.pipe, self.n = pipe, 0
        self.file: Path | None = None

    def __call__(self, file: Path, n: int) -> None:
        self.n += n
        if file != self.file or self.n >= WORTH_TELLING:
            self.file = file
            self.send()

    def send(self) -> None:
        if self.file is not None:
            self.pipe.send(("at", self.file, self.n))
            self.n = 0
