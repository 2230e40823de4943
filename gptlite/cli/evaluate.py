"""`gptlite eval`: what is measured of a trained model, or of several as one, and how it is told."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gptlite.cli.options import (
    CheckpointOption,
    Ensembled,
    Json,
    RunOption,
    RunsToEnsemble,
    Verbose,
    split_commas,
)
from gptlite.cli.printing import print_json, print_results, print_sentences, tell_notes
from gptlite.cli.trained import choose_runs, load_members
from gptlite.distributed.torchrun import join_ranks
from gptlite.errors import ConfigError
from gptlite.terminal import tell, user_errors
from gptlite.words import escape_controls

MEASURED, HARNESS = "What is measured", "Tasks of EleutherAI's harness (--suite lm-eval)"


def evaluate(
    runs: RunsToEnsemble = None,
    run: RunOption = None,
    ensemble: Ensembled = False,
    split: Annotated[
        str,
        typer.Option(
            metavar="SPLIT",
            rich_help_panel=MEASURED,
            help="val, train, test, or any text that data.source takes: a file, folder or glob.",
        ),
    ] = "val",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUITE",
            rich_help_panel=MEASURED,
            help="loss (the default), calibration, knockout, importance, memorisation, "
            "mc-dropout, all, or lm-eval for --tasks. Several: separated by commas, or repeated.",
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            rich_help_panel=MEASURED,
            help="Take fewer units, masks and tokens: sooner done, with wider intervals.",
        ),
    ] = False,
    dropout_active: Annotated[
        bool,
        typer.Option(
            "--dropout-active",
            rich_help_panel=MEASURED,
            help="Leave dropout on, to see what forgetting to switch it off would cost.",
        ),
    ] = False,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASKS",
            rich_help_panel=HARNESS,
            help="Tasks to run, separated by commas, as in lambada_openai,arc_easy.",
        ),
    ] = "",
    include_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", rich_help_panel=HARNESS, help="Folder with task files of your own."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="EXAMPLES",
            rich_help_panel=HARNESS,
            help="Take only the first examples of each task, so many.",
        ),
    ] = None,
    checkpoint: CheckpointOption = "best",
    full: Annotated[
        bool, typer.Option("--full", help="Print every number by its name, not sentences.")
    ] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on a split, and say in sentences what was found.

    All numbers go to eval/ in the run directory, and report.html is made anew. An ensemble's loss
    is printed only."""
    with user_errors(verbose), join_ranks() as world:
        from gptlite.distributed.agreement import agree

        if full and json_:
            raise ConfigError("--full: --json has every number already")
        directories = agree(world, list[Path], lambda: choose_runs(runs, ensemble, run))
        if ensemble:
            if world.size > 1 or suite or tasks or dropout_active:
                raise ConfigError("--ensemble: measures the loss, in one process; no --suite")
            results = evaluate_ensemble(directories, checkpoint, split, fast)
            of = {"ensemble": list(map(str, directories)), "split": split}
            show(of, results, [], full=full, json_=json_)
            return
        directory = directories[0]
        from gptlite.data.prepare import open_split
        from gptlite.measure import suites
        from gptlite.runs.trained import load_on_all_ranks

        asked = split_commas(",".join(suite or ["loss"]))
        own_suites = suites.choose_suites(name for name in asked if name != "lm-eval")
        if world.size > 1 and asked != ["loss"]:
            why = "several processes measure the loss only; start without torchrun"
            raise ConfigError(f"--suite {','.join(asked)}: {why}")
        if "lm-eval" not in asked and (tasks or include_path or limit):
            raise ConfigError("--tasks, --include-path, --limit: are for --suite lm-eval")
        if "lm-eval" in asked:
            from gptlite.measure import lm_eval
        trained = load_on_all_ranks(directory, checkpoint, world)
        if world.first:
            tell_notes(trained)
        world.set_timeout(trained.run.distributed.timeout_seconds)
        before = trained.state.data_digest
        files = partial(open_split, trained.run, trained.tokenizer, split, before)
        results = suites.run_suites(
            trained,
            split,
            own_suites,
            partial(world.make_in_turn, files),
            effort=suites.FAST if fast else suites.FULL,
            dropout_active=dropout_active,
            world=world,
        )
        if not world.first:
            return
        written: list[Path] = []
        save = partial(suites.save_results, directory, split, step := trained.state.step)
        try:
            written += save(results, dropout_active)
            if "lm-eval" in asked:
                found = lm_eval.run_tasks(trained, split_commas(tasks), include_path, limit)
                results["lm-eval"] = suites.to_json(found)
                written += save({"lm-eval": results["lm-eval"]}, False)
        finally:  # what took so long is not lost with the disk, nor with the next thing
            about = {"run": str(directory), "step": step, "split": split}
            show(about, results, written, full=full, json_=json_)
        from gptlite.report.page import add_report

        add_report(directory, tell)


def evaluate_ensemble(
    directories: list[Path], checkpoint: str, split: str, fast: bool
) -> dict[str, Any]:
    """Results by suite, of several models as one."""
    from gptlite.data.prepare import open_split
    from gptlite.measure.ensemble import run_ensemble
    from gptlite.measure.suites import FAST, FULL

    members = load_members(directories, checkpoint)
    first = members[0]
    files = partial(open_split, first.run, first.tokenizer, split, first.state.data_digest)
    return {"ensemble": run_ensemble(members, split, files, FAST if fast else FULL)}


def show(
    about: dict[str, Any],
    results: dict[str, Any],
    written: list[Path],
    *,
    full: bool,
    json_: bool,
) -> None:
    """Results on stdout, under what they are of, and where they were written."""
    if json_ and results:
        print_json({**about, **results})
    elif results:
        of = about.get("run") or " + ".join(about["ensemble"])
        step = f", step {about['step']}" if "step" in about else ""
        print(f"{escape_controls(of)}{step}, {escape_controls(about['split'])}:")
        (print_results if full else print_sentences)(results)
        if written:
            print(escape_controls(f"All numbers are in {name_files(written)}."))
        if not full:
            print("--full prints them by name; docs/measuring.md says what each is.")


def name_files(written: list[Path]) -> str:
    """One path, or a pattern for several in one folder."""
    if len(written) == 1:
        return str(written[0])
    ending = os.path.commonprefix([path.name[::-1] for path in written])[::-1]
    return f"{written[0].parent}/*{ending[ending.index('-') :]} ({len(written)} files)"
