"""Jobs done by processes of their own, which end when this one does, however it ends.

Each process has one job at a time, handed to it over a pipe. What it has to say (which file it is
at, how far it came, what it made or what went wrong) comes back on the pipe; when something kills
it, the pipe ends, and the file that it was at is known. That is why this is not concurrent.futures:
its BrokenProcessPool cannot name the file that killed a worker.
"""

import multiprocessing
import multiprocessing.connection as connections
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gptlite import machine
from gptlite.errors import UserError

WORTH_TELLING = 1 << 20
"""Bytes; less is reported together with what follows."""
Advance = Callable[[Path, int], None]
"""Called for each piece of text that was read, with its file and its bytes in UTF-8."""
DoJob = Callable[[Any, Advance], Any]
"""Does a job and returns its result. Can be pickled: it travels once to each process."""


class Worker:
    """A process from the parent's side, with the job it has and the file it is at."""

    def __init__(self, do: DoJob) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(do, theirs), daemon=True)
        with block_signals():
            self.process.start()
        theirs.close()  # else its end would not be seen when the process dies

    def begin(self, number: int, job: Any, first: Path) -> None:
        self.number, self.at = number, first
        try:
            self.pipe.send(job)
        except OSError:
            raise self.death() from None

    def receive(self) -> Any:
        """The next message; UserError if the process is dead."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self.death() from None

    def death(self) -> UserError:
        self.process.join(10)
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with {code}"
        return UserError(
            f"data.source: {self.at}: the process that read it {how}; "
            "the same command goes on from what is done"
        )


def run_jobs(do: DoJob, jobs: Sequence[Any], firsts: Sequence[Path], advance: Advance) -> list[Any]:
    """What comes of each job. The first error of any ends them all and is raised here.

    `firsts` are the files that jobs begin with.
    """
    results: list[Any] = [None] * len(jobs)
    waiting = deque(zip(range(len(jobs)), jobs, firsts, strict=True))
    workers: dict[Any, Worker] = {}
    try:
        for _ in range(min(machine.count_cores(), len(jobs))):
            worker = Worker(do)
            workers[worker.pipe] = worker
        for worker in workers.values():
            worker.begin(*waiting.popleft())
        busy = list(workers)
        while busy:
            for pipe in connections.wait(busy):
                worker = workers[pipe]
                kind, *content = worker.receive()
                if kind == "at":
                    worker.at, n = content
                    advance(worker.at, n)
                elif kind == "failed":
                    raise content[0]
                else:
                    results[worker.number] = content[0]
                    if waiting:
                        worker.begin(*waiting.popleft())
                    else:
                        busy.remove(pipe)
        return results
    finally:
        for worker in workers.values():
            worker.process.kill()
        for worker in workers.values():
            worker.process.join()
            worker.pipe.close()


@contextmanager
def block_signals() -> Iterator[None]:
    """A process started inside never gets them: whoever asks us to leave asks its parent only, who
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


def serve(do: DoJob, pipe: "Connection[Any, Any]") -> None:
    """A worker's life."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # nobody listens any more: the parent is gone
        while True:
            job = pipe.recv()
            reporter = Reporter(pipe)
            try:
                result = do(job, reporter)
                reporter.send()
                pipe.send(("done", result))
            except BaseException as error:  # noqa: BLE001 - a panic of tiktoken is no Exception
                pipe.send(("failed", portable_error(error)))


def leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connections.wait([parent.sentinel])
    os._exit(1)


def portable_error(error: BaseException) -> BaseException:
    """The error with its traceback as a note; in words if it could not be made again there."""
    place = traceback.format_exc()
    if not isinstance(error, UserError | OSError | MemoryError):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(place)
    return error


class Reporter:
    """Tells the parent what was read, in messages that are worth one."""

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
