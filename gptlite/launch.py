"""What `gptlite train` is asked for: which run, in which directory, new or going on. No torch."""

import json
from pathlib import Path
from typing import NamedTuple

from gptlite import run_directory
from gptlite.config import RunConfig
from gptlite.config_reader import load_run
from gptlite.errors import ConfigError


class Launch(NamedTuple):
    run: RunConfig
    directory: Path
    resumes: bool
    recipe: str | None = None
    """The YAML of a config that was made for a text, with its reasons."""


def launched(
    configs: list[str],
    overrides: list[str],
    data: list[str],
    *,
    minutes: float,
    out_dir: str | None,
    resume: str | None,
) -> Launch:
    """Raises ConfigError, and DataError where a config has to be made for the data."""
    values = list(overrides)
    if out_dir is not None:
        values.append(f"out_dir={as_value(out_dir)}")
    named = None if resume in (None, "auto") else run_directory.resumed(str(resume))
    if named is not None and not configs:
        configs = [str(named / "config.yaml")]
    if configs:
        if data:
            values.append(f"data.source={as_value(data[0] if len(data) == 1 else data)}")
        run = load_run(configs, values)
        where = run_directory.where(run.out_dir, configs, resume)
        return Launch(run, *((named, True) if named else where))
    if not data:
        raise ConfigError("--config: missing option; give a file, a shipped config, or --data TEXT")
    name = Path(data[0]).name.partition(".")[0] or "text"
    directory, resumes = run_directory.where(out_dir, [name], resume)
    if resumes:
        return Launch(load_run([str(directory / "config.yaml")], values), directory, True)
    from gptlite import recipe  # only now: it times models

    run, text = recipe.compose(data, minutes, values)
    return Launch(run, directory, False, text)


def as_value(value: str | list[str]) -> str:
    """A text or a list of them as `--set` reads it."""
    return json.dumps(value, ensure_ascii=False)
