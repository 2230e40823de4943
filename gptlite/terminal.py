"""What a terminal is told: lines, problems, bars, numbers; and how a command ends. No torch."""

import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from gptlite.errors import StorageError, Terminated, UserError
from gptlite.words import escape_controls


def tell(line: str) -> None:
    print(escape_controls(line), file=sys.stderr)


def tell_problem(problem: str) -> None:
    """One line of an error; on a terminal the place it names is red."""
    place, colon, why = escape_controls(problem).partition(": ")
    if colon and wants_colour(sys.stderr):
        place = typer.style(place, fg="red")
    print(f"{place}{colon}{why}", file=sys.stderr)


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def is_watched(stream: TextIO) -> bool:
    """Whether this is a terminal that a person looks at."""
    plain = os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return is_terminal(stream) and not plain


def wants_colour(stream: TextIO) -> bool:
    """NO_COLOR and FORCE_COLOR decide, in this order (no-color.org); else who watches."""
    if os.environ.get("NO_COLOR") or os.environ.get("FORCE_COLOR"):
        return not os.environ.get("NO_COLOR")
    return is_watched(stream)


def tell_lines(text: str) -> None:
    print(escape_controls(text.rstrip("\n"), keep="\n"), file=sys.stderr)


def fold(line: str, indent: int = 4, columns: int = 80) -> str:
    """A line folded to these columns, all lines but the first indented; paths stay whole."""
    lines = textwrap.wrap(
        line,
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def in_notebook() -> bool:
    """Whether this is a cell of a notebook, which shows bars though it is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def wants_bar(progress: str, stream: TextIO) -> bool:
    """A bar only where someone can see it move."""
    return progress == "bar" or (progress == "auto" and (is_watched(stream) or in_notebook()))


def columns_of(stream: TextIO) -> int:
    """How wide this terminal is. COLUMNS wins, as for other programs; 80 where nothing says so."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # some terminals say 0
    except (OSError, ValueError):
        return 80


def format_number(number: float) -> str:
    """Three digits and a suffix, as in 1.23k."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Minutes and seconds, as in 1:05; hours where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe_duration(seconds: float) -> str:
    """An estimate in two digits, such as 40 s, 12 min, 2.5 h or 5 days."""
    for unit, size, most in (("s", 1, 99), ("min", 60, 99), ("h", 3600, 48)):
        number = max(1.0, seconds / size)
        if round(number) <= most:
            return f"{number:.2g} {unit}"
    return f"{round(seconds / 86400):,} days"


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
        explained = isinstance(error, Exception | KeyboardInterrupt) or panics
        if not explained or (verbose and not isinstance(error, UserError | KeyboardInterrupt)):
            raise
        if verbose and isinstance(error, UserError):
            traceback.print_exc()
        code, problems = describe_exit(error)
        for problem in problems:
            tell_problem(problem)
        raise typer.Exit(code) from None


def describe_exit(error: BaseException) -> tuple[int, list[str]]:
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
            "gptlite: out of memory; lower train.memory_gib, train.micro_batch_size or "
            "model.context_length, n_layer or n_embd. What was saved is whole"
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
