"""YAML read strictly: text → plain values, and the place of every key and value.

YAML 1.2 scalars only: `3e-4` is a float; `off`, `1:30`, `1_000` and dates stay text; `017` is
refused. Duplicate keys, anchors, aliases, tags and several documents are refused, and size, depth
and node count are bounded, so no file can cost more than a moment. No object is ever constructed.
"""

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


class Reader:
    """One pass over the parser's events; what a config may not contain stops it at its place."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.nodes = 0
        self.problems: list[str] = []
        self.document = Document({})

    def place(self, mark: Any) -> str:
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def refuse(self, event: Any, message: str) -> ConfigError:
        return ConfigError(*self.problems, f"{self.place(event.start_mark)}: {message}")

    def value(self, event: Any, path: Path_) -> Any:
        """The value that `event` begins; the events of its parts are consumed."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.refuse(event, f"more than {MAX_NODES} values in one config")
        if len(path) > MAX_DEPTH:
            raise self.refuse(event, f"nested too deep (more than {MAX_DEPTH} levels)")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.refuse(event, "anchors/aliases are not allowed; write the value out")
        if event.tag is not None:
            raise self.refuse(event, f"tags are not allowed (got {event.tag!r})")
        self.document.places[path] = self.place(event.start_mark)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        if event.style is not None:
            self.document.quoted.add(path)
            return event.value
        return self.scalar(event, path)

    def mapping(self, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self.refuse(event, "keys must be strings")
            key = self.value(event, (*path, "<key>"))
            if event.value == "<<" and event.style is None:
                raise self.refuse(event, "merge keys are not allowed; write the values out")
            if not isinstance(key, str):
                raise self.refuse(event, f"keys must be strings (got {event.value!r})")
            below = (*path, key)
            if key in values:
                name = ".".join(map(str, below))
                first = f"(first at line {lines[key]})"
                self.problems.append(
                    f"{self.place(event.start_mark)}: {name}: duplicate key {first}"
                )
            lines.setdefault(key, event.start_mark.line + 1)
            self.document.key_places[below] = self.place(event.start_mark)
            values[key] = self.value(next(self.events), below)
        return values

    def sequence(self, path: Path_) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self.value(event, (*path, len(values))))
        return values

    def scalar(self, event: Any, path: Path_) -> Any:
        text = event.value
        if text.lower() in CONSTANTS:
            return CONSTANTS[text.lower()]
        if text.lower() in NOT_FINITE:
            return float(NOT_FINITE[text.lower()])
        if LEADING_ZERO.match(text):
            name = ".".join(map(str, path))
            self.problems.append(
                f"{self.place(event.start_mark)}: {name}: a number may not have a "
                f"leading zero (got {text})"
            )
            return text
        if INTEGER.match(text):
            # int() refuses thousands of digits; any bound in the config is far below this one.
            return int(text) if len(text) < 40 else int(text[:40])
        return float(text) if FLOAT.match(text) else text


def parse(text: str, name: str) -> Document:
    """Read one YAML mapping; `name` stands before line and column in every problem.

    Raises ConfigError with all duplicate keys and leading zeros at once, or the first thing that
    ends the reading.
    """
    reader = Reader(text, name)
    try:
        started = [next(reader.events), next(reader.events)]
        if isinstance(started[1], yaml.StreamEndEvent):
            raise ConfigError(f"{name}: config is empty")
        first = next(reader.events)
        values = reader.value(first, ())
        next(reader.events)  # the end of the document
        after = next(reader.events)
    except yaml.YAMLError as error:
        raise ConfigError(*reader.problems, syntax_problem(error, name)) from None
    if not isinstance(after, yaml.StreamEndEvent):
        raise reader.refuse(after, "only one YAML document per file is allowed")
    if values is None:
        raise ConfigError(f"{name}: config is empty")
    if not isinstance(values, dict):
        kind = {list: "a list", str: "a string", bool: "true or false"}.get(
            type(values), "a number"
        )
        problem = f"expected a mapping at top level, got {kind}"
        raise ConfigError(f"{reader.document.places[()]}: {problem}")
    if reader.problems:
        raise ConfigError(*reader.problems)
    reader.document.values = values
    return reader.document


def syntax_problem(error: yaml.YAMLError, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or error.context or "cannot be read"
        if "'\\t'" in problem:
            problem = "tab character; indent with spaces"
        return f"{place}: invalid YAML: {problem}"
    if isinstance(error, yaml.reader.ReaderError):
        # `position` is where in the text; PyYAML refuses characters that no YAML may contain.
        return f"{name}: invalid YAML: character #x{error.character:04x} at {error.position}"
    return f"{name}: invalid YAML: {error}"


def scalar(text: str, name: str) -> Any:
    """The value of `--set key=text`, read like the right side of a YAML line."""
    if not text.strip():
        raise ConfigError(f"{name}: no value given; write {name}=VALUE")
    if "\n" in text:
        raise ConfigError(f"{name}: the value must be one line")
    return parse(f"value: {text}", name).values["value"]


def read(path: Path) -> Document:
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
