"""What `gptlite train` is asked for: which run, in which directory, new or going on. No torch.

`start` then trains it. They are two so that what is wrong with a config shows before torch loads.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gptlite.config.promise import Promise, read_promise
from gptlite.config.run import RunConfig
from gptlite.core.world import World
from gptlite.data import readers, sources
from gptlite.distributed.agreement import agree
from gptlite.errors import ConfigError, DataError
from gptlite.runs.directory import choose_directory, resolve_resume
from gptlite.runs.origin import load_run

LOOKED_AT = 1 << 22
"""Characters at the beginning of a text that are read before anything is loaded for training."""


FREE = ("seed=", "out_dir=", "log.", "data.cache_dir=")
"""Values of --set that make no run slower."""
DEFAULT_MINUTES = 5.0
"""Of a command that makes its config for a text."""


class Launch(NamedTuple):
    run: RunConfig
    directory: Path
    resumes: bool
    promise: Promise | None = None
    """How long it may take, by what its config or the command line says."""
    recipe: str | None = None
    """The YAML of a config that was made for a text, with its reasons."""
    seconds: float | None = None
    """That such a config is expected to take."""


def agree_on_launch(
    decide: Callable[[], Launch], own: Callable[[], RunConfig] | None, world: World
) -> Launch:
    """What the first rank decides, for all; `own` reads the config that this one was given.

    Raises ConfigError on all ranks if they were given different ones.
    """
    launch = agree(world, Launch, decide)
    if own is not None and world.size > 1:
        check_own_config(launch.run, own(), world)
    return launch


def check_own_config(first: RunConfig, own: RunConfig, world: World) -> None:
    """Raises ConfigError on all ranks if one of them was given another config."""
    from gptlite.runs.resume import forbidden_changes

    each = world.gather(list(forbidden_changes(first, own)))
    problems = [
        f"--config: rank {rank} was given another than rank 0: {change}"
        for rank, changes in enumerate(each)
        for change in changes
    ]
    if problems:
        raise ConfigError(*problems)


def make_launch(
    configs: list[str],
    overrides: list[str],
    data: list[str],
    *,
    minutes: float | None,
    began: float,
    out_dir: str | None,
    resume: str | None,
) -> Launch:
    """`began` is when the command did, by time.perf_counter: its `minutes` count from there.

    Raises ConfigError, and DataError where a config has to be made for the data.
    """
    named = None if resume in (None, "auto") else resolve_resume(str(resume))
    values = add_options(overrides, data if configs or named else [], out_dir)
    if named is not None and not configs:
        configs, values = [str(named / "config.yaml")], add_machine_defaults(values)
    if named is not None and out_dir is not None and Path(out_dir).resolve() != named.resolve():
        raise ConfigError(f"--out-dir: --resume goes on in {named}; leave --out-dir out")
    if configs:
        if minutes is not None:
            why = "is for --data alone; train.max_minutes ends a run of a config"
            raise ConfigError(f"--minutes: {why}")
        run = load_run(configs, values)
        look_at_text(run)
        if named is not None:
            return Launch(run, named, True)
        directory, resumes = choose_directory(run.out_dir, configs, resume)
        promise = read_promise(configs, describe_changes(configs, overrides, data))
        return Launch(run, directory, resumes, promise)
    if not data:
        raise ConfigError("--config: missing option; give a file, a shipped config, or --data TEXT")
    name = Path(data[0]).name.partition(".")[0] or "text"
    directory, resumes = choose_directory(out_dir, [name], resume)
    if resumes:
        stored = str(directory / "config.yaml")
        return Launch(load_run([stored], add_machine_defaults(values)), directory, True)
    of_data = [value for value in overrides if value.lstrip().startswith("data.")]
    look_at_text(load_run([], add_options(of_data, data, None), to_train=False))
    from gptlite.runs import recipe  # only now: it times models

    minutes = minutes or DEFAULT_MINUTES
    made = recipe.make_recipe(data, minutes, values, began)
    promise = Promise(60 * minutes, "--minutes", describe_changes([], overrides, []))
    return Launch(made.run, directory, False, promise, made.text, made.seconds)


def describe_changes(configs: list[str], overrides: list[str], data: list[str]) -> str:
    """What was asked for besides the first config, in words; what is free of charge is left out."""
    more = [f"--config {config}" for config in configs[1:]]
    more += [f"--set {value}" for value in overrides if not value.startswith(FREE)]
    return ", ".join([*more, *(f"--data {text}" for text in data)])


def look_at_text(run: RunConfig) -> None:
    """Find what is wrong with the files of a run, or how they begin, before torch is loaded.

    Raises DataError and ConfigError, as reading all of them does later.
    """
    if len(run.sources) == 1 and os.path.isfile(os.path.expanduser(run.sources[0]) + "/train.bin"):
        return  # tokenized elsewhere
    known = sources.BUILT_IN
    local = [source for source in run.sources if source not in known and "://" not in source]
    files = [file for source in local for file in sources.locate_one(source, run.data)]
    left = LOOKED_AT
    for file in files:
        sources.check_regular(file)
        with suppress(OSError):  # which is told of when all is read
            for text, _ in readers.read_documents(file, run.data) if left > 0 else ():
                left -= len(text) + 1
                if left <= 0:
                    break
    if local == list(run.sources) and left == LOOKED_AT:
        raise DataError(f"data.source: {', '.join(local)}: has no text (0 bytes)")


def add_options(overrides: list[str], data: list[str], out_dir: str | None) -> list[str]:
    """The values of --set, and of the options that are short for one."""
    values = list(overrides)
    if out_dir is not None:
        values.append(f"out_dir={quote_value(out_dir)}")
    if data:
        values.append(f"data.source={quote_value(data[0] if len(data) == 1 else data)}")
    return values


def add_machine_defaults(values: list[str]) -> list[str]:
    """The values of --set over a run's own config, of which nobody has named these keys now."""
    given = {value.partition("=")[0].strip() for value in values}
    asked_anew = ("device", "dtype", "attention", "train.threads")
    return [*(f"{key}=auto" for key in asked_anew if key not in given), *values]


def quote_value(value: str | list[str]) -> str:
    """A text or a list of them as `--set` reads it; bytes that are no UTF-8 as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
