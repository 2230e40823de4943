"""The head of a run's page: what was trained, on what, how far it has come."""

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gptlite.runs.directory import state_of
from gptlite.runs.results import RunFiles, number, read_json
from gptlite.terminal import format_duration
from gptlite.words import count

ENDED = {
    "max_steps": "finished",
    "early_stop": "stopped early, as the validation loss no longer fell",
}
"""What summary.json says, in words."""


class Header(NamedTuple):
    facts: list[tuple[str, str]]
    command: list[str] = []
    progress: str = ""
    """Where a run is that has not come to its end; empty for one that has."""
    running: bool = False


def header_of(run: RunFiles, directory: Path) -> Header:
    state = state_of(directory)
    facts = [(name, words) for name, words in facts_of(run, directory, state) if words]
    arguments = run.environment.get("arguments")
    command = []
    if isinstance(arguments, list) and arguments:
        command = ["gptlite", *(shlex.quote(str(argument)) for argument in arguments)]
    return Header(facts, command, progress_words(run, directory, state), state == "running")


def facts_of(run: RunFiles, directory: Path, state: str) -> Iterator[tuple[str, str]]:
    config, plan = run.config, run.plan
    yield "Text", text_words(config, plan)
    yield "Tokenizer", tokenizer_words(run)
    yield "Model", model_words(config, plan)
    yield "Dropout", dropout_words(run)
    yield "Seed", "" if config.get("seed") is None else str(config["seed"])
    yield "Started", start_words(run.environment)
    yield "Length", length_words(run, directory, state)


def start_words(environment: dict[str, Any]) -> str:
    """To the minute; runs write it down in UTC."""
    started = str(environment.get("started_at", ""))
    zone = " UTC" if started.endswith("+00:00") else ""
    return started[:16].replace("T", " ") + zone


def text_words(config: dict[str, Any], plan: dict[str, Any]) -> str:
    source = (config.get("data") or {}).get("source")
    names = ", ".join(map(str, source)) if isinstance(source, list) else str(source or "")
    train, val = number(plan.get("train_tokens")), number(plan.get("val_tokens"))
    if not names or train is None or val is None:
        return names
    return f"{names}: {train:,.0f} tokens for training, {val:,.0f} for validation"


def tokenizer_words(run: RunFiles) -> str:
    tokenizer, plan = run.config.get("tokenizer") or {}, run.plan
    kind, size = tokenizer.get("kind"), number(plan.get("vocab_size"))
    each = number(plan.get("bytes_per_token"))
    words = f"tiktoken {tokenizer.get('name')}" if kind == "tiktoken" else str(kind or "")
    if words and size is not None:
        words += f", {size:,.0f} tokens"
    return words if not words or each is None else f"{words}, {each:.2f} bytes of text per token"


def model_words(config: dict[str, Any], plan: dict[str, Any]) -> str:
    model, parameters = config.get("model") or {}, number(plan.get("parameters"))
    parts = [] if parameters is None else [f"{parameters / 1e6:.2f} M parameters"]
    if "n_layer" in model:
        parts.append(count(model["n_layer"], "layer"))
        parts.append(count(model.get("n_head", 1), "head"))
        parts.append(f"{model.get('n_embd')} wide")
        parts.append(f"context {model.get('context_length')}")
    return ", ".join(parts)


def dropout_words(run: RunFiles) -> str:
    """The sites of each rate."""
    by_rate: dict[float, list[str]] = {}
    for site in run.sites:
        if rate := number(site.get("rate")):
            by_rate.setdefault(rate, []).append(str(site["site"]))
    if not by_rate:
        return "none" if run.sites else ""
    return "; ".join(f"{rate:g} at {', '.join(sites)}" for rate, sites in by_rate.items())


def length_words(run: RunFiles, directory: Path, state: str) -> str:
    last = run.rows[-1] if run.rows else {}
    parts = [count(last["step"], "update")] if last else []
    if (epoch := number(last.get("epoch"))) is not None:
        parts.append(f"{epoch:.3g} epochs")
    if (seconds := number(last.get("elapsed_seconds"))) is not None:
        parts.append(f"{format_duration(seconds)} of training")
    if state == "finished":
        ended = str(read_json(directory / "summary.json", run.notes).get("ended", ""))
        parts.append(ENDED.get(ended, ended))
    return ", ".join(filter(None, parts))


def progress_words(run: RunFiles, directory: Path, state: str) -> str:
    if state == "finished" or not run.rows:
        return "" if state != "running" else "Training has begun; nothing is logged yet."
    step, steps = run.rows[-1]["step"], number(run.plan.get("steps"))
    at = f"step {step:,}" + (f" of {steps:,.0f}" if steps is not None else "")
    if state == "running":
        written = (directory / "metrics.jsonl").stat().st_mtime
        when = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return (
            f"Still training: {at}, as of {when}. This page is written again at evaluations, "
            "and loads itself again."
        )
    return f"Ended early, at {at}. Go on with: gptlite train --resume {directory}"
