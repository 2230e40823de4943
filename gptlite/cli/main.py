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
from gptlite.cli.interchange import export, import_
from gptlite.cli.look import look
from gptlite.cli.options import (
    ConfigFiles,
    Json,
    MoreConfigFiles,
    Overrides,
    Verbose,
    examples,
    print_version,
)
from gptlite.cli.printing import print_json
from gptlite.cli.serve import serve
from gptlite.cli.study import study
from gptlite.cli.trained import generate
from gptlite.distributed.torchrun import join_ranks, refuse_ranks
from gptlite.errors import UserError
from gptlite.machine import let_waiting_threads_sleep
from gptlite.terminal import leave_when_terminated, tell, tell_lines, user_errors
from gptlite.words import escape_controls

app = typer.Typer(
    name="gptlite",
    help="Train small GPTs from YAML, with dropout as a named, measured thing.",
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
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


@app.command(epilog=examples("train"))
def train(
    config: MoreConfigFiles = None,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A text: alone, its config is made for it; beside --config, data.source."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=10_000,
            help="Time of the whole command, if --data makes its config; default: 5.",
        ),
    ] = None,
    out_dir: Annotated[str | None, typer.Option(help="The run directory itself.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="`auto`: go on where this run stopped; or a run directory.")
    ] = None,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="Not if torch, threads or device have changed.")
    ] = False,
    verbose: Verbose = False,
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

            tell_lines(launch.recipe)
            write_recipe(launch.recipe, launch.directory)
        run, directory = launch.run, launch.directory
        train(run, directory, resume=launch.resumes, strict=strict_resume, world=world)
        if world.first:
            from gptlite.report.page import add_report
            from gptlite.runs.look import add_look

            add_look(directory)
            add_report(directory, tell)


app.command(epilog=examples("generate"))(generate)
app.command(name="eval", epilog=examples("eval"))(evaluate)


@app.command(epilog=examples("prepare"))
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
                f"{split}: {about['tokens']:,} tokens, {about['documents']:,} documents, "
                f"{about['bytes']:,} bytes"
            )
        folder = escape_controls(str(files.folder))
        print(f"{files.meta['bytes_per_token']:.3f} bytes per token; {folder}")


@app.command(epilog=examples("plan"))
def plan(
    config: ConfigFiles,
    overrides: Overrides = None,
    world_size: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="Memory and batch of each of so many processes.")
    ] = 1,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Run one real batch and compare what drops with the plan."),
    ] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a run would do: sizes, choices, dropout sites, time. Nothing is trained."""
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
            print("\n".join(map(escape_controls, plan_table(planned.run, planned.plan))))
            if found is not None:
                print("\naudit of one batch:\n" + "\n".join(auditing.audit_lines(found)))
        if found is not None and found["problems"]:
            raise UserError(*found["problems"])


app.command(epilog=examples("study"))(study)


@app.command(epilog=examples("report"))
def report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Run directories, or one study; default: the latest run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html of the run or study.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make one self-contained HTML page of a run, several runs, or a study."""
    with user_errors(verbose):
        from gptlite.report import page
        from gptlite.runs.directory import latest_run

        print(escape_controls(str(page.write_page(sources or [latest_run()], out))))


app.command(epilog=examples("look"))(look)
app.command(epilog=examples("serve"))(serve)
app.command(epilog=examples("export"))(export)
app.command(name="import", epilog=examples("import"))(import_)


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
