"""`gptlite generate`: what a trained model writes, or several as one; and which runs are meant."""

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
)
from gptlite.cli.printing import print_json, print_texts, tell_notes
from gptlite.errors import ConfigError, add_step_to_errors
from gptlite.terminal import user_errors


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
