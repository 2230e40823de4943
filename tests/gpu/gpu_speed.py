"""The checks of gpu_check.py that measure: compiling, memory, speed, and a recipe to its end."""

import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_peer import plain_update
from gpu_runs import (
    GPT2,
    RECIPE,
    TINY,
    Failed,
    Place,
    Skipped,
    Steps,
    count_graphs,
    describe_run,
    forget_graphs,
    make_trainer,
    relative_difference,
    tokens_per_second,
)

from gptlite.config.run import RunConfig
from gptlite.core.evaluate import byte_lengths, eval_rows, measure
from gptlite.core.train import Trainer
from gptlite.data.prepare import prepare
from gptlite.planning.memory import COMPILER_BYTES, PROCESS_BYTES, training_bytes
from gptlite.planning.plan import flops_per_token
from gptlite.runs import start
from gptlite.runs.origin import load_run

LARGE_VOCABULARY = 50_257
PUBLISHED, TOLERANCE = 1.4697, 0.02
"""Nats per character of nanoGPT's recipe (its README), and how much worse ours may be."""
PEAKS = dict(
    [("B200", 2250), ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989)]
    + [("A100", 312), ("L40S", 362), ("L40", 181), ("L4", 121), ("A10G", 70), ("A10", 125)]
    + [("RTX 5090", 210), ("RTX 4090", 165), ("RTX 3090", 71), ("V100", 125), ("T4", 65)]
)
"""Dense products of 16 bits with sums in float32, in TFLOP/s, by the makers' data sheets; the
first name that is part of the GPU's counts."""
GPT2_ROWS = 8
"""Sequences of 1024 at a time: what cards of 16 GB hold."""
SECONDS_TO_COMPILE = 30
"""Nothing is compiled with less time left: a compiler cannot be hurried."""
NANOGPT_SITES = ("embedding", "attention_weights", "attention_output", "mlp_output")


def describe_sized(place: Place, model: dict[str, Any], rows: int, **sections: Any) -> RunConfig:
    """A run of so many sequences an update, long enough for `auto` to compile it."""
    more = sections.pop("train", {})
    train = {"max_steps": 5000, "batch_size": 2 if place.small else rows, **more}
    return describe_run(place, model=place.sizes(model), train=train, **sections)


def with_large_vocabulary(place: Place) -> dict[str, Any]:
    """Sections of a run on random characters, as many different ones as GPT-2 has tokens."""
    size = 500 if place.small else LARGE_VOCABULARY
    path = place.folder / "characters.txt"
    if not path.is_file():
        numbers = np.random.default_rng(0).permutation(np.arange(1_000_000) % size)
        path.write_text("".join(chr(33 + n if n < 5000 else 0x10000 + n) for n in numbers))
    data = {"source": str(path), "cache_dir": str(place.folder / "cache")}
    return {"data": data, "tokenizer": {"kind": "char"}}


def four_sites(rate: float, masks: str = "auto", **sites: float) -> dict[str, Any]:
    rates = {**dict.fromkeys(NANOGPT_SITES, rate), **sites} if rate else {}
    return {"preset": "none", "sites": rates, "masks": masks}


def check_compile(place: Place) -> Steps:
    """Compiled and not, while a schedule moves the rates: graphs, losses, time."""
    if lacks := place.lacks_compiler():
        raise Skipped(f"compiling needs {lacks}; `compile: auto` is false here")
    yield ("compile", "graphs", "breaks", "first update, s", "tokens/s", "last loss")
    dropout = {**four_sites(0.1, "keyed"), "schedule": {"shape": "linear", "until": 0.01}}
    n = 5 if place.small else 30
    losses, found = list[float](), (0, 0)
    for compiled in (False, True):
        forget_graphs()
        made = make_trainer(
            describe_sized(place, RECIPE, 64, dropout=dropout, compile=compiled, dtype="float32")
        )
        updates, began = made.updates(made.max_steps), time.perf_counter()
        next(updates)
        first = time.perf_counter() - began
        began, tokens = time.perf_counter(), 0
        for _ in range(n):
            last = next(updates)
            tokens += last.targets
        rate = tokens / (time.perf_counter() - began)
        losses.append(last.loss)
        found = count_graphs()
        graphs, breaks = (str(number) for number in found)
        cells = (graphs, breaks, f"{first:.1f}", f"{rate:,.0f}", f"{last.loss:.5f}")
        yield (str(compiled).lower(), *cells)
    if found != (1, 0):
        raise Failed(f"{found[0]} graphs and {found[1]} breaks instead of one graph")
    if (apart := relative_difference(*losses)) > 1e-3:
        raise Failed(f"a compiled loss is {apart:.1e} away")
    return f"one graph for all rates; the losses are {apart:.1e} apart"


