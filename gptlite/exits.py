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
    except UserError as error:
        if verbose:
            traceback.print_exc()
        for problem in error.problems:
            tell_problem(problem)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as error:
        print("gptlite: interrupted", file=sys.stderr)
        raise typer.Exit(143 if isinstance(error, Terminated) else 130) from None
    except BrokenPipeError:
        # Whoever read our output has what it wanted; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except BaseException as error:
        # A panic of a library written in Rust is no Exception.
        panics = type(error).__name__ == "PanicException"
        if verbose or not (isinstance(error, Exception) or panics):
            raise
        if isinstance(error, OSError) and error.strerror:  # of the machine, not of ours
            where = f"{error.filename}: " if error.filename else ""
            tell_problem(f"gptlite: {where}{error.strerror}")
            raise typer.Exit(StorageError.exit_code) from None
        if is_out_of_memory(error):
            tell_problem(
                "gptlite: out of memory; lower train.memory_gib, train.micro_batch_size or the "
                "sizes under model. What was saved is whole"
            )
            raise typer.Exit(1) from None
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        tell_problem(f"gptlite: {problem} (a bug; -v shows where)")
        raise typer.Exit(1) from None


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
