"""`gptlite look`: one text through a model, and what dropout lets fall of it."""

from pathlib import Path
from typing import Annotated

import typer

from gptlite.cli.options import CheckpointOption, RunOption, Verbose
from gptlite.cli.printing import print_json, tell_notes
from gptlite.terminal import user_errors
from gptlite.words import escape_controls


def look(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A few words.")],
    run: RunOption = None,
    checkpoint: CheckpointOption = "best",
    layer: Annotated[int, typer.Option(help="Counted from 0.")] = 0,
    head: Annotated[int, typer.Option(help="Counted from 0.")] = 0,
    step: Annotated[int, typer.Option(min=0, help="The update whose masks are shown.")] = 0,
    rate: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Try this rate instead of the run's own."),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(help="Show this site from near; with --rate, drop nowhere else."),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="What falls at --site: element (each value) or locked (one mask)."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Also write what is seen as a self-contained HTML page.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what dropout lets fall of a text: masks on the model's own numbers, as in training."""
    with user_errors(verbose):
        from gptlite.runs.directory import existing_run

        directory = existing_run(run)
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
