"""`gptlite study`: a study of a file, or of options that become one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptlite.cli.options import Json, MoreConfigFiles, Overrides, Verbose, complete_keys
from gptlite.cli.printing import print_json
from gptlite.errors import ConfigError
from gptlite.terminal import tell, user_errors
from gptlite.words import escape_controls

if TYPE_CHECKING:
    from gptlite.studies.config import Study

SEEDS = 3
"""Of a study that is made of options."""
SWEEP = "Without FILE, beside --config"
"""The group of the options that make a study."""


def study(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="YAML file of the study: base config, axes, seeds, what to evaluate.",
        ),
    ] = None,
    config: MoreConfigFiles = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            rich_help_panel=SWEEP,
            help="Values of a key to try, as in --sweep dropout.rate=0,0.1,0.2. Repeat for a grid.",
            autocompletion=complete_keys,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000,
            metavar="N",
            rich_help_panel=SWEEP,
            show_default=str(SEEDS),
            help="Run every point with the seeds 1 to N.",
        ),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how many runs there are, and about how long."),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, max=1024, metavar="PROCESSES", help="Processes on this machine."),
    ] = 1,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            show_default="studies/ and the name of the file or config",
            help="Folder of the study.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Database, for machines that share no folder."),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train and measure many runs, each once, and say which differences are above seed noise."""
    with user_errors(verbose):
        options = {"--config": config, "--sweep": sweep, "--seeds": seeds, "--set": overrides}
        check_options(file, [name for name, value in options.items() if value])
        from gptlite.storage import require_folder
        from gptlite.studies import sweep as sweeping
        from gptlite.studies.config import load_study

        if file is not None:
            made, new = load_study(file), False
            folder = out_dir or sweeping.study_folder(file)
        else:
            values, n_seeds = overrides or [], seeds or SEEDS
            made = sweeping.make_sweep(config or [], sweep or [], values, n_seeds, out_dir)
            folder = out_dir or sweeping.STUDIES / made.name
            file = sweeping.sweep_file(folder)
            new = sweeping.is_new(file, made)
        require_folder("--out-dir", folder)
        if dry_run:
            print_estimate(made, folder, workers, json_)
            return
        if config:
            start_sweep(made, folder, workers, file, new)
        run_to_table(file, folder, workers, storage, json_)


def check_options(file: Path | None, given: list[str]) -> None:
    """Raises ConfigError where a study is described by a file and by options, or by neither."""
    if file is not None and given:
        raise ConfigError(f"{', '.join(given)}: not beside a study file; {file} says all of it")
    if file is None and "--config" not in given:
        raise ConfigError("FILE: missing; give a study, or --config and --sweep")
    if file is None and "--sweep" not in given:
        raise ConfigError(
            "--sweep: missing; say what to vary, as in --sweep dropout.rate=0,0.1,0.2"
        )


def print_estimate(made: "Study", folder: Path, workers: int, json_: bool) -> None:
    from gptlite.studies.estimate import estimate_study

    estimate = estimate_study(made, folder, workers)
    if json_:
        print_json({"name": made.name, **estimate.as_json()})
        return
    lines = [f"{made.name}: {estimate.words()}", *(f"  {label}" for label in estimate.points)]
    print("\n".join(map(escape_controls, lines)))


def start_sweep(made: "Study", folder: Path, workers: int, file: Path, new: bool) -> None:
    """Say how long it takes and write the file, if all is there to go on."""
    from gptlite.studies.estimate import estimate_study
    from gptlite.studies.study import check_ready
    from gptlite.studies.sweep import write_sweep

    check_ready(folder)
    words = estimate_study(made, folder, workers).words()
    if new:
        write_sweep(file, made)
    tell(f"{file}: {words}")


def run_to_table(file: Path, folder: Path, workers: int, storage: str | None, json_: bool) -> None:
    from gptlite.report.page import add_report
    from gptlite.studies.study import run_study
    from gptlite.studies.table import table_lines

    found = run_study(file, folder, workers, storage)
    if json_:
        print_json(found)
    else:
        print("\n".join(map(escape_controls, table_lines(found))))
    tell(f"numbers: {folder / 'study.json'}")
    add_report(folder, tell)
