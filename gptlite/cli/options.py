"""What several commands share: options with help and completions, and the examples of each."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gptlite import __version__

EXAMPLES = {
    "train": (
        "gptlite train --config quickstart",
        "gptlite train --data my.txt --minutes 5",
        "gptlite train --config quickstart --set optim.lr=3e-3 --out-dir runs/faster",
        "gptlite train --config quickstart --resume auto",
    ),
    "generate": (
        "gptlite generate --prompt 'It was' --num-samples 3 --temperature 0.7",
        "gptlite generate --run runs/quickstart --interactive",
        "gptlite generate --ensemble runs/quickstart runs/faster --prompt 'It was'",
    ),
    "eval": (
        "gptlite eval",
        "gptlite eval --run runs/quickstart --suite knockout,importance --fast",
        "gptlite eval --split my.txt --json",
        "gptlite eval --ensemble runs/quickstart runs/faster",
    ),
    "prepare": ("gptlite prepare --config quickstart --set data.source=my.txt",),
    "plan": ("gptlite plan --config quickstart --audit",),
    "study": (
        "gptlite study --config quickstart --sweep dropout.rate=0,0.1,0.2 --seeds 3 --dry-run",
        "gptlite study rates.yaml --workers 2",
    ),
    "report": ("gptlite report", "gptlite report runs/quickstart runs/faster --out both.html"),
    "look": (
        "gptlite look 'It was the'",
        "gptlite look 'It was the' --run runs/quickstart --layer 1 --rate 0.5 --page look.html",
    ),
    "serve": ("gptlite serve", "gptlite serve runs/quickstart runs/faster --port 8001"),
    "export": (
        "gptlite export --run runs/names --out names-hf",
        "gptlite export --run runs/names --to gguf --type q8_0 --out names-gguf",
    ),
    "config list": ("gptlite config list",),
    "import": ("gptlite import names-hf --out runs/back", "gptlite import gpt2"),
}
"""By command; each is run by a test, in this order."""


def complete_configs(incomplete: str) -> list[str]:
    """Shipped configs and YAML files that begin so."""
    from gptlite.config.reader import shipped_configs

    names = (
        [path.stem for path in shipped_configs().glob("*.yaml")] if "/" not in incomplete else []
    )
    here = Path(os.path.dirname(incomplete) or ".")
    files = [str(path) for path in here.glob("*.yaml")] if here.is_dir() else []
    return sorted(name for name in names + files if name.startswith(incomplete))


def complete_runs(incomplete: str) -> list[str]:
    """Run directories under runs/ that begin so."""
    found = (str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    return sorted(name for name in found if name.startswith(incomplete))


def complete_keys(incomplete: str) -> list[str]:
    """Keys of a config, for --set."""
    from gptlite.config.wording import all_keys

    return [f"{key}=" for key in all_keys() if key.startswith(incomplete)]


MODEL, CONFIG, TEXT, SAMPLING, PLACE = "Model", "Config", "Text", "Sampling", "Run directory"
"""Groups of options in `--help`."""

_CONFIG = typer.Option(
    "--config",
    "-c",
    metavar="CONFIG",
    rich_help_panel=CONFIG,
    help="YAML file, or name of a shipped config (`gptlite config list`). Give several and the "
    "values of later ones win.",
    autocompletion=complete_configs,
)
ConfigFiles = Annotated[list[str], _CONFIG]
MoreConfigFiles = Annotated[list[str] | None, _CONFIG]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        rich_help_panel=CONFIG,
        help="Set one key, as in --set optim.lr=3e-4; wins over all files. Repeat for several.",
        autocompletion=complete_keys,
    ),
]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="RUN",
        rich_help_panel=MODEL,
        show_default="the latest under runs/",
        help="Run directory.",
        autocompletion=complete_runs,
    ),
]
RunsToEnsemble = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN",
        help="Run directories of an ensemble; only with --ensemble.",
        autocompletion=complete_runs,
    ),
]
Ensembled = Annotated[
    bool,
    typer.Option(
        "--ensemble",
        rich_help_panel=MODEL,
        help="Use all the runs named as one model: the mean of their logits.",
    ),
]
CheckpointOption = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="best|last|step-N",
        rich_help_panel=MODEL,
        help="Checkpoint to load; best is the one with the lowest validation loss.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the traceback of an error, too.")
]


def split_commas(text: str) -> list[str]:
    """The parts of a comma list."""
    return text.replace(" ", "").split(",")


def print_version(asked: bool) -> None:
    if asked:
        print(f"gptlite {__version__}")
        raise typer.Exit
