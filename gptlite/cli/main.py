"""The commands: arguments in, one call out. Imports stand inside, so `--help` needs no torch."""

import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gptlite.cli.config import config_app
from gptlite.cli.evaluate import evaluate
from gptlite.cli.help import add_command, make_app
from gptlite.cli.interchange import export, import_
from gptlite.cli.look import look
from gptlite.cli.options import (
    PLACE,
    TEXT,
    ConfigFiles,
    Json,
    MoreConfigFiles,
    Overrides,
    Verbose,
    print_version,
)
from gptlite.cli.printing import print_json
from gptlite.cli.serve import serve
from gptlite.cli.study import study
from gptlite.cli.trained import generate
from gptlite.distributed.torchrun import join_ranks, refuse_ranks
from gptlite.errors import UserError
from gptlite.machine import let_waiting_threads_sleep
from gptlite.terminal import fold, leave_when_terminated, tell, tell_lines, user_errors
from gptlite.words import count, escape_controls

app = make_app("gptlite", "Train small GPTs from YAML, with dropout as a named, measured thing.")
command = partial(add_command, app)
app.add_typer(config_app, name="config")


@app.callback()
def main_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("train", "eval"):
        with user_errors():
            refuse_ranks(f"gptlite {context.invoked_subcommand}")


@command("train")
def train(
    config: MoreConfigFiles = None,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=TEXT,
            help="File, folder, glob or address of a text. Without --config a config is made for "
            "it; with one it takes the place of data.source. Repeat for several.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=10_000,
            metavar="MINUTES",
            rich_help_panel=TEXT,
            show_default="5",
            help="Time for the whole command where --data has its config made.",
        ),
    ] = None,
    out_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORY",
            rich_help_panel=PLACE,
            show_default="runs/ and the name of the config, with a number if it is taken",
            help="Run directory to make.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|RUN",
            rich_help_panel=PLACE,
            help="Go on with a run: with auto the one of this config or --out-dir, if there is "
            "one, else the run directory or checkpoint named.",
        ),
    ] = None,
    strict_resume: Annotated[
        bool,
        typer.Option(
            "--strict-resume",
            rich_help_panel=PLACE,
            help="Refuse to go on where torch, device or number of threads have changed.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show the reasons of every choice, and tracebacks."),
    ] = False,
) -> None:
    """Train a model: tokenize if needed, train, evaluate, sample, save."""
    began = time.perf_counter()  # what came before took less than a tenth of a second
    with user_errors(verbose), join_ranks() as world:
        from gptlite.runs.launch import add_options, agree_on_launch, make_launch
        from gptlite.runs.origin import load_run

        configs, values, texts = config or [], overrides or [], data or []
        read = partial(load_run, configs, add_options(values, texts, out_dir))
        where = {"out_dir": out_dir, "resume": resume}
        decide = partial(make_launch, configs, values, texts, minutes=minutes, began=began, **where)
        launch = agree_on_launch(decide, read if configs else None, world)
        from gptlite.core import loops

        loops.building()  # while torch loads; an error above shows before either
        from gptlite.runs.start import train

        if launch.recipe is not None and world.first:
            from gptlite.runs.recipe import write_recipe

            path = write_recipe(launch.recipe, launch.directory)
            tell(f"config: made for this text, every choice with its reason in {path}")
            if verbose:
                tell_lines(launch.recipe)
        from gptlite.report.page import add_report
        from gptlite.runs.viewer import Viewer

        viewer = Viewer(
            verbose=verbose,
            foresees=True,
            seconds=launch.seconds,
            promise=launch.promise,
            add_report=add_report,
        )
        train(
            launch.run,
            launch.directory,
            resume=launch.resumes,
            strict=strict_resume,
            world=world,
            viewer=viewer,
        )


command("generate")(generate)
command("eval")(evaluate)


@command("prepare")
def prepare(
    config: ConfigFiles,
    overrides: Overrides = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Only tokenize: make the token files that training would make."""
    with user_errors(verbose):
        from gptlite.runs.origin import given_tokenizer, load_run

        run = load_run(config, overrides or [])
        from gptlite.data.prepare import prepare

        files = prepare(run, given_tokenizer(run))
        for split in files.meta["splits"]:
            files.rows(split, run.model.context_length)  # says so if there is too little text
        if json_:
            print_json({"folder": str(files.folder), **files.meta})
            return
        for split, about in files.meta["splits"].items():
            print(
                f"{split}: {about['tokens']:,} tokens, {count(about['documents'], 'document')}, "
                f"{about['bytes']:,} bytes"
            )
        folder = escape_controls(str(files.folder))
        print(f"{files.meta['bytes_per_token']:.3f} bytes per token; {folder}")


@command("plan")
def plan(
    config: ConfigFiles,
    overrides: Overrides = None,
    world_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=1 << 16,
            metavar="PROCESSES",
            help="Plan for so many processes: memory and batch are those of each.",
        ),
    ] = 1,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Also send one batch through the network and compare what drops with the plan.",
        ),
    ] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a run would do, without training: sizes, choices, dropout sites, time."""
    with user_errors(verbose):
        from gptlite.runs.launch import look_at_text
        from gptlite.runs.origin import given_tokenizer, load_run

        run = load_run(config, overrides or [])
        look_at_text(run)
        from gptlite.planning import audit as auditing
        from gptlite.planning.plan import plan_run, plan_table

        planned = plan_run(run, world_size, given_tokenizer(run))
        found = auditing.audit(planned.run, planned.model, planned.rows) if audit else None
        if json_:
            audited = {} if found is None else {"audit": found}
            print_json({**planned.plan, **audited, "config": planned.run.model_dump(mode="json")})
        else:
            lines = plan_table(planned.run, planned.plan)
            lines += [] if found is None else ["", *auditing.audit_lines(found)]
            print("\n".join(fold(escape_controls(line)) for line in lines))
        if found is not None and found["problems"]:
            raise UserError(*found["problems"])


command("study")(study)


@command("report")
def report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            show_default="the latest under runs/",
            help="Run directories, or the folder of one study.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="report.html in the run or study; here, if there are several",
            help="Page to write.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make one self-contained HTML page of a run, several runs, or a study."""
    with user_errors(verbose):
        from gptlite.report import page
        from gptlite.runs.directory import latest_run
        from gptlite.storage import require_place_for_file

        if out is not None:
            require_place_for_file("--out", out)
        print(escape_controls(str(page.write_page(sources or [latest_run()], out))))


command("look")(look)
command("serve")(serve)
command("export")(export)
command("import")(import_)


def main() -> None:
    if platform.system() == "Windows":
        print("gptlite: Windows is not supported; use WSL: wsl --install", file=sys.stderr)
        sys.exit(1)
    leave_when_terminated()
    let_waiting_threads_sleep()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, as in `gptlite ... >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole process
        else:  # a terminal may lack a character of a path, a text or our own words
            stream.reconfigure(errors="backslashreplace")
    app()
