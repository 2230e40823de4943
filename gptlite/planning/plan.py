"""What a run would do, without doing it: sizes, cost, memory, choices, and every dropout site."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gptlite.config.run import RunConfig
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.core.world import World
from gptlite.data.batches import Layout
from gptlite.data.prepare import prepare
from gptlite.data.token_files import TokenFiles
from gptlite.data.tokenizers import Tokenizer
from gptlite.interchange.families import describe_export
from gptlite.planning.audit import advice, site_plan, site_seconds
from gptlite.planning.auto import check_ranks, check_warmup, resolve_run
from gptlite.planning.memory import refuse_too_large, training_bytes
from gptlite.planning.rehearsal import (
    count_evaluated,
    make_idle_trainer,
    time_evaluation,
    time_updates,
)
from gptlite.terminal import format_duration, format_number


def flops_per_token(run: RunConfig, vocab_size: int) -> int:
    """Forward and backward of one token at full context (PaLM, arXiv:2204.02311, appendix B)."""
    model = run.model
    looked_up = model.context_length * model.n_embd if model.position == "learned" else 0
    looked_up += 0 if model.tie_embeddings else vocab_size * model.n_embd
    weights = model.n_parameters(vocab_size) - looked_up
    heads = model.n_head * model.head_width
    return 6 * weights + 12 * model.n_layer * heads * model.context_length


class Planned(NamedTuple):
    """A run that is about to be: resolved, with its model, and the plan with what was measured."""

    run: RunConfig
    model: GPT
    rows: Layout
    plan: dict[str, Any]


def plan_run(run: RunConfig, world_size: int = 1, own: Tokenizer | None = None) -> Planned:
    """The resolved run and its plan, with the time of an update and of every site measured.

    Of several ranks, what each of them would do; the time is without their talking. Nothing is
    compiled for it: that takes longer than the rest of the plan.
    """
    check_ranks(run, world_size)
    refuse_too_large(run)
    files = prepare(run, own)
    rows = files.rows("train", run.model.context_length)
    vocab_size = files.meta["vocab_size"]
    world = World(world_size)
    check_warmup(run, rows.n_rows)
    resolved, reasons = resolve_run(run, vocab_size=vocab_size, n_rows=rows.n_rows, world=world)
    trainer = make_idle_trainer(resolved.model_copy(update={"compile": False}), files, world)
    plan = make_plan(resolved, trainer.model, files, rows, reasons, world_size)
    plan |= measure_time(trainer, files)
    for site in plan["dropout"]:
        cost = site_seconds(resolved, trainer.model, site) / world_size
        share = cost / plan["seconds_per_update"]
        site |= {"milliseconds_per_update": 1e3 * cost, "share_of_update": share}
    return Planned(resolved, trainer.model, rows, plan)


def measure_time(trainer: Trainer, files: TokenFiles) -> dict[str, Any]:
    """Seconds that a rank takes for an update and for an evaluation, and how many there are."""
    run = trainer.run
    pace = time_updates(trainer)
    evaluation = time_evaluation(trainer, files).seconds_for(
        count_evaluated(run, files), trainer.rows.n_rows
    )
    return {
        "seconds_per_update": pace.seconds,
        "timed_sequences": pace.n_rows,
        "seconds_per_evaluation": evaluation / trainer.world.size,
        "evaluations": -(-trainer.max_steps // run.train.eval_interval),
    }


def make_plan(
    run: RunConfig,
    model: GPT,
    files: TokenFiles,
    rows: Layout,
    reasons: dict[str, str],
    ranks: int = 1,
) -> dict[str, Any]:
    """The plan of a resolved run, as it is written to plan.json."""
    vocab_size, train = files.meta["vocab_size"], run.train
    n_steps = run.planned_steps(rows.n_rows)
    n_parameters = run.model.n_parameters(vocab_size)
    tokens_per_update = mean_targets(rows) * train.batch_size
    flops = flops_per_token(run, vocab_size)
    assert isinstance(train.micro_batch_size, int)
    return {
        "parameters": n_parameters,
        "vocab_size": vocab_size,
        "train_tokens": files.n_tokens("train"),
        "val_tokens": files.n_tokens("val"),
        "bytes_per_token": files.meta["bytes_per_token"],
        "steps": n_steps,
        "rows_per_epoch": rows.n_rows,
        "epochs": n_steps * train.batch_size / rows.n_rows,
        "longest_row": rows.length,
        "tokens_per_update": tokens_per_update,
        "flops_per_token": flops,
        "flops": flops * tokens_per_update * n_steps,
        "memory_bytes_estimate": training_bytes(
            run, vocab_size, train.micro_batch_size, train.recompute is True, ranks
        ),
        "ranks": ranks,
        "sequences_per_rank": train.batch_size // ranks,
        "auto": reasons,
        "attention": reasons.get("attention", f"{run.attention}: asked for"),
        "dropout": site_plan(run, model, rows.n_rows),
    }


def mean_targets(rows: Layout) -> float:
    """Targets per row, over rows spread through the split."""
    counts = [batch.n_targets / len(batch.inputs) for batch in rows.sweep(64, limit=256)]
    return float(np.mean(counts))


def summary_lines(run: RunConfig, plan: dict[str, Any]) -> list[str]:
    """The plan for people: the head of a run's log, and what `gptlite plan` prints."""
    model, train = run.model, run.train
    tokens = f"{plan['train_tokens']:,} train + {plan['val_tokens']:,} val tokens"
    kind = f"{run.tokenizer.kind} {plan['vocab_size']}, {plan['bytes_per_token']:.2f} bytes/token"
    each_rank = " in each process" if plan["ranks"] > 1 else ""
    shape = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide"
    update = f"{train.batch_size} x {model.context_length} tokens"
    if run.data.layout == "documents":
        update = f"{train.batch_size} documents"
    timed = train.max_minutes is not None
    lines = [
        f"data: {', '.join(run.sources)}: {tokens} ({kind})",
        f"model: {shape}, context {model.context_length}: "
        f"{format_number(plan['parameters'])} parameters, "
        f"about {plan['memory_bytes_estimate'] / 2**30:.2g} GiB to train{each_rank}; "
        f"{describe_export(model)}",
        f"plan: {'at most ' * timed}{plan['steps']} updates of {update} = "
        f"{plan['epochs']:.2f} epochs, {format_number(plan['flops'])}FLOP",
    ]
    lines += extra_lines(run, plan["steps"])
    if plan["ranks"] > 1:
        each = f"{plan['sequences_per_rank']} sequences of an update"
        lines.append(f"ranks: {plan['ranks']}, each with {each}")
    lines += [f"auto: {name} = {why}" for name, why in plan["auto"].items()]
    sites = [f"{site['site']} {site['rate']:g}" for site in plan["dropout"] if site["rate"]]
    lines.append(f"dropout: {', '.join(sites) or 'none'}")
    notes = advice(run, plan["epochs"], plan["train_tokens"])
    lines += [f"note: {line}" for line in notes]
    reached = model.reached(plan["longest_row"])
    if reached and run.init_from is None:
        lines.append(
            f"note: no row of the text has more than {reached} tokens, so later positions stay "
            f"untrained: texts are continued from their last {reached} tokens at most"
        )
    return lines


