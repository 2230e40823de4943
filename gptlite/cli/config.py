"""`gptlite config`: look at configs without running them."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gptlite.cli.help import add_command, make_app
from gptlite.cli.options import ConfigFiles, Json, Overrides
from gptlite.cli.printing import print_json
from gptlite.terminal import fold, user_errors
from gptlite.words import escape_controls

config_app = make_app("config", "Look at configs without running them.")
command = partial(add_command, config_app)


@command("list", "config list")
def list_configs(json_: Json = False) -> None:
    """List the shipped configs and studies, each with what it is for."""
    with user_errors():
        from gptlite.config.reader import opening_comment, shipped_configs

        folder = shipped_configs()
        configs, studies = (sorted(folder.glob(f"{at}*.yaml")) for at in ("", "studies/"))
        kinds = {**dict.fromkeys(configs, "config"), **dict.fromkeys(studies, "study")}
        if json_:
            keys = ("name", "kind", "description", "path")
            values = [(p.stem, kind, opening_comment(p), str(p)) for p, kind in kinds.items()]
            print_json([dict(zip(keys, row, strict=True)) for row in values])
            return
        width = max(len(path.stem) for path in kinds)
        heads = {
            "config": "configs, as in: gptlite train --config quickstart",
            "study": f"studies, as in: gptlite study {folder / 'studies' / 'quick.yaml'}",
        }
        for kind, head in heads.items():
            print(("\n" if kind == "study" else "") + head)
            for path in (path for path in kinds if kinds[path] == kind):
                line = f"  {path.stem:{width}}  {opening_comment(path)}"
                print(fold(escape_controls(line), indent=width + 4))


@command("show")
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


@command("check")
def check(config: ConfigFiles, overrides: Overrides = None) -> None:
    """Validate a config; every problem is printed with its place."""
    with user_errors():
        from gptlite.runs.origin import load_run

        load_run(config, overrides or [])
        print("ok")


@command("schema")
def schema() -> None:
    """Print the JSON schema of configs, for editors."""
    with user_errors():
        from gptlite.config.run import RunConfig

        print_json(RunConfig.model_json_schema())


@command("import", "config import")
def import_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="nanoGPT's config/*.py, or a .py or .json with the book's GPT_CONFIG_124M.",
        ),
    ],
) -> None:
    """Print another project's config as YAML; its file is read, never run."""
    with user_errors():
        from gptlite.interchange.foreign_config import translate

        print(translate(file), end="")
