"""What a run would do, without doing it: sizes, cost, memory, choices, and every dropout site."""

import math
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
from gptlite.planning.audit import site_plan, site_seconds
from gptlite.planning.auto import check_ranks, check_warmup, resolve_run
from gptlite.planning.header import detail_lines, header_lines, note_lines
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


def plan_table(run: RunConfig, plan: dict[str, Any]) -> list[str]:
    """Head and details, the dropout sites as a table, and the time."""
    head = [line for line in header_lines(run, plan) if not line.startswith("dropout:")]
    lines = [*head, *detail_lines(run, plan), *note_lines(run, plan)]
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
