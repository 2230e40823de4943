"""`gptlite generate` and `gptlite eval`: what a trained model is asked for, or several as one."""

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
from gptlite.cli.printing import print_json, print_results, print_texts, tell_notes
from gptlite.distributed.torchrun import join_ranks
from gptlite.errors import ConfigError, add_step_to_errors
from gptlite.terminal import user_errors
from gptlite.words import escape_controls


def choose_runs(runs: list[str] | None, ensemble: bool, run: str | None) -> list[Path]:
    """The run directories that are meant: several with --ensemble, else one. Raises ConfigError."""
    from gptlite.runs.directory import existing_run

    if not ensemble:
        if runs:
            raise ConfigError(f"{runs[0]}: give --run for one run, --ensemble for several as one")
        return [existing_run(run)]
    if not runs or run is not None:
        raise ConfigError("--ensemble: needs run directories behind it, and takes no --run")
    return [existing_run(name) for name in runs]


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
        list[str] | None, typer.Option(help="Text to continue; repeat for a batch.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with one prompt: its whole text.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest continuation, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; 0 is greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest that sum to p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens at least p times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeat for several.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Names the random draws.")] = 1337,
    num_samples: Annotated[
        int, typer.Option(min=1, max=10_000, help="Continuations of each prompt.")
    ] = 1,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Line by line; `:help` says more.")
    ] = False,
    checkpoint: CheckpointOption = "best",
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Continue prompts with a trained model; text streams to stdout."""
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
            talk(make_generation, options, seed)
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
        str, typer.Option(help="val, train, test, or text: what data.source takes.")
    ] = "val",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="loss (the default), calibration, knockout, importance, memorisation, mc-dropout "
            "or all; a comma list or repeated. lm-eval: the --tasks of EleutherAI's harness."
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of the harness, separated by commas.")] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of one's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many examples of each task.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer units, masks and tokens: wider intervals.")
    ] = False,
    dropout_active: Annotated[
        bool, typer.Option("--dropout-active", help="Leave dropout on, to see what that costs.")
    ] = False,
    checkpoint: CheckpointOption = "best",
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on a split; results go to eval/ in the run directory.

    An ensemble's loss is printed only."""
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
