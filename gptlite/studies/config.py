"""A study: one YAML file → every run of it, checked before the first is trained.

    base      shipped config or file, or a list of them; `set` lays values over it
    axes      dotted keys of the config, each with its values; the grid is their product
    points    named sets of values, one more axis
    seeds     each point is run with each; runs with the same seed are pairs

A point's values replace those of the base, as `--set` would. Runs live in runs/ of the study's
folder, named by point, seed and a digest of the config: a changed study keeps those it still names.
"""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from gptlite.config import strict_yaml
from gptlite.config.reader import merge, read_layers, trim_location
from gptlite.config.run import RunConfig, Texts
from gptlite.config.section import Count, Section
from gptlite.config.strict_yaml import Document, Path_, problem_line
from gptlite.config.wording import explain, hint_at_known
from gptlite.errors import ConfigError
from gptlite.runs.origin import complete_run
from gptlite.words import did_you_mean

POINT = "point"
"""The axis of the named points."""
RESERVED = {
    "seed": "list them under seeds, or give --seeds",
    "out_dir": "the study names the directories",
}
ADDED_LATER = {
    "data": ("train_from", "test_share"),
    "model": ("head_dim", "rope_theta", "norm_eps", "intermediate_size"),
    "optim": ("weight_decay_schedule",),
    "train": ("average", "average_half_life", "max_minutes"),
    "distill": ("teachers", "weight", "temperature"),
}
"""Keys that runs did not have when they were first named: left out of a name at their defaults, so
that a study begun before finds its runs. Every new key of a config has to stand here."""
TRAINED_METRICS = (
    *("best_val_loss", "best_step", "best_epoch", "val_loss", "train_loss"),
    *("generalisation_gap", "epochs", "seconds"),
)
"""What every run has, whichever suites are evaluated."""
Values = dict[str, Any]
Suites = Annotated[
    tuple[
        Literal["loss", "calibration", "knockout", "importance", "memorisation", "mc-dropout"], ...
    ],
    Field(strict=False),
]
Checkpoints = Annotated[
    tuple[Literal["best", "last"], ...], Field(min_length=1, max_length=2, strict=False)
]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1, strict=False)
]


class Range(Section):
    """Values of an axis that a search chooses from."""

    low: float
    high: float
    log: bool = False
    """Search the logarithm."""


Axis = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, dict | Range) else "list"),
]


class StudyConfig(Section):
    base: str | Texts
    """Shipped config or file, or a list of them; later ones win."""
    set: Values = {}
    """Dotted keys of the config with the value they have in every run."""
    axes: dict[str, Axis] = {}
    """Dotted keys of the config with the values to try; `search: tpe` also takes
    {low, high, log}."""
    points: dict[str, Values] = {}
    """Named sets of values, for what is no product of axes."""
    seeds: Seeds = (1, 2, 3)
    """Seeds of each point; runs with the same seed have the same weights, data order and masks."""
    evaluate: Suites = ("loss",)
    """Suites of `gptlite eval` for every run."""
    split: Literal["val", "test"] = "val"
    """What they are measured on: val, or test where data.test_share keeps some text for it."""
    fast: bool = False
    """Evaluate as `gptlite eval --fast` does."""
    checkpoints: Checkpoints = ("best",)
    """Which checkpoints are evaluated; metrics of a second one begin with its name and a dot."""
    ensembles: bool = False
    """Also measure the best checkpoints of each point as one model: metrics `ensemble.*`."""
    baseline: str | Values | None = None
    """What the others are compared with: the name of a point, or axes with their values (all other
    axes stay as they are); null: the first value of the last axis."""
    table: Texts = ("best_val_loss", "generalisation_gap")
    """Metrics that the table on the terminal shows."""
    search: Literal["grid", "tpe"] = "grid"
    """grid: every point; tpe: points chosen by how others did (Bergstra et al. 2011), hopeless ones
    stopped early."""
    trials: Count = 20
    """Points that `search: tpe` tries."""


@dataclass(frozen=True)
class Point:
    coordinates: Values
    """Its value on every axis."""
    values: Values
    """Dotted keys of the config."""
    label: str


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    point: Point
    seed: int
    run: RunConfig

    @cached_property
    def name(self) -> str:
        """Of its directory; another config is another name."""
        values = self.run.model_dump(mode="json", exclude={"out_dir"})
        defaults = RunConfig().model_dump(mode="json")
        for section, keys in ADDED_LATER.items():
            for key in keys:
                if values[section][key] == defaults[section][key]:
                    del values[section][key]
            if not values[section]:
                del values[section]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9._=+-]+", "_", self.point.label)[:80]
        return f"{slug}-seed-{self.seed}-{digest}"


