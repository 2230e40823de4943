"""YAML read strictly: text → plain values, and the place of every key and value.

YAML 1.2 scalars only: `3e-4` is a float; `off`, `1:30`, `1_000` and dates stay text; `017` is
refused. Duplicate keys, anchors, aliases, tags and several documents are refused, and size, depth
and node count are bounded, so no file can cost more than a moment. No object is ever constructed.
"""

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gptlite.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 10_000

INTEGER = re.compile(r"[-+]?[0-9]+\Z")
LEADING_ZERO = re.compile(r"[-+]?0[0-9]+\Z")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
CONSTANTS = {"": None, "~": None, "true": True, "false": False, "null": None}
NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
KINDS = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}

Path_ = tuple[str | int, ...]


@dataclass
class Document:
    """Values as dicts, lists and scalars; `places` says where each path stands in its source."""

    values: dict[str, Any]
    places: dict[Path_, str] = field(default_factory=dict)
    """`file:line:column` of the value at a path, or `--set a.b`."""
    key_places: dict[Path_, str] = field(default_factory=dict)
    quoted: set[Path_] = field(default_factory=set)
    """Paths whose value was written in quotes, for error messages."""
    problems: list[str] = field(default_factory=list)
    """What is refused but did not end the reading, so that it is told with all that follows."""
    refused: set[Path_] = field(default_factory=set)
    """The paths that `problems` are about."""

    def value(self, path: Path_) -> Any:
        """What stands at a path; None if nothing does."""
        values: Any = self.values
        for part in path:
            if isinstance(values, dict):
                values = values.get(part)
            elif isinstance(values, list) and isinstance(part, int) and part < len(values):
                values = values[part]
            else:
                return None
        return values


def problem_line(place: str, path: Path_, message: str) -> str:
    dotted = ".".join(map(str, path))
    option, _, key = place.partition(" ")
    named = option in ("--set", "--sweep") and dotted in (key, f"set.{key}", f"axes.{key}")
    return f"{place}: {message}" if named else f"{place}: {dotted}: {message}"


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    if text.lower() in NOT_FINITE:
        return float(NOT_FINITE[text.lower()])
    # int() refuses thousands of digits; a float says as well that no field takes that much.
    if INTEGER.match(text) and len(text) < 40:
        return int(text)
    return float(text) if FLOAT.match(text) else text


