"""`gptlite export` and `gptlite import`: models to and from other tools."""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from gptlite.cli.options import CheckpointOption, RunOption, Verbose
from gptlite.cli.printing import tell_notes
from gptlite.errors import ConfigError
from gptlite.terminal import tell, user_errors
from gptlite.words import escape_controls

Format = Literal["hf", "gguf"]
NumberType = Literal["f32", "f16", "bf16", "q8_0"]
WRITTEN = "What is written"


def export(
    out: Annotated[
        Path,
        typer.Option(metavar="DIRECTORY", rich_help_panel=WRITTEN, help="Directory to make."),
    ],
    to: Annotated[
        Format,
        typer.Option(
            metavar="|".join(get_args(Format)),
            rich_help_panel=WRITTEN,
            help="hf: for Hugging Face transformers; gguf: for llama.cpp, Ollama and LM Studio.",
        ),
    ] = "hf",
    type_: Annotated[
        NumberType | None,
        typer.Option(
            "--type",
            metavar="|".join(get_args(NumberType)),
            rich_help_panel=WRITTEN,
            show_default="f32",
            help="Type of the weights in a GGUF file.",
        ),
    ] = None,
    run: RunOption = None,
    checkpoint: CheckpointOption = "best",
    push: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            rich_help_panel=WRITTEN,
            help="Publish the directory on Hugging Face's Hub, too.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=WRITTEN,
            help="Print the model card; write and publish nothing.",
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's model as a directory that other tools load without gptlite."""
    with user_errors(verbose):
        from gptlite.runs.directory import existing_run

        if type_ is not None and to != "gguf":
            raise ConfigError(f"--type {type_}: only with --to gguf")
        directory = existing_run(run)
        from gptlite.runs import export as exports
        from gptlite.runs.trained import load_trained

        exports.require_free(out)
        if push is not None:
            exports.require_hub_name(push)
        trained = load_trained(directory, checkpoint)
        tell_notes(trained)
        if to == "hf":
            made = exports.prepare_hf(trained)
        else:
            made = exports.prepare_gguf(trained, type_ or "f32", out.name)
        if made.note:
            tell(made.note)
        if dry_run:
            print(escape_controls(made.card, keep="\n"))
            return
        exports.save(made, out)
        print(escape_controls(str(out)))
        if push is not None:
            print(exports.push(out, push))


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Hugging Face directory, gpt2 or another name on its Hub, or nanoGPT's ckpt.pt.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            show_default="runs/ and the source's name",
            help="Run directory to make.",
        ),
    ] = None,
    meta: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="nanoGPT's meta.pkl, for a model of characters."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a run from a model trained elsewhere: of the GPT-2 and Llama families, or nanoGPT's."""
    with user_errors(verbose):
        from gptlite.runs.importing import import_model

        print(escape_controls(str(import_model(source, out, meta))))