@dataclass(frozen=True)
class Study:
    name: str
    config: StudyConfig
    document: Document
    base: Document

    @cached_property
    def axes(self) -> dict[str, Any]:
        named = {POINT: list(self.config.points)} if self.config.points else {}
        return {**self.config.axes, **named}

    @property
    def measurement(self) -> str:
        """How finished runs are measured; runs that were measured otherwise are measured again."""
        config = self.config
        effort = " fast" if config.fast else ""
        where = "" if config.split == "val" else f" on {config.split}"
        return f"{','.join(config.evaluate)}{effort} of {','.join(config.checkpoints)}{where}"

    @property
    def baseline(self) -> Values:
        """The coordinates that a point's baseline has instead of its own."""
        chosen = self.config.baseline
        if isinstance(chosen, str):
            return {POINT: chosen}
        if chosen is not None:
            return chosen
        lists = [
            (axis, values[0]) for axis, values in self.axes.items() if isinstance(values, list)
        ]
        return dict(lists[-1:])

    def point(self, coordinates: Values) -> Point:
        values: Values = {}
        for axis, value in coordinates.items():
            values |= self.config.points[value] if axis == POINT else {axis: value}
        names = short_names(coordinates)
        parts = [
            str(value) if axis == POINT else f"{names[axis]}={value_label(value)}"
            for axis, value in coordinates.items()
        ]
        return Point(coordinates, values, ", ".join(parts) or "base")

    def job(self, point: Point, seed: int) -> Job:
        """Raises ConfigError, each problem at its place in the study."""
        document = copy.deepcopy(self.base)
        for layer in self.layers(point):
            merge(document, layer)
        merge(document, Document({"seed": seed}))
        return Job(point, seed, complete_run(document))

    def layers(self, point: Point) -> Iterator[Document]:
        """The study's own values, with the places where they stand."""
        yield self.layer({key: ("set", key) for key in self.config.set}, self.config.set)
        for axis, value in point.coordinates.items():
            if axis == POINT:
                values = self.config.points[value]
                yield self.layer({key: ("points", value, key) for key in values}, values)
            else:
                listed = self.axes[axis]
                at = (listed.index(value),) if isinstance(listed, list) else ()
                yield self.layer({axis: ("axes", axis, *at)}, {axis: value})

    def layer(self, origins: dict[str, Path_], values: Values) -> Document:
        nested = Document({})
        for key, value in values.items():
            path, origin = tuple(key.split(".")), origins[key]
            inner = nested.values
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value
            for known, place in self.document.places.items():
                if known[: len(origin)] == origin:
                    nested.places[(*path, *known[len(origin) :])] = place
            named = origin if origin[0] != "axes" else origin[:2]
            nested.key_places[path] = self.document.key_places[named]
        return nested

    @property
    def points(self) -> list[Point]:
        """Every point of a grid, or the corners of what is searched."""
        axes = {
            axis: [values.low, values.high] if isinstance(values, Range) else values
            for axis, values in self.axes.items()
        }
        return [self.point(coordinates) for coordinates in grid_coordinates(axes)]

    def first_runs(self) -> list[RunConfig]:
        """One of each point."""
        return [self.job(point, self.config.seeds[0]).run for point in self.points]

    @cached_property
    def jobs(self) -> list[Job]:
        """Every run of a grid: all points with the first seed, then with the next, so that a study
        that is cut short is balanced."""
        return [self.job(point, seed) for seed in self.config.seeds for point in self.points]


def grid_coordinates(axes: dict[str, Any]) -> Iterator[Values]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def short_names(axes: Values) -> dict[str, str]:
    """The last part of each key, or all of it where two would be alike."""
    last = [axis.rpartition(".")[2] for axis in axes]
    pairs = zip(axes, last, strict=True)
    return {axis: name if last.count(name) == 1 else axis for axis, name in pairs}


