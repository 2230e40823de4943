"""What a user can be told: every failure they can act on, with the exit code a script sees.

0 done | 1 failure | 2 usage or config | 3 no usable checkpoint | 4 diverged | 5 storage |
6 run directory in use | 128 + n stopped by signal n (130 SIGINT, 143 SIGTERM), checkpoint saved
"""

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from difflib import get_close_matches
from urllib.parse import unquote

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys: controls, ends of lines, changes of direction, halves of characters."""
PASSWORD = re.compile(r"(://[^\s:/@]*:|[?&]\w*password=)((?<=:)\S*(?=@)|(?<==)[^&\s]*)")
"""In a URL: what comes before it, and itself."""


class UserError(Exception):
    """Something the user can mend; each problem is one line that names the place and the fix."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(UserError):
    """A config, an option or a prompt that cannot be meant."""

    exit_code = 2


class UnknownCharacter(ConfigError):
    """A character that a vocabulary lacks, in a text that may be a piece of a larger one."""

    def __init__(self, character: str, position: int, known: Set[str]) -> None:
        self.known = known
        self.why = (
            f"is not in the vocabulary of {len(known)} characters; leave it out, or train with "
            "tokenizer.unknown: replace (or kind: byte)"
        )
        super().__init__(f"character {character!r} at position {position} {self.why}")

    def first_in(self, text: str) -> int | None:
        """Where the first such character of a text stands."""
        return min((text.index(one) for one in set(text) - self.known), default=None)


class DataError(UserError):
    """Text or token files that are missing, damaged or too small for what is asked."""

    exit_code = 2


class CheckpointError(UserError):
    """No checkpoint that can be trusted."""

    exit_code = 3


class DivergedError(UserError):
    """A loss or gradient that is not finite; it never reaches the weights."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full, read-only, gone or failing."""

    exit_code = 5


class RunInUseError(UserError):
    """Another process trains in this run directory."""

    exit_code = 6


class Stopped(UserError):
    """A signal asked to leave; the checkpoint is saved."""

    def __init__(self, signal_number: int, *problems: str) -> None:
        super().__init__(*problems)
        self.exit_code = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing has to be saved: what is half written is removed on the way out."""


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Says of what is not finite at which step of a run it was."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"step {step}: {error}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a slip of the pen may have been meant as, to be put behind the problem."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), names, 1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def visible(text: str, keep: str = "") -> str:
    """Control characters shown, not obeyed by the terminal, all but those to keep."""

    def shown(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return CONTROL.sub(shown, text)


def without_passwords(text: str) -> str:
    """The text with *** for the passwords of URLs in it."""
    return PASSWORD.sub(r"\1***", text)


def passwords(text: str) -> set[str]:
    """As they stand in URLs, and as they are meant."""
    found = {match[2] for match in PASSWORD.finditer(text)}
    return (found | set(map(unquote, found))) - {""}
