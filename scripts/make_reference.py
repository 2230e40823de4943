"""Write docs/config.md and docs/cli.md from the code; `--check` only says if they are current."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from gptlite.cli.help import group_parameters
from gptlite.cli.main import app
from gptlite.config.dropout import PRESETS, SiteConfig
from gptlite.config.wording import all_keys, describe, resolve, run_schema, schema_at

DOCS = Path(__file__).resolve().parents[1] / "docs"


def config_reference() -> Iterator[str]:
    schema = run_schema()
    yield "# Config reference\n"
    yield "Every key of a run, from the code. `gptlite config show --config F` prints what a config"
    yield "comes to and where each value was set; `gptlite config schema` is the JSON schema."
    nodes = {key: schema_at(schema, tuple(key.split("."))) for key in all_keys()}
    sections = ["", *(key for key, node in nodes.items() if "properties" in resolve(node, schema))]
    for section in sections:
        yield f"\n## {section or 'Top level'}\n"
        yield "| key | takes | default | meaning |\n|---|---|---|---|"
        for key, node in nodes.items():
            if key.rpartition(".")[0] == section and key not in sections:
                yield row(key, node, schema)
        if section == "dropout.sites":
            yield from site_reference(schema)
    yield "\n## Presets of dropout\n\n| preset | rate | granularity | sites |\n|---|---|---|---|"
    for name, preset in PRESETS.items():
        sites = ", ".join(preset.sites) or "none"
        yield f"| `{name}` | {preset.rate} | {preset.granularity} | {sites} |"


def site_reference(schema: dict[str, Any]) -> Iterator[str]:
    """What a site takes beside a rate alone."""
    yield "\n### A site in detail\n"
    yield "A site takes a rate, or a mapping of the keys below, as in"
    yield "`attention_context: {rate: 0.2, granularity: locked}`. Where a key is left out, rate and"
    yield "granularity are those of the preset, `scale` is inverted and `profile` is constant.\n"
    yield "| key | takes | meaning |\n|---|---|---|"
    for key, node in schema["$defs"][SiteConfig.__name__]["properties"].items():
        yield f"| `{key}` | {describe(node, schema)} | {meaning(node)} |"


def row(key: str, node: dict[str, Any], schema: dict[str, Any]) -> str:
    name, default = key.rpartition(".")[2], node.get("default")
    shown = "none" if default in (None, "") else f"`{default}`".replace("True", "true")
    takes = describe(node, schema)
    return f"| `{name}` | {takes} | {shown.replace('False', 'false')} | {meaning(node)} |"


def meaning(node: dict[str, Any]) -> str:
    return node.get("description", "").replace("\n", " ").replace("|", "\\|")


def cli_reference() -> Iterator[str]:
    yield "# Command reference\n"
    yield "From the code. Exit codes: 0 done, 1 failure, 2 usage or config, 3 no usable checkpoint,"
    yield "4 diverged, 5 storage, 6 run directory in use, 130 or 143 stopped by a signal and saved."
    yield from command_reference("gptlite", get_command(app))


def command_reference(name: str, command: Any) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield f"\n## {name}\n\n{command.help}"
        groups = group_parameters(command, command.context_class(command))
        for group, rows in groups.items():
            yield f"\n| {group} | |\n|---|---|"
            for parameter, meaning in rows:
                cells = [cell.replace("|", "\\|") for cell in (f"`{parameter}`", meaning)]
                yield f"| {' | '.join(cells)} |"
    for word, one in inner.items():
        yield from command_reference(f"{name} {word}", one)


REFERENCES = {"config.md": config_reference, "cli.md": cli_reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit code 1 if one is not current")
    only_check = parser.parse_args().check
    stale = []
    for name, make in REFERENCES.items():
        text = "\n".join(make()) + "\n"
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not only_check:
                path.write_text(text)
    if stale and only_check:
        sys.exit(f"not current: {', '.join(stale)}; run scripts/make_reference.py")


if __name__ == "__main__":
    main()
