"""Words as they are shown: counts, and what others wrote: what a terminal would obey, passwords,
slips of the pen."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import unquote

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys: controls, ends of lines, changes of direction, halves of characters."""
PASSWORD = re.compile(r"(://[^\s:/@]*:|[?&]\w*password=)((?<=:)\S*(?=@)|(?<==)[^&\s]*)")
"""In a URL: what comes before it, and itself."""


def count(number: int, noun: str) -> str:
    """As in: 1 token; 2,048 tokens."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a slip of the pen may have been meant as, to be put behind the problem."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), names, 1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def escape_controls(text: str, keep: str = "") -> str:
    """Control characters shown, not obeyed by the terminal, all but those to keep."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return CONTROL.sub(escape, text)


def mask_passwords(text: str) -> str:
    """The text with *** for the passwords of URLs in it."""
    return PASSWORD.sub(r"\1***", text)


def passwords(text: str) -> set[str]:
    """As they stand in URLs, and as they are meant."""
    found = {match[2] for match in PASSWORD.finditer(text)}
    return (found | set(map(unquote, found))) - {""}
