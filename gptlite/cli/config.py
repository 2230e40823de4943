"""`gptlite config`: look at configs without running them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gptlite.cli.options import ConfigFiles, Json, Overrides
from gptlite.cli.printing import print_json
from gptlite.terminal import user_errors
from gptlite.words import escape_controls

config_app = typer.Typer(help="Look at configs without running them.", no_args_is_help=True)


@config_app.command(name="show")
def show_config(config: ConfigFiles, overrides: Overrides = None, json_: Json = False) -> None:
    """Print every value of a config and where it was set."""
    with user_errors():
        from gptlite.config.reader import origins, read_layers
        from gptlite.runs.origin import complete_run

        document = read_layers(config, overrides or [])
        rows = list(origins(document, complete_run(document)))
        if json_:
            print_json({key: {"value": value, "origin": place} for key, value, place in rows})
            return
        width = max(len(key) + len(json.dumps(value)) for key, value, _ in rows) + 2
        for key, value, place in rows:
            print(f"{f'{key}: {json.dumps(value)}':{min(width, 60)}}  # {escape_controls(place)}")


@config_app.command()
def check(config: ConfigFiles, overrides: Overrides = None) -> None:
    """Validate a config; every problem is printed with its place."""
    with user_errors():
        from gptlite.runs.origin import load_run

        load_run(config, overrides or [])
        print("ok")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of configs, for editors."""
    with user_errors():
        from gptlite.config.run import RunConfig

        print_json(RunConfig.model_json_schema())


@config_app.command(name="import")
def import_config(
    file: Annotated[Path, typer.Argument(help="nanoGPT's config/*.py, or the book's dictionary.")],
) -> None:
    """Print another project's config as YAML; its file is read, never run."""
    with user_errors():
        from gptlite.interchange.foreign_config import translate

        print(translate(file), end="")
