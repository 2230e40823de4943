"""The options that several commands share: their names, types and help."""

from typing import Annotated

import typer

ConfigFiles = Annotated[
    list[str],
    typer.Option("--config", "-c", help="YAML file or shipped config; repeat: later ones win."),
]
MoreConfigFiles = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="YAML file or shipped config; repeat: later ones win."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="One value, as in --set optim.lr=3e-4; wins over files."),
]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Run directory; default: the latest under runs/.")
]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="best, last or step-N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks.")]