def peak_bytes(place: Place) -> float:
    if place.on_gpu:
        return float(torch.cuda.max_memory_allocated(place.device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_memory(place: Place) -> Steps:
    """The estimate that micro-batches are chosen by, against the peak of three updates."""
    yield ("run", "sequences", "dtype", "compile", "estimate, GiB", "peak, GiB", "ratio")
    gpt2 = {**with_large_vocabulary(place), "dropout": four_sites(0)}
    cases: list[tuple[str, dict[str, Any], int, bool, dict[str, Any]]] = [
        ("10.65 M, dropout", RECIPE, 64, False, {"dropout": four_sites(0.2)}),
        ("10.65 M, keyed", RECIPE, 64, False, {"dropout": four_sites(0.2, "keyed")}),
        ("124 M", GPT2, GPT2_ROWS, False, gpt2),
    ]
    if place.on_gpu and place.lacks_compiler() is None:
        cases.append(("124 M", GPT2, GPT2_ROWS, True, gpt2))
    wrong = []
    for name, model, rows, compiled, sections in cases:
        forget_graphs()
        size = {"micro_batch_size": 2 if place.small else rows, "recompute": False}
        run = describe_sized(place, model, rows, compile=compiled, train=size, **sections)
        made = make_trainer(run)
        if place.on_gpu:
            torch.cuda.reset_peak_memory_stats(place.device)
        list(made.updates(3))
        run, peak = made.run, peak_bytes(place)
        vocabulary = prepare(run).meta["vocab_size"]
        need = training_bytes(run, vocabulary, int(size["micro_batch_size"]), recompute=False)
        # On a GPU Python and the compiler are not in the way.
        need -= PROCESS_BYTES + COMPILER_BYTES * compiled if place.on_gpu else 0
        words = (str(size["micro_batch_size"]), run.dtype, str(compiled).lower())
        yield (name, *words, *(f"{x / 2**30:.2f}" for x in (need, peak)), f"{need / peak:.2f}")
        wrong += [name] if peak > 1.1 * need else []
        del made
    if wrong:
        raise Failed(f"more than a tenth above the estimate: {', '.join(wrong)}")
    return "no peak is more than a tenth above the estimate"


def check_evaluation(place: Place) -> Steps:
    """The validation loss by as many rows at a time as suit a CPU, and as suit this device."""
    yield ("vocabulary", "rows at a time", "seconds", "loss")
    worst, faster = 0.0, []
    vocabularies: tuple[dict[str, Any], ...] = ({}, with_large_vocabulary(place))
    for sections in vocabularies:
        forget_graphs()
        sections = {"dropout": four_sites(0), "compile": False, **sections}
        made = make_trainer(describe_sized(place, RECIPE, 64, **sections))
        vocabulary = prepare(made.run).meta["vocab_size"]
        lengths = byte_lengths(prepare(made.run).tokenizer)
        val = prepare(made.run).rows("val", made.run.model.context_length)
        on_cpu = made.run.model_copy(update={"device": "cpu"})
        ways = [eval_rows(run, vocabulary) for run in (on_cpu, made.run)]
        losses, seconds = list[float](), list[float]()
        for rows in ways:
            times = list[float]()
            for _ in range(3):  # the first one warms up
                began = time.perf_counter()
                batches = val.sweep(rows, 100 if place.small else 2000)
                loss = measure(made.model, batches, made.run, lengths).loss
                times.append(time.perf_counter() - began)
            losses.append(loss)
            seconds.append(min(times[1:]))
            yield (f"{vocabulary:,}", f"{rows}", f"{seconds[-1]:.2f}", f"{loss:.6f}")
        worst = max(worst, relative_difference(*losses))
        faster.append(seconds[0] / seconds[1])
    if worst > 1e-4:
        raise Failed(f"losses are {worst:.1e} apart")
    gains = " and ".join(f"{gain:.1f}" for gain in faster)
    return f"{gains} times as fast as in a CPU's batches; losses {worst:.1e} apart"


DROPOUTS = {
    "none": four_sites(0),
    "0.1, auto": four_sites(0.1),
    "0.1, keyed": four_sites(0.1, "keyed"),
    "0.1, keyed, context vectors instead of weights": four_sites(
        0.1, "keyed", attention_weights=0.0, attention_context=0.1
    ),
}


def check_dropout(place: Place) -> Steps:
    """Tokens per second of nanoGPT's shape at rates 0 and 0.1, then the same compiled."""
    yield ("dropout at four places", "attention", "compile", "tokens/s", "of rate 0")
    n, base = 3 if place.small else 40, 0.0
    found = list[str]()
    ways = [(name, False) for name in DROPOUTS]
    if place.lacks_compiler() is None and not place.small:
        ways += [(name, True) for name in DROPOUTS if "auto" not in name]
    for name, compiled in ways:
        if compiled and place.seconds_left() < SECONDS_TO_COMPILE:
            break
        forget_graphs()
        dropout = DROPOUTS[name]
        made = make_trainer(describe_sized(place, RECIPE, 64, dropout=dropout, compile=compiled))
        rate = tokens_per_second(made, n)
        base = base or rate
        words = (made.run.attention, str(compiled).lower())
        yield (name, *words, f"{rate:,.0f}", f"{rate / base:.2f}")
        found.append(f"{name}{', compiled' if compiled else ''} {rate / base:.2f}")
    return f"tokens/s, of those without dropout: {'; '.join(found[1:])}"


def matmul_tflops(place: Place, dtype: torch.dtype) -> float:
    """What this device does of its peak: products of 8192 cubed."""
    n, times = 256 if place.small else 8192, []
    a, b = (torch.randn(n, n, device=place.device).to(dtype) for _ in range(2))
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(5):
            c = a @ b
        c[0, 0].item()
        times.append(time.perf_counter() - began)
    return 5 * 2 * n**3 / statistics.median(times[1:]) / 1e12


def peak_tflops(place: Place) -> float | None:
    name = torch.cuda.get_device_name(place.device) if place.on_gpu else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def check_gpt2(place: Place) -> Steps:
    """GPT-2's 124 M at context 1024, random tokens: speed and share of the device's peak."""
    large, rows = with_large_vocabulary(place), 4 * GPT2_ROWS
    train = {"micro_batch_size": 2 if place.small else GPT2_ROWS}
    yield ("who", "dropout", "compile", "tokens/s", "TFLOP/s", "MFU", "of a measured product")
    peak = peak_tflops(place)
    product = best = 0.0
    compiler = place.lacks_compiler() is None and not place.small
    for rate, compiled in ((0.0, False), (0.1, False), (0.0, True)):
        if compiled and (not compiler or place.seconds_left() < SECONDS_TO_COMPILE):
            continue
        forget_graphs()
        dropout = four_sites(rate)
        made = make_trainer(
            describe_sized(
                place, GPT2, rows, dropout=dropout, compile=compiled, train=train, **large
            )
        )
        half = getattr(torch, made.run.dtype)
        product = product or matmul_tflops(place, half)
        speed = tokens_per_second(made, 2 if place.small else 8, warm=2)
        tflops = speed * flops_per_token(made.run, prepare(made.run).meta["vocab_size"]) / 1e12
        best = max(best, tflops)
        shares = [f"{tflops / peak:.1%}" if peak else "peak unknown", f"{tflops / product:.1%}"]
        words = (f"{rate:g}", str(compiled).lower())
        yield ("gptlite", *words, f"{speed:,.0f}", f"{tflops:.2f}", *shares)
        del made
    of_peak = f"{best / peak:.0%} of {peak} TFLOP/s" if peak else "a peak that is not known"
    return f"{best:.1f} TFLOP/s: {of_peak}, {best / product:.0%} of a measured product"


def plain_speed(place: Place, made: Trainer, rate: float, compiled: bool, n: int) -> float:
    """Tokens per second of the plain loop, on the same tokens and sizes."""
    forget_graphs()
    run = made.run
    update = plain_update(
        place.sizes(RECIPE),
        prepare(made.run).tokens("train")[:],
        prepare(made.run).meta["vocab_size"],
        batch_size=run.train.batch_size,
        rate=rate,
        device=place.device,
        dtype=run.dtype,
        compiled=compiled,
    )
    for _ in range(3):
        update()
    began = time.perf_counter()
    for _ in range(n):
        update()
    seconds = time.perf_counter() - began
    return n * run.train.batch_size * run.model.context_length / seconds


def describe_recipe(place: Place, text: Path, n: int) -> RunConfig:
    """The shipped recipe on this text, of n updates; in a reduced size on any text."""
    values: dict[str, Any] = {
        "device": place.device,
        "data.source": str(text),
        "data.cache_dir": str(place.folder / "cache"),
        "train.max_steps": n,
        "optim.warmup_steps": min(100, n // 10),
        "sample.max_new_tokens": 1,
    }
    if place.small:
        values |= {f"model.{key}": str(value).lower() for key, value in TINY.items()}
        values |= {"train.batch_size": 4, "train.eval_interval": 10, "data.sha256": "null"}
    return load_run(["shakespeare_char"], [f"{key}={value}" for key, value in values.items()])


def affordable_updates(made: Trainer, speed: float, seconds: float, wanted: int) -> int:
    """How many updates fit into so many seconds, with their evaluations; an evaluation is timed."""
    run, began = made.run, time.perf_counter()
    vocabulary = prepare(made.run).meta["vocab_size"]
    batches = (
        prepare(made.run).rows("val", run.model.context_length).sweep(eval_rows(run, vocabulary))
    )
    measure(made.model, batches, run, byte_lengths(prepare(made.run).tokenizer))
    evaluation = time.perf_counter() - began
    tokens = run.train.batch_size * run.model.context_length
    return min(wanted, int(seconds / (tokens / speed + evaluation / run.train.eval_interval)))


def check_shakespeare(place: Place) -> Steps:
    """nanoGPT's recipe to its end, or as far as the time goes, beside a plain loop."""
    if place.text is None:
        raise Skipped("tinyshakespeare is not at hand; give it by --text FILE")
    yield ("what", "compile", "updates", "tokens/s", "validation loss")
    n, wanted = (3, 20) if place.small else (50, 5000)
    made = make_trainer(describe_recipe(place, place.text, wanted))
    speed = tokens_per_second(made, n)
    yield ("gptlite", str(made.run.compile).lower(), f"{n}", f"{speed:,.0f}", "")
    plain = plain_speed(place, made, 0.2, False, n)
    yield ("a plain loop of torch's parts", "false", f"{n}", f"{plain:,.0f}", "")
    updates = affordable_updates(made, speed, 0.85 * place.seconds_left() - 5, wanted)
    if updates < wanted / 50:
        raise Failed(f"there is time for {updates} of {wanted} updates only")
    began = time.perf_counter()
    summary = start.train(describe_recipe(place, place.text, updates), place.folder / "recipe")
    took, loss = time.perf_counter() - began, float(summary["best"]["val_loss"])
    yield (f"the recipe in {took:.0f} s", "", f"{updates}", "", f"{loss:.4f}")
    if place.lacks_compiler() is None and not place.small and place.seconds_left() > 40:
        compiled = plain_speed(place, made, 0.2, True, n)
        yield ("the plain loop", "true", f"{n}", f"{compiled:,.0f}", "")
    beside = f"{speed / plain:.2f} times the tokens/s of a plain loop"
    if place.small:
        return f"{loss:.4f} in a reduced size; {beside}"
    if updates < wanted:
        return f"{loss:.4f} after {updates} updates, not the recipe's {wanted}; {beside}"
    if loss > PUBLISHED + TOLERANCE:
        raise Failed(f"{loss:.4f}, published is {PUBLISHED}; {beside}")
    return f"{loss:.4f}, published is {PUBLISHED}; {beside}"
