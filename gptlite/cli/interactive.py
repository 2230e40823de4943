"""`gptlite generate --interactive`: a line in, its continuation out, until the end of input.

An empty line goes on with the text so far; `:again` tries once more; `:temperature 0.5`, `:seed 7`
and every other sampling option change what follows. Ctrl-C stops a continuation,
not the program. On a terminal, lines are edited and remembered from one time to the next.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gptlite.config.run import SampleConfig
from gptlite.config.strict_yaml import read_scalar
from gptlite.errors import UserError
from gptlite.terminal import wants_colour
from gptlite.words import escape_controls

HELP = (
    "a line is continued; an empty one goes on from there; :again tries once more; "
    ":quit or Ctrl-D leaves\noptions: "
)
MOST_LINES = 1000
"""Of the history."""

Continue = Callable[[str, SampleConfig, int], Iterator[str]]
"""Pieces of the continuation of a text, with these options and this seed."""


class Conversation(NamedTuple):
    options: SampleConfig
    seed: int
    text: str
    """What was last continued, and its continuation."""
    prompt: str
    """What was last asked."""


def converse(
    continue_: Continue, options: SampleConfig, seed: int, write: Callable[[str], None]
) -> None:
    """Read lines until the end of input."""
    state = Conversation(options, seed, "", "")
    with suppress(EOFError):
        while True:
            state = answer(state, read_line(), continue_, write)


def answer(
    state: Conversation, line: str, continue_: Continue, write: Callable[[str], None]
) -> Conversation:
    """The state after one line."""
    if line.startswith(":"):
        word, _, value = line[1:].strip().partition(" ")
        if word in ("quit", "q"):
            raise EOFError
        if word != "again":
            return change_option(state, word, value.strip(), write)
        prompt, state = state.prompt, state._replace(seed=state.seed + 1)
    else:
        prompt = line or state.text
    text = prompt
    write(bold(prompt))
    try:
        for piece in continue_(prompt, state.options, state.seed):
            write(piece)
            text += piece
    except KeyboardInterrupt:
        write(" [stopped]")
    except UserError as error:
        write(f"\n{error}")
    write("\n")
    return state._replace(text=text, prompt=prompt)


def change_option(
    state: Conversation, word: str, value: str, write: Callable[[str], None]
) -> Conversation:
    """An option set, or what there is to set."""
    known = [name for name in SampleConfig.model_fields if name not in ("interval", "prompts")]
    try:
        if word == "seed":
            return state._replace(seed=int(value))
        if word in known and not value:
            raise ValueError("nothing to set it to")
        if word in known:
            asked = {**state.options.model_dump(), word: read_scalar(value)}
            return state._replace(options=SampleConfig.model_validate(asked))
        shown = (f"{name} {getattr(state.options, name)}" for name in known)
        write(f"{HELP}seed {state.seed}, {', '.join(shown)}\n")
    except (ValidationError, ValueError):
        write(f":{word}: cannot be {value!r}\n")
    return state


def read_line() -> str:
    """One line; edited where someone types. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or :quit leaves)", file=sys.stderr)


def load_history() -> Callable[[], None]:
    """Bring back the lines of earlier times; what is returned keeps those of this one."""
    try:
        import readline
    except ImportError:  # Windows
        return lambda: None
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "gptlite" / "history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MOST_LINES)

    def keep() -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)

    return keep


def bold(text: str) -> str:
    shown = escape_controls(text, keep="\n\t")
    return f"\x1b[1m{shown}\x1b[0m" if wants_colour(sys.stdout) else text


def talk(generate: Callable[..., Any], options: SampleConfig, seed: int) -> None:
    """Converse on this terminal. `generate` makes a Generation of prompts, options and seed."""
    on_screen = sys.stdout.isatty()
    keep = load_history() if sys.stdin.isatty() else lambda: None

    def pieces(prompt: str, options: SampleConfig, seed: int) -> Iterator[str]:
        for piece in generate([prompt], options, seed=seed).pieces():
            yield escape_controls(piece.text, keep="\n\t") if on_screen else piece.text

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        converse(pieces, options, seed, write)
    finally:
        keep()
