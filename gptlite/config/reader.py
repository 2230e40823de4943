"""YAML files and `--set` → one RunConfig, or every problem at once with its place.

Files merge left to right and `--set` last; each value remembers where it came from. What is said
about a value that will not do is in `wording.py`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gptlite.config import strict_yaml
from gptlite.config.contradictions import contradictions, training_needs
from gptlite.config.run import RunConfig, SampleConfig
from gptlite.config.strict_yaml import Document, Path_, problem_line
from gptlite.config.wording import explain, run_schema
from gptlite.errors import ConfigError
from gptlite.words import did_you_mean

# Setting one of these in a later layer takes back the other of an earlier one.
REPLACES = {
    ("train", "epochs"): ("train", "max_steps"),
    ("train", "max_steps"): ("train", "epochs"),
    ("data", "source"): ("data", "sha256"),
}


def shipped_configs() -> Path:
    """The folder of shipped configs: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent.parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def opening_comment(path: Path) -> str:
    """What a file says of itself, in the comment that it begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def is_study(document: Document) -> bool:
    """Whether this describes many runs: it has a base, and nothing of a run itself."""
    return "base" in document.values and not document.values.keys() & RunConfig.model_fields.keys()


def find(name: str) -> Path:
    """A file, or the name of a shipped config."""
    if not name:
        raise ConfigError("--config: is empty; give a file or a shipped config")
    path = Path(name)
    if path.suffix or os.path.exists(path) or path.parent != Path():
        return path
    shipped = {file.stem: file for file in sorted(shipped_configs().glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped) or f"; shipped configs: {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such file, and no shipped config of that name{hint}")


def read_layers(files: Sequence[str], overrides: Sequence[str]) -> Document:
    """One document of all layers, later ones winning. ConfigError if a file cannot be read."""
    merged = Document({})
    unreadable: list[str] = []
    for file in files:
        try:
            found = find(file)
            layer = strict_yaml.read_yaml(found)
            if is_study(layer):
                told = f"is a study, which describes many runs; run it with: gptlite study {found}"
                raise ConfigError(f"{found}: {told}")
            merge(merged, layer)
        except ConfigError as error:
            unreadable += error.problems
    if unreadable:
        raise ConfigError(*merged.problems, *unreadable)
    seen: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        try:
            merge(merged, override_layer(path, value if equals else None, seen))
        except ConfigError as error:
            merged.problems += error.problems
            merged.refused.add(tuple(path))
    return merged


def override_layer(path: list[str], text: str | None, seen: set[str]) -> Document:
    """What `--set path=text` says; no text if it has no equals sign."""
    key = ".".join(path)
    name = f"--set {key}"
    if not all(path):
        raise ConfigError(f"{name}: expected section.key=value, as in --set optim.lr=3e-4")
    if text is None:
        raise ConfigError(f"{name}: expected key=value, as in --set optim.lr=3e-4")
    if key in seen:
        raise ConfigError(f"{name}: given twice")
    seen.add(key)
    return strict_yaml.override(path, text, name)


def merge(into: Document, layer: Document) -> None:
    """Lay one layer over what is there; its places go with its values."""
    for path, other in REPLACES.items():
        if layer.value(path) is not None and layer.value(other) is None:
            section = into.values.get(other[0])
            if isinstance(section, dict):
                section.pop(other[1], None)

    def lay(target: dict[str, Any], values: dict[str, Any], at: Path_) -> None:
        for key, value in values.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(target.get(key), dict):
                lay(target[key], value, path)
            else:
                target[key] = value
                into.quoted -= {path}

    lay(into.values, layer.values, ())
    into.places |= layer.places
    into.key_places |= layer.key_places
    into.quoted |= layer.quoted
    into.problems += layer.problems
    into.refused |= layer.refused


def sample_options(run_dir: Path, given: dict[str, Any]) -> SampleConfig:
    """The sampling options of a run with those of the command line laid over them.

    Raises ConfigError naming the options that are out of range.
    """
    stored = validate(read_layers([str(run_dir / "config.yaml")], []), to_train=False).sample
    return lay_sample_options(stored, given, "--")


def lay_sample_options(
    stored: SampleConfig, given: dict[str, Any], prefix: str = ""
) -> SampleConfig:
    """Sampling options with those that are given laid over them; errors name them `prefix`NAME."""
    laid = {name: value for name, value in given.items() if value is not None}
    try:
        return SampleConfig.model_validate({**stored.model_dump(), **laid})
    except ValidationError as error:
        schema, document = SampleConfig.model_json_schema(), Document(laid)
        names = dict.fromkeys(str(detail["loc"][0]) for detail in error.errors())
        dash = "-" if prefix else "_"
        options = {name: prefix + name.replace("_", dash) for name in names}
        words = {name: explain((name,), "", document, schema) for name in names}
        raise ConfigError(*(f"{options[name]}: {words[name]}" for name in names)) from None


def validate(document: Document, *, to_train: bool = True) -> RunConfig:
    problems: dict[Path_, str] = {}
    run = None
    try:
        run = RunConfig.model_validate(document.values)
    except ValidationError as error:
        schema = run_schema()
        for detail in error.errors(include_url=False):
            path = trim_location(detail["loc"], document.values)
            problems.setdefault(path, explain(path, detail["type"], document, schema))
        # What is left may contradict itself too, and the user wants to hear all of it.
        with suppress(ValidationError):
            run = RunConfig.model_validate(drop_values(document.values, problems))
    inner = {path[:end] for path in problems for end in range(len(path))}
    problems = {path: why for path, why in problems.items() if path not in inner}
    known = problems.keys() | document.refused
    problems = {path: problems[path] for path in problems.keys() - document.refused}
    needs = training_needs(run) if run and to_train else ()
    for key, message in chain(needs, contradictions(run) if run else ()):
        if not any(concerns(key, message, path) for path in known):
            problems.setdefault(tuple(key.split(".")), message)
    if run is None or problems or document.problems:
        raise ConfigError(*document.problems, *locate_problems(problems, document))
    return run


def concerns(key: str, message: str, path: Path_) -> bool:
    """Whether a contradiction rests on the value at `path`, which has a problem of its own."""
    name = ".".join(map(str, path))
    return f"{key}.".startswith(f"{name}.") or ("." in name and f" {name} " in f" {message} ")


def trim_location(loc: tuple[int | str, ...], values: Any) -> Path_:
    """The part of a validator's location that names keys, without its marks for union branches."""
    path: Path_ = ()
    for part in loc:
        inside = isinstance(values, dict) and part in values
        if not inside:
            inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside:
            values, path = values[part], (*path, part)
    return path


