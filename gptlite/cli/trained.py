"""`gptlite generate` and `gptlite eval`: what a trained model is asked for, or several as one."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gptlite.cli.options import (
    SAMPLING,
    TEXT,
    CheckpointOption,
    Ensembled,
    Json,
    RunOption,
    RunsToEnsemble,
    Verbose,
    split_commas,
)
from gptlite.cli.printing import print_json, print_results, print_texts, tell_notes
from gptlite.distributed.torchrun import join_ranks
from gptlite.errors import ConfigError, add_step_to_errors
from gptlite.terminal import user_errors
from gptlite.words import escape_controls

MEASURED, HARNESS = "What is measured", "Tasks of EleutherAI's harness (--suite lm-eval)"


def sampling(metavar: str, help: str) -> Any:
    """An option of SampleConfig, which also checks its value."""
    return typer.Option(
        metavar=metavar, rich_help_panel=SAMPLING, show_default="the run's", help=help
    )


def choose_runs(runs: list[str] | None, ensemble: bool, run: str | None) -> list[Path]:
    """The run directories that are meant: several with --ensemble, else one. Raises ConfigError."""
    from gptlite.runs.directory import existing_run

    if not ensemble:
        if runs:
            raise ConfigError(f"{runs[0]}: give --run for one run, --ensemble for several as one")
        return [existing_run(run)]
    if not runs or run is not None:
        raise ConfigError("--ensemble: needs run directories behind it, and takes no --run")
    return [existing_run(name, "") for name in runs]


def load_members(directories: list[Path], checkpoint: str) -> list[Any]:
    """The models of several runs. Raises CheckpointError."""
    from gptlite.runs.trained import load_trained

    members = [load_trained(directory, checkpoint) for directory in directories]
    for member in members:
        tell_notes(member)
    return members


def generate(
    runs: RunsToEnsemble = None,
    run: RunOption = None,
    ensemble: Ensembled = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=TEXT,
            help="Text to continue. Repeat for several, which are written together.",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXT,
            help="File whose whole text is one prompt.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            "-i",
            rich_help_panel=TEXT,
            help="Continue one line after the other as you type them; `:help` says more.",
        ),
    ] = False,
    num_samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            metavar="SAMPLES",
            rich_help_panel=TEXT,
            help="Continuations of each prompt.",
        ),
    ] = 1,
    max_new_tokens: Annotated[
        int | None, sampling("TOKENS", "Longest continuation, in tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=SAMPLING,
            help="End before this text. Repeat for several.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="SEED",
            rich_help_panel=SAMPLING,
            help="Seed of the random draws: the same one writes the same text.",
        ),
    ] = 1337,
    temperature: Annotated[
        float | None,
        sampling("T", "Divides the logits: below 1 likelier tokens gain; 0 is greedy."),
    ] = None,
    top_k: Annotated[
        int | None, sampling("TOKENS", "Draw from this many tokens, the most likely ones.")
    ] = None,
    top_p: Annotated[
        float | None,
        sampling("SHARE", "Draw from the most likely tokens that together have this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        sampling("SHARE", "Draw from tokens at least this likely relative to the most likely one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        sampling("FACTOR", "Above 1: tokens that are in the text already become less likely."),
    ] = None,
    checkpoint: CheckpointOption = "best",
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue prompts with a trained model.

    Text streams to stdout. The defaults of sampling are those of the run's config, section
    `sample`."""
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    with user_errors(verbose):
        from gptlite.config.reader import sample_options
        from gptlite.data.sources import read_prompt

        directories = choose_runs(runs, ensemble, run)
        options = sample_options(directories[0], given)
        prompts = [*(prompt or []), *([read_prompt(prompt_file)] if prompt_file else [])]
        if any(not text for text in stop or []):
            raise ConfigError("--stop: an empty text would stop at once")
        if interactive and (prompts or json_ or num_samples > 1):
            raise ConfigError("--interactive: takes no --prompt, --json or --num-samples")
        from gptlite.cli.interactive import talk
        from gptlite.core.ensemble import Ensemble
        from gptlite.core.generate import Generation, halve

        members = load_members(directories, checkpoint)
        if ensemble:
            from gptlite.measure.ensemble import check_members

            check_members(members)
        for member in members:
            if member.run.dtype == "bfloat16":
                halve(member.model)
        first = members[0]
        make_generation = partial(
            Generation,
            Ensemble([member.model for member in members]) if ensemble else first.model,
            first.tokenizer,
            stops=stop or [],
            documents=first.run.data.layout == "documents",
            context=min(member.context_length for member in members),
            unseen=sorted(set.intersection(*(set(member.unseen) for member in members))),
        )
        if interactive:
            who = "" if ensemble else f"{directories[0]}, step {first.state.step}"
            talk(make_generation, options, seed, who or f"{len(members)} runs as one")
            return
        generation = make_generation(prompts or [""], options, seed=seed, num_samples=num_samples)
        with add_step_to_errors(first.state.step):
            if json_:
                names = [str(directory) for directory in directories]
                of = {"ensemble": names} if ensemble else {"run": names[0]}
                print_json({**of, "results": generation.results()})
            else:
                print_texts(generation)


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
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on a split.

    Results are printed and written to eval/ in the run directory; those of an ensemble are only
    printed."""
    with user_errors(verbose), join_ranks() as world:
        from gptlite.distributed.agreement import agree

        directories = agree(world, list[Path], lambda: choose_runs(runs, ensemble, run))
        if ensemble:
            if world.size > 1 or suite or tasks or dropout_active:
                raise ConfigError("--ensemble: measures the loss, in one process; no --suite")
            results = evaluate_ensemble(directories, checkpoint, split, fast)
            show({"ensemble": list(map(str, directories)), "split": split}, results, json_)
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
        save = partial(suites.save_results, directory, split, step := trained.state.step)
        try:
            save(results, dropout_active)
            if "lm-eval" in asked:
                found = lm_eval.run_tasks(trained, split_commas(tasks), include_path, limit)
                results["lm-eval"] = suites.to_json(found)
                save({"lm-eval": results["lm-eval"]}, False)
        finally:  # what took so long is not lost with the disk, nor with the next thing
            show({"run": str(directory), "step": step, "split": split}, results, json_)


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


def show(about: dict[str, Any], results: dict[str, Any], json_: bool) -> None:
    """Results on stdout, under what they are of."""
    if json_ and results:
        print_json({**about, **results})
    elif results:
        of = about.get("run") or " + ".join(about["ensemble"])
        step = f", step {about['step']}" if "step" in about else ""
        print(f"{escape_controls(of)}{step}, {escape_controls(about['split'])}:")
        print_results(results)
