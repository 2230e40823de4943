"""`gptlite look`: one text through a model, and what dropout lets fall of it."""

from pathlib import Path
from typing import Annotated

import typer

from gptlite.cli.options import CheckpointOption, Json, RunOption, Verbose
from gptlite.cli.printing import print_json, tell_notes
from gptlite.terminal import user_errors
from gptlite.words import escape_controls

SHOWN, DROPS = "What is shown", "What drops"


def look(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A few words.")],
    run: RunOption = None,
    checkpoint: CheckpointOption = "best",
    layer: Annotated[
        int,
        typer.Option(metavar="LAYER", rich_help_panel=SHOWN, help="Layer to show, counted from 0."),
    ] = 0,
    head: Annotated[
        int,
        typer.Option(metavar="HEAD", rich_help_panel=SHOWN, help="Head to show, counted from 0."),
    ] = 0,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            rich_help_panel=SHOWN,
            help="Dropout site to show closely; with --rate, the only one that drops.",
        ),
    ] = None,
    step: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="UPDATE",
            rich_help_panel=DROPS,
            help="Update of the training run whose masks are drawn.",
        ),
    ] = 0,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99,
            metavar="RATE",
            rich_help_panel=DROPS,
            show_default="the run's",
            help="Share to drop.",
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="element|locked",
            rich_help_panel=DROPS,
            show_default="the run's",
            help="At --site: element drops each value by itself, locked takes one mask for all "
            "positions.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write an HTML page of it, in one file."),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what dropout drops of a text, on the model's own numbers and with training's masks."""
    with user_errors(verbose):
        from gptlite.runs.directory import existing_run
        from gptlite.storage import require_place_for_file

        directory = existing_run(run)
        if page is not None:
            require_place_for_file("--page", page)
        from gptlite.measure.look import look as look_at
        from gptlite.report.look import lines_of
        from gptlite.report.page import write_look
        from gptlite.runs.results import read_json
        from gptlite.runs.trained import load_trained

        trained = load_trained(directory, checkpoint)
        tell_notes(trained)
        planned = read_json(directory / "plan.json", []).get("steps")
        max_steps = trained.run.train.max_steps or planned or 0
        found = look_at(
            trained,
            text,
            layer=layer,
            head=head,
            step=step,
            rate=rate,
            max_steps=max_steps,
            site=site,
            granularity=granularity,
        )
        if page is not None:
            write_look(found, page)
        if json_:
            print_json(found)
        else:
            print("\n".join(escape_controls(line) for line in lines_of(found)))