def drop_values(values: dict[str, Any], problems: dict[Path_, str]) -> dict[str, Any]:
    """A copy without the values that have a problem; a bad list goes whole."""

    bad = {path[:-1] if isinstance(path[-1], int) else path for path in problems}

    def kept(part: Any, at: Path_) -> Any:
        if not isinstance(part, dict):
            return part
        return {k: kept(v, (*at, k)) for k, v in part.items() if (*at, k) not in bad}

    result: dict[str, Any] = kept(values, ())
    return result


def locate_problems(problems: dict[Path_, str], document: Document) -> list[str]:
    """The lines to print, in the order of the files."""

    def place(path: Path_) -> str:
        unknown = problems[path].startswith("unknown key")
        places = document.key_places if unknown else document.places
        while path and path not in places:
            path = path[:-1]
        return places.get(path, "config")

    def order(path: Path_) -> tuple[str, ...]:
        return tuple(part.zfill(6) if part.isdigit() else part for part in place(path).split(":"))

    ordered = sorted(problems, key=order)
    return [problem_line(place(path), path, problems[path]) for path in ordered]


def dump(run: RunConfig) -> str:
    """YAML that loads again to the same values."""
    plain = run.model_dump(mode="json")
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


class Dumper(yaml.SafeDumper):
    """Quotes every text that is not a plain word: YAML 1.1 and 1.2 disagree about the others."""


def represent_text(dumper: Dumper, text: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", text) and text.lower() not in (
        *strict_yaml.CONSTANTS,
        *("yes", "no", "on", "off", "y", "n"),
    )
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


Dumper.add_representer(str, represent_text)


def origins(document: Document, run: RunConfig) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, where it was set) for every leaf of the run."""

    def walk(part: Any, path: Path_) -> Iterator[tuple[str, Any, str]]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(value, (*path, key))
            return
        given = document.value(path) is not None
        place = document.places.get(path, "default") if given else "default"
        yield ".".join(map(str, path)), part, place

    return walk(run.model_dump(mode="json"), ())
