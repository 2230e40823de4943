"""How a command ends: one line per problem on stderr, and the exit code that names its kind."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from gptlite.errors import StorageError, Terminated, UserError
from gptlite.output import tell_problem


@contextmanager
def user_errors(verbose: bool = False) -> Iterator[None]:
    """One line per problem on stderr, and the exit code that names its kind."""
    try:
        yield
        sys.stdout.flush()  # here, where a reader that has gone is no failure
    except BrokenPipeError:
        # Whoever read our output has what it wanted; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except BaseException as error:
        # A panic of a library written in Rust is no Exception.
        panics = type(error).__name__ == "PanicException"
        told = isinstance(error, Exception | KeyboardInterrupt) or panics
        if not told or (verbose and not isinstance(error, UserError | KeyboardInterrupt)):
            raise
        if verbose and isinstance(error, UserError):
            traceback.print_exc()
        code, problems = ending(error)
        for problem in problems:
            tell_problem(problem)
        raise typer.Exit(code) from None


def ending(error: BaseException) -> tuple[int, list[str]]:
    """The exit code of a command that ends so, and what is said of it."""
    if isinstance(error, UserError):
        return error.exit_code, list(error.problems)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, ["gptlite: interrupted"]
    if isinstance(error, OSError) and error.strerror:  # of the machine, not of ours
        where = f"{error.filename}: " if error.filename else ""
        return StorageError.exit_code, [f"gptlite: {where}{error.strerror}"]
    if is_out_of_memory(error):
        return 1, [
            "gptlite: out of memory; lower train.memory_gib, train.micro_batch_size or the "
            "sizes under model. What was saved is whole"
        ]
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return 1, [f"gptlite: {first} (a bug; -v shows where)"]


def is_out_of_memory(error: BaseException) -> bool:
    """torch says so with an error of its own on a GPU, and with words on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def leave_when_terminated() -> None:
    """SIGTERM unwinds like Ctrl-C, so that nothing half written stays; training saves first."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
