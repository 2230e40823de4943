"""`gptlite export` and `gptlite import`: models to and from other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gptlite.cli.options import CheckpointOption, RunOption, Verbose
from gptlite.cli.printing import tell_notes
from gptlite.errors import ConfigError
from gptlite.terminal import tell, user_errors
from gptlite.words import escape_controls

NumberType = Literal["f32", "f16", "bf16", "q8_0"]


def export(
    out: Annotated[Path, typer.Option(help="The new directory.")],
    to: Annotated[
        Literal["hf", "gguf"],
        typer.Option(help="hf: Hugging Face. gguf: llama.cpp, Ollama, LM Studio."),
    ] = "hf",
    type_: Annotated[
        NumberType | None,
        typer.Option("--type", help="Of the weights in a GGUF file; default: f32."),
    ] = None,
    run: RunOption = None,
    checkpoint: CheckpointOption = "best",
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Publish the directory on Hugging Face's Hub, too."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the model card, write and publish nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as a directory that other tools load without code of ours."""
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
