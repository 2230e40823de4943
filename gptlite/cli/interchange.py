"""`gptlite export` and `gptlite import`: models to and from other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gptlite.cli.options import CheckpointOption, RunOption, Verbose
from gptlite.cli.printing import tell_notes
from gptlite.terminal import tell, user_errors
from gptlite.words import escape_controls


def export(
    out: Annotated[Path, typer.Option(help="The new directory.")],
    to: Annotated[Literal["hf"], typer.Option(help="hf: Hugging Face.")] = "hf",
    run: RunOption = None,
    checkpoint: CheckpointOption = "best",
    verbose: Verbose = False,
) -> None:
    """Write a run as a directory that Hugging Face's tools load without code of ours."""
    with user_errors(verbose):
        from gptlite.runs.directory import existing_run

        directory = existing_run(run)
        from gptlite.runs.export import export_model
        from gptlite.runs.trained import load_trained

        trained = load_trained(directory, checkpoint)
        tell_notes(trained)
        if lost := export_model(trained, out):
            tell(f"config.json has no word for this dropout: {', '.join(lost)}")
        print(escape_controls(str(out)))


def import_(
    source: Annotated[
        str,
        typer.Argument(help="Hugging Face directory, gpt2 or another Hub name, nanoGPT's ckpt.pt."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The run directory; default: runs/ and the name.")
    ] = None,
    meta: Annotated[
        Path | None, typer.Option(help="nanoGPT's meta.pkl, for a model of characters.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a run of a model from elsewhere: GPT-2 and Llama shapes, checkpoints of nanoGPT."""
    with user_errors(verbose):
        from gptlite.runs.importing import import_model

        print(escape_controls(str(import_model(source, out, meta))))