def value_label(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def load_study(path: Path) -> Study:
    """The study in a file, every run of it valid. Raises ConfigError with all problems."""
    document = strict_yaml.read_yaml(path)
    if document.values.keys() <= RunConfig.model_fields.keys():
        told = f"is the config of one run; train it with: gptlite train --config {path}"
        raise ConfigError(f"{path}: {told}")
    return make_study(path.stem, document)


def make_study(name: str, document: Document) -> Study:
    """The study that a document describes. Raises ConfigError as `load_study` does."""
    config = read_study_config(document)
    files = [config.base] if isinstance(config.base, str) else list(config.base)
    study = Study(name, config, document, read_layers(files, []))
    check_runs(study)
    return study


def read_study_config(document: Document) -> StudyConfig:
    """What a study says of itself, its runs not looked at. Raises ConfigError."""
    try:
        config = StudyConfig.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError(*document.problems, *mistakes(error, document)) from None
    problems = [*document.problems, *study_contradictions(config, document)]
    if problems:
        raise ConfigError(*problems)
    return config


def mistakes(error: ValidationError, document: Document) -> Iterator[str]:
    schema, seen = StudyConfig.model_json_schema(), set()
    details = [(trim_location(d["loc"], document.values), d) for d in error.errors()]
    for path, detail in details:
        inside = (other for other, _ in details if len(other) > len(path) > 0)
        if path in seen or any(other[: len(path)] == path for other in inside):
            continue  # a list with a value that will not do is called too short as well
        seen.add(path)
        if detail["type"] == "extra_forbidden":
            place = document.key_places[path]
            why = f"unknown key{hint_at_known(path, schema)}"
        else:
            place = document.places.get(path, document.places.get((), "study"))
            why = explain(path, detail["type"], document, schema)
        missing = detail["type"] == "missing"
        named = (*path, detail["loc"][-1]) if missing else path
        yield problem_line(place, named, "required" if missing else why)


def study_contradictions(config: StudyConfig, document: Document) -> Iterator[str]:
    def at(*path: str | int) -> str:
        return document.places.get(path, document.key_places.get(path, "study"))

    yield from overruled_keys(config, at)
    for axis, values in config.axes.items():
        if why := axis_problem(values, config.search):
            yield problem_line(at("axes", axis), ("axes", axis), why)
    if config.search == "tpe" and not config.axes:
        yield f"{at('search')}: search: tpe needs axes"
    if config.search == "grid" and "trials" in document.values:
        yield f"{at('trials')}: trials: a grid runs every point; set search: tpe, or leave it out"
    yield from unknown_metrics(config, at)
    if len(set(config.seeds)) < len(config.seeds):
        yield f"{at('seeds')}: seeds: lists a seed twice"
    chosen = config.baseline
    if isinstance(chosen, str) and chosen not in config.points:
        points, hint = ", ".join(config.points) or "none", did_you_mean(chosen, config.points)
        yield f"{at('baseline')}: baseline: no point {chosen!r}; there are: {points}{hint}"
    for axis, value in chosen.items() if isinstance(chosen, dict) else ():
        known = list(config.points) if axis == POINT else config.axes.get(axis, [])
        if not isinstance(known, list) or value not in known:
            yield f"{at('baseline', axis)}: baseline.{axis}: {value!r} is not on that axis"


def axis_problem(values: list[Any] | Range, search: str) -> str | None:
    """Why an axis cannot be meant, if so."""
    if isinstance(values, Range):
        if search == "grid":
            return "a range needs search: tpe; or list values"
        if not values.low < values.high or (values.log and values.low <= 0):
            return "low must be below high (above 0 for log)"
        return None
    if not values:
        return "is empty; list the values to try"
    twice = any(values.count(value) > 1 for value in values)
    return "lists a value twice" if twice else None


def unknown_metrics(config: StudyConfig, at: Any) -> Iterator[str]:
    """Metrics of the table that no run will have. What a suite measures is known to it alone."""
    suites = [*config.evaluate, *config.checkpoints[1:]] + ["ensemble"] * config.ensembles
    for number, name in enumerate(config.table):
        suite, dot, _ = name.partition(".")
        if name not in TRAINED_METRICS and not (dot and suite in suites):
            meant = did_you_mean(name, TRAINED_METRICS)
            known = f"{', '.join(TRAINED_METRICS)}, and of the suites evaluated SUITE.NAME"
            told = f"{at('table', number)}: table.{number}: no metric {name!r}"
            yield told + (meant or f"; there are: {known}")


def overruled_keys(config: StudyConfig, at: Any) -> Iterator[str]:
    """Values that something else would overrule."""
    sections: dict[tuple[str, ...], Values] = {("set",): config.set, ("axes",): config.axes}
    sections |= {("points", name): values for name, values in config.points.items()}
    for section, values in sections.items():
        for key in values:
            problems = [RESERVED[key]] if key in RESERVED else []
            if section[0] != "axes" and key in config.axes:
                problems.append("is an axis too; one of them must go")
            above = [other for other in values if key.startswith(f"{other}.")]
            problems += [f"{other} is given too; one of them must go" for other in above]
            for why in problems:
                yield problem_line(at(*section, key), (*section, key), why)


def check_runs(study: Study) -> None:
    """Every run a grid has, or the corners of what is searched, once per problem."""
    points = study.points
    problems: dict[str, None] = {}
    for point in points:
        try:
            job = study.job(point, study.config.seeds[0])
            if study.config.split == "test" and not job.run.data.test_share:
                problems["split: test, but data.test_share keeps no text for it"] = None
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)
    if len({point.label for point in points}) < len(points):
        raise ConfigError(f"{study.name}: two points have one label; rename points or axes")