class Reader:
    """One pass over the parser's events; what a config may not contain stops it at its place.

    `inline` text has no lines of its own: all of it stands at `name`.
    """

    def __init__(self, text: str, name: str, *, inline: bool) -> None:
        self.name, self.inline = name, inline
        self.loader = yaml.SafeLoader(text)
        self.nodes = 0
        self.document = Document({})

    def next(self) -> Any:
        return self.loader.get_event()

    def place(self, mark: Any) -> str:
        at = "" if self.inline or mark is None else f":{mark.line + 1}:{mark.column + 1}"
        return self.name + at

    def refuse(self, mark: Any, message: str) -> ConfigError:
        return ConfigError(*self.document.problems, f"{self.place(mark)}: {message}")

    def note(self, mark: Any, path: Path_, message: str) -> None:
        """A problem that does not keep the rest from being read."""
        self.document.problems.append(problem_line(self.place(mark), path, message))
        self.document.refused.add(path)

    def read(self) -> Document:
        empty = ConfigError(f"{self.name}: config is empty")
        _, second = self.next(), self.next()
        if isinstance(second, yaml.StreamEndEvent):
            raise empty
        first = self.next()
        values = self.value(first, ())
        self.next()  # the end of the document
        if not isinstance(after := self.next(), yaml.StreamEndEvent):
            raise self.refuse(after.start_mark, "only one YAML document per file is allowed")
        if values is None:
            raise empty
        if not isinstance(values, dict):
            what = f"expected a mapping at top level, got {KINDS[type(values)]}"
            raise self.refuse(first.start_mark, what)
        self.document.values = values
        return self.document

    def check(self, event: Any, path: Path_) -> None:
        self.nodes += 1
        mark = event.start_mark
        if self.nodes > MAX_NODES:
            raise self.refuse(mark, f"more than {MAX_NODES} values in one config")
        if len(path) > MAX_DEPTH:
            raise self.refuse(mark, f"nested too deep (more than {MAX_DEPTH} levels)")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.refuse(mark, "anchors/aliases are not allowed; write the value out")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.refuse(mark, f"tags are not allowed (got {tag!r})")

    def value(self, event: Any, path: Path_) -> Any:
        """The value that `event` begins; the events of its parts are consumed."""
        self.check(event, path)
        self.document.places[path] = self.place(event.start_mark)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        if event.style is not None:
            if event.style in "'\"":
                self.document.quoted.add(path)
            return event.value
        if LEADING_ZERO.match(event.value):
            why = "a number may not have a leading zero; quote it if it is text"
            self.note(event.start_mark, path, f"{why} (got {event.value[:40]})")
        return read_scalar(event.value)

    def mapping(self, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key, mark = self.key(event, path), event.start_mark
            below = (*path, key)
            if key in values:
                first = "" if self.inline else f" (first at line {lines[key]})"
                self.note(mark, below, f"duplicate key{first}")
            lines.setdefault(key, mark.line + 1)
            self.document.key_places[below] = self.place(mark)
            values[key] = self.value(self.next(), below)
        return values

    def key(self, event: Any, path: Path_) -> str:
        self.check(event, path)
        mark = event.start_mark
        if not isinstance(event, yaml.ScalarEvent):
            raise self.refuse(mark, "keys must be strings")
        if event.style is None and event.value == "<<":
            raise self.refuse(mark, "merge keys are not allowed; write the values out")
        if event.style is None and not isinstance(read_scalar(event.value), str):
            raise self.refuse(mark, f"keys must be strings (got {event.value!r})")
        return event.value

    def sequence(self, path: Path_) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            values.append(self.value(event, (*path, len(values))))
        return values


def parse(text: str, name: str, *, inline: bool = False) -> Document:
    """Read one YAML mapping; `name` stands before line and column in every problem.

    Duplicate keys and leading zeros are left in the document's `problems`; ConfigError is what
    ends the reading.
    """
    try:
        reader = Reader(text, name, inline=inline)
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        at = "" if inline else f":{len(before)}:{len(before[-1]) + 1}"
        why = f"character #x{error.character:04x} is not allowed"
        raise ConfigError(f"{name}{at}: invalid YAML: {why}") from None
    try:
        return reader.read()
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "cannot be read"
        if "'\\t'" in problem:
            problem = "tab character; indent with spaces"
        elif error.context in ("while scanning an alias", "while scanning an anchor"):
            problem = "text that begins with * or & needs quotes"
        mark = error.problem_mark or error.context_mark
        raise reader.refuse(mark, f"invalid YAML: {problem}") from None
    except (ValueError, OverflowError):  # of chr(), for "\UFFFFFFFF"
        why = "an escape that is no character"
        raise reader.refuse(reader.loader.get_mark(), f"invalid YAML: {why}") from None


def override(path: list[str], text: str, name: str) -> Document:
    """`--set path=text`: the text is read like the right side of a YAML line."""
    if not text.strip():
        raise ConfigError(f"{name}: no value given; write {name}=VALUE")
    if text.splitlines() != [text]:
        raise ConfigError(f"{name}: the value must be one line")
    keys = (" " * depth + json.dumps(key, ensure_ascii=False) for depth, key in enumerate(path))
    return parse(":\n".join(keys) + ": " + text, name, inline=True)


def read_yaml(path: Path) -> Document:
    """Parse a file. Anything but a regular file of at most 1 MiB of UTF-8 is a ConfigError."""
    try:
        # Asking first keeps a pipe or a device from hanging the read.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path}: not a regular file")
        if os.stat(path).st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB; a config is a short file")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    return parse(text, str(path))