def extra_lines(run: RunConfig, max_steps: int) -> Iterator[str]:
    """What is not as in most runs."""
    optim, train, distill = run.optim, run.train, run.distill
    if optim.weight_decay_schedule != "constant":
        yield f"weight decay: {optim.weight_decay:g}, {optim.weight_decay_schedule}"
    if train.average == "ema":
        half_life = run.half_life(max_steps)
        yield (
            f"average: of the weights, half-life {half_life:.3g} updates; it is what is evaluated, "
            "saved and generated from"
        )
    if distill.teachers:
        each = ", ".join(distill.teachers)
        yield f"teachers: {each}: {distill.weight:.0%} of the loss (T = {distill.temperature:g})"
    if train.max_minutes is not None:
        yield f"time: at most {train.max_minutes:g} minutes"


def plan_table(run: RunConfig, plan: dict[str, Any]) -> list[str]:
    """summary_lines, the dropout sites as a table, and the time."""
    lines = [line for line in summary_lines(run, plan) if not line.startswith("dropout:")]
    lines += ["", *site_table(plan["dropout"]), ""]
    lines.append(f"attention: {plan['attention']}")
    update, evaluation = plan["seconds_per_update"], plan["seconds_per_evaluation"]
    total = plan["steps"] * update + plan["evaluations"] * evaluation
    total = min(total, 60 * (run.train.max_minutes or math.inf))
    each = plan["sequences_per_rank"]
    timed = "" if plan["timed_sequences"] == each else f" on {plan['timed_sequences']} of {each}"
    lines.append(
        f"time: {format_duration(total)}: {plan['steps']} updates of {update:.3g} s and "
        f"{plan['evaluations']} evaluations of {evaluation:.3g} s (measured{timed})"
    )
    return lines


def site_table(sites: list[dict[str, Any]]) -> list[str]:
    """Of each site that drops a row of numbers, and a line that says where; the others by name."""
    live = [site for site in sites if site["rate"]]
    moves = any(len(set(site["rates"].values())) > 1 for site in live)
    rates = ("start", "middle", "end") if moves else ("rate",)
    rows = [["dropout site", *rates, "values", "ms/update", "share", "masks"]]
    for site in live:
        shown = list(site["rates"].values()) if moves else [site["rate"]]
        numbers = [f"{rate:.4g}" for rate in shown]
        numbers += [format_number(site["elements_per_update"])]
        cost = f"{site['milliseconds_per_update']:.2f}", f"{site['share_of_update']:.1%}"
        rows.append([site["site"], *numbers, *cost, site["masks"].partition(",")[0]])
    lines = []
    if live:
        head, *body = align(rows)
        lines = [head]
        for row, site in zip(body, live, strict=True):
            lines += [row, f"  {describe_site(site)}"]
        lines.append("cost: forward and backward of the site alone, measured here")
    idle = [site["site"] for site in sites if not site["rate"]]
    return [*lines, f"rate 0: {', '.join(idle)}"] if idle else lines


def align(rows: list[list[str]]) -> list[str]:
    """Columns of one width each: the first and the last are words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        right = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *right, last]))
    return lines


def describe_site(site: dict[str, Any]) -> str:
    """Its modules, shapes and what is not as at most sites."""
    shape, mask = ("x".join(map(str, site[name])) for name in ("shape", "mask"))
    parts = [f"{site['modules']} x {site['module']}: {shape}"]
    parts += [f"mask {mask}"] if mask != shape else []
    parts += ["inside the fused kernel"] if "fused" in site["masks"] else []
    if site["profile"] != "constant":
        each = [f"{rate:.3g}" for rate in site["by_layer"]]
        each = each if len(each) <= 8 else [*each[:3], "...", *each[-2:]]
        parts.append(f"rate by layer {' '.join(each)}")
    parts += ["what stays is not scaled"] if site["scale"] == "none" else []
    return ", ".join(parts)
