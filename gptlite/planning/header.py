"""What is said of a run before it begins: its head for people, and the details behind it."""

import math
from collections.abc import Iterator
from typing import Any

from gptlite.config.dropout import DropoutSchedule
from gptlite.config.promise import Promise
from gptlite.config.run import RunConfig
from gptlite.interchange.families import describe_export
from gptlite.planning.audit import advice
from gptlite.terminal import describe_duration, format_number
from gptlite.words import count

MOST_LINES = 7
"""Rows of a terminal for a head: notes are left out where it would have more. With the line about a
config that was made for a text they are eight."""
MOST_SOURCES = 3
MUCH_LONGER = 2.0
"""Times as long as was promised, from which on it is said."""
TOO_FEW = 10
"""Updates that make no model."""


def header_lines(
    run: RunConfig,
    plan: dict[str, Any],
    name: str = "model",
    seconds: float | None = None,
    promise: Promise | None = None,
) -> list[str]:
    """What is trained, on what, for how long and with which dropout. `seconds` are what it is
    expected to take."""
    model, parameters = run.model, format_number(plan["parameters"])
    shape = f"{count(model.n_layer, 'layer')}, {count(model.n_head, 'head')}, {model.n_embd} wide"
    kind = f"{run.tokenizer.kind} {plan['vocab_size']}"
    lines = [
        f"{name}: {parameters} parameters ({shape}, context {model.context_length})",
        f"text: {name_sources(run.sources)}, {plan['train_tokens']:,} tokens ({kind}), "
        f"{plan['val_tokens']:,} held out",
        plan_line(run, plan, seconds),
        dropout_line(run, plan),
    ]
    if seconds and promise and seconds > MUCH_LONGER * promise.seconds:
        lines.append(slow_line(run, plan, seconds, promise))
    if plan["ranks"] > 1:
        each = f"{plan['sequences_per_rank']} sequences of an update"
        lines.append(f"ranks: {plan['ranks']}, each with {each}")
    return [*lines, *extra_lines(run, plan)]


def name_sources(sources: tuple[str, ...]) -> str:
    """All of a few; of many the first ones and how many more there are."""
    if len(sources) <= MOST_SOURCES:
        return ", ".join(sources)
    return f"{', '.join(sources[:2])} and {len(sources) - 2} more"


def plan_line(run: RunConfig, plan: dict[str, Any], seconds: float | None) -> str:
    train = run.train
    timed = train.max_minutes is not None
    update = f"{train.batch_size} x {run.model.context_length} tokens"
    if run.data.layout == "documents":
        update = count(train.batch_size, "document")
    line = f"plan: {'at most ' * timed}{count(plan['steps'], 'update')} of {update}"
    line += f", {plan['epochs']:.2f} epochs"
    if timed:
        return f"{line}, at most {train.max_minutes:g} minutes"
    if seconds is None:
        return line
    uncompiled = " (as timed without compiling)" if run.compile is True else ""
    return f"{line}, about {describe_duration(seconds)} here{uncompiled}"


def dropout_line(run: RunConfig, plan: dict[str, Any]) -> str:
    """Every site that drops, with its rate, and how the rates move."""
    sites = [describe_site(site) for site in plan["dropout"] if site["rate"]]
    if not sites:
        return "dropout: none"
    return f"dropout: {', '.join(sites)}, {describe_schedule(run.dropout.schedule)}"


def describe_site(site: dict[str, Any]) -> str:
    """Its name and rate, and how the rate changes from layer to layer where it does."""
    over_depth = {"constant": "", "increasing": " (increasing)", "decreasing": " (decreasing)"}
    profile = site["profile"]
    how = over_depth[profile] if isinstance(profile, str) else " (by layer)"
    return f"{site['site']} {site['rate']:g}{how}"


def describe_schedule(schedule: DropoutSchedule) -> str:
    """How the rates move over a run, in a few words."""
    until = f"{schedule.until:.0%} of the run"
    gently = {"linear": "linearly", "cosine": "as a cosine"}.get(schedule.shape)
    if schedule.mode == "early":
        return f"falling {gently} to 0 at {until}" if gently else f"until {until}"
    if schedule.mode == "late":
        return f"rising {gently} from {until} on" if gently else f"from {until} on"
    return f"rising {gently} until {until}" if gently else "constant"


def slow_line(run: RunConfig, plan: dict[str, Any], seconds: float, promise: Promise) -> str:
    """Why it takes so much longer than was promised, and what would be faster."""
    promised = describe_duration(promise.seconds)
    steps = round_down(plan["steps"] * promise.seconds / seconds)
    faster = f"--set train.max_steps={steps} would take about {promised}"
    if steps <= max(run.optim.warmup_steps, TOO_FEW):
        faster = "a smaller model would be faster (model.n_layer, model.n_embd)"
    longer = f"about {describe_duration(seconds)} instead of the {promised} of {promise.where}"
    return f"slow: {longer}: {explain_slowness(run, plan['auto'], promise)}; {faster}"


def round_down(number: float) -> int:
    """To two digits, as what it comes from was estimated."""
    digits = max(0, int(math.log10(max(1.0, number))) - 1)
    return int(number) // 10**digits * 10**digits


def explain_slowness(run: RunConfig, reasons: dict[str, str], promise: Promise) -> str:
    if promise.changed:
        return f"changed by {promise.changed}"
    if "loops" in reasons:
        return reasons["loops"].removeprefix("none: ")
    if run.device == "cpu" and run.train.threads == 1:
        return "it runs in one thread"
    return "this machine is slower, or busy"


def extra_lines(run: RunConfig, plan: dict[str, Any]) -> Iterator[str]:
    """What is not as in most runs."""
    train, distill = run.train, run.distill
    if distill.teachers:
        each = ", ".join(distill.teachers)
        yield f"teachers: {each}: {distill.weight:.0%} of the loss (T = {distill.temperature:g})"
    if train.average == "ema":
        half_life = run.half_life(plan["steps"])
        yield (
            f"average: of the weights, half-life {half_life:.3g} updates; it is what is evaluated, "
            "saved and generated from"
        )


def note_lines(run: RunConfig, plan: dict[str, Any]) -> Iterator[str]:
    """What is known of a run like this one, and may be left out."""
    for note in advice(run, plan):
        yield f"note: {note}"
    reached = run.model.reached(plan["longest_row"])
    if reached and run.init_from is None:
        yield (
            f"note: no row of the text has more than {reached} tokens, so later positions stay "
            f"untrained: texts are continued from their last {reached} tokens at most"
        )
    if run.optim.weight_decay_schedule != "constant":
        yield f"weight decay: {run.optim.weight_decay:g}, {run.optim.weight_decay_schedule}"


def detail_lines(run: RunConfig, plan: dict[str, Any]) -> list[str]:
    """What is computed with, and why each `auto` means what it means."""
    each_rank = " in each process" if plan["ranks"] > 1 else ""
    export = describe_export(run.model).removeprefix("exports ").replace("no export", "none", 1)
    return [
        f"memory: about {plan['memory_bytes_estimate'] / 2**30:.2g} GiB to train{each_rank}",
        f"export: {export}",
        f"compute: {format_number(plan['flops'])}FLOP",
        f"tokenizer: {plan['bytes_per_token']:.2f} bytes per token",
        *(f"auto: {name} = {why}" for name, why in plan["auto"].items()),
    ]
