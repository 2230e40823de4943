"""`gptlite generate --interactive`: a line in, its continuation out, until the end of input.

An empty line goes on with the text so far; `:again` tries once more; `:temperature 0.5`, `:seed 7`
and every other sampling option change what follows. Ctrl-C stops a continuation,
not the program. Texts go to stdout, all that is said about them to stderr. On a terminal, lines are
edited and remembered from one time to the next.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gptlite.config.reader import lay_sample_options
from gptlite.config.run import SampleConfig
from gptlite.config.strict_yaml import read_scalar
from gptlite.errors import UserError
from gptlite.terminal import is_terminal, tell, wants_colour
from gptlite.words import did_you_mean, escape_controls

GREETING = """\
{who}: type the beginning of a text, and the model continues it.
  Enter alone     go on from where the text is
  :again          try the last line once more
  :temperature T  change an option of sampling; :help shows them all
  Ctrl-C          stop a text; :quit or Ctrl-D leaves"""
MARK = " ▸ "
"""Between a prompt and its continuation, on a terminal without colours."""
MOST_LINES = 1000
"""Of the history."""
OPTIONS = [name for name in SampleConfig.model_fields if name not in ("interval", "prompts")]

Continue = Callable[[str, SampleConfig, int], Iterator[str]]
"""Pieces of the continuation of a text, with these options and this seed."""
Write = Callable[[str], None]


class Conversation(NamedTuple):
    options: SampleConfig
    seed: int
    text: str = ""
    """What was last continued, and its continuation."""
    prompt: str = ""
    """What was last asked."""


def converse(
    continue_: Continue, options: SampleConfig, seed: int, write: Write, say: Write
) -> None:
    """Read lines until the end of input; `say` takes the lines that are not of a text."""
    state = Conversation(options, seed)
    with suppress(EOFError):
        while True:
            state = answer(state, read_line(), continue_, write, say)


def answer(
    state: Conversation, line: str, continue_: Continue, write: Write, say: Write
) -> Conversation:
    """The state after one line."""
    if line.startswith(":"):
        word, _, value = line[1:].strip().partition(" ")
        if word in ("quit", "q"):
            raise EOFError
        if word != "again":
            return change_option(state, word.replace("-", "_"), value.strip(), say)
        prompt, state = state.prompt, state._replace(seed=state.seed + 1)
        say(f"seed {state.seed}")
    else:
        prompt = line or state.text
    text = prompt
    write(mark_prompt(prompt))
    problems: tuple[str, ...] = ()
    try:
        for piece in continue_(prompt, state.options, state.seed):
            write(piece)
            text += piece
    except KeyboardInterrupt:
        problems = ("stopped",)
    except UserError as error:
        problems = error.problems
    write("\n")
    for problem in problems:
        say(problem)
    return state._replace(text=text, prompt=prompt)


def change_option(state: Conversation, word: str, value: str, say: Write) -> Conversation:
    """An option set, and said so; or what there is to set."""
    values = {"seed": state.seed, **{name: getattr(state.options, name) for name in OPTIONS}}
    if word == "help":
        say("a line is continued, an empty one goes on, :again tries once more, :quit leaves")
        for name, now in values.items():
            say(f"  :{name} {show(now)}")
        return state
    if word not in values:
        say(f":{word}: no such command; :help lists them{did_you_mean(word, values)}")
        return state
    changed = state
    try:
        if word == "seed":
            changed = state._replace(seed=read_seed(value))
        else:
            changed = state._replace(options=set_option(state.options, word, value))
    except UserError as error:
        say(str(error))
        return state
    now = changed.seed if word == "seed" else getattr(changed.options, word)
    say(f"{word}: {show(values[word])} -> {show(now)}")
    return changed


def read_seed(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise UserError(f":seed: expected an integer of at least 0 (got {value!r})")
    return int(value)


def set_option(options: SampleConfig, name: str, value: str) -> SampleConfig:
    """Raises ConfigError naming the option; `none` is for those that may be without a value."""
    if value.lower() in ("none", "null") and SampleConfig.model_fields[name].default is None:
        return options.model_copy(update={name: None})
    read = read_scalar(value)
    return lay_sample_options(options, {name: value if read is None else read}, ":")


def show(value: Any) -> str:
    return "none" if value is None else str(value)


def read_line() -> str:
    """One line; edited where someone types. Raises EOFError at the end."""
    if not is_terminal(sys.stdin):
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


def mark_prompt(text: str) -> str:
    """The prompt as it stands before its continuation: bold, or with a mark behind it; in a file
    or a pipe there is only the text."""
    shown = escape_controls(text, keep="\n\t")
    if wants_colour(sys.stdout):
        return f"\x1b[1m{shown}\x1b[0m"
    return shown + MARK if is_terminal(sys.stdout) and text else text


def talk(generate: Callable[..., Any], options: SampleConfig, seed: int, who: str) -> None:
    """Converse on this terminal. `generate` makes a Generation of prompts, options and seed; `who`
    is what the greeting calls the model."""
    on_screen, typed = is_terminal(sys.stdout), is_terminal(sys.stdin)
    keep = load_history() if typed else lambda: None
    if typed:
        for line in GREETING.format(who=who).splitlines():
            tell(line)

    def pieces(prompt: str, options: SampleConfig, seed: int) -> Iterator[str]:
        for piece in generate([prompt], options, seed=seed).pieces():
            yield escape_controls(piece.text, keep="\n\t") if on_screen else piece.text

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        converse(pieces, options, seed, write, tell)
    finally:
        keep()
