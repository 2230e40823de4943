#!/usr/bin/env python
"""How fast gptlite is, beside Hugging Face's GPT-2 and torch alone, in one run on one machine.

    .venv/bin/python scripts/bench.py [SECTION ...] [--text FILE] [--lesser] [--write]

Everything is interleaved; figures are medians, ratios medians of the ratios within a repeat.
--lesser has a processor with AVX-512 work as one with AVX2 and no bfloat16 (LESSER of
bench_peers.py). --write puts the tables into the pages of docs/, between the marks of their
sections, which end in -avx2 with --lesser. `--text` is tinyshakespeare: quality, target, minutes
and numerics train on it, prepare reads it many times over.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_growth import bench_growth, bench_memory
from bench_loops import bench_loops
from bench_machines import bench_busy, bench_compiler, bench_quickstart, bench_sites
from bench_minutes import bench_minutes
from bench_peers import (
    DROPOUT,
    GPT2,
    LESSER,
    SHAPES,
    Away,
    describe_machine,
    gptlite_update,
    hugging_face,
    hugging_face_update,
    matmul,
    ratio,
    row,
    time_in_turn,
    time_interleaved,
)
from bench_quality import bench_quality
from bench_serve import bench_serve, bench_soak

from gptlite.config.reader import validate
from gptlite.config.run import ModelConfig, SampleConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.device import precisions
from gptlite.core.generate import continuations, halve
from gptlite.core.model import GPT
from gptlite.core.precision import HALF
from gptlite.data.prepare import prepare
from gptlite.data.tokenizers import train_bpe
from gptlite.planning.plan import flops_per_token

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
DOCS = Path(__file__).resolve().parents[1] / "docs"
Times = dict[str, list[float]]


def bench_train(options: argparse.Namespace) -> Iterator[str]:
    """A whole update with dropout 0.2 at nanoGPT's four places."""
    dtypes, best = precisions(torch.device("cpu"))[0], {"float32": torch.float32, **HALF}
    peers = [f"x HF, {dtype}" for dtype in dtypes]
    yield row(("shape", "who", "ms", "tokens/s", *peers, "of the best matmul"))
    yield f"|---|---|{'---:|' * (len(peers) + 3)}"
    plain = {"dtype": "float32", "attention": "math"}
    ways: dict[str, dict[str, Any]] = {
        "torch alone, float32, torch's dropout": {**plain, "compiler": False},
        **({"float32": {"dtype": "float32"}} if len(dtypes) > 1 else {}),
        "auto": {"dtype": "auto"},
        "auto without its loop": {"dtype": "auto", "loop": False},
    }
    for name, shape in SHAPES.items():
        calls = 10 if name.startswith("cpu") else 1
        away = partial(Away, calls=calls)
        todo = {f"HF GPT-2, {d}": away(hugging_face_update, shape, d) for d in dtypes}
        for way, top in ways.items():
            masks = {"masks": "native"} if "torch's" in way else {}
            more = {"dropout": {**DROPOUT, **masks}, **top}
            todo[f"gptlite, {way}"] = away(gptlite_update, shape, **more)
        todo |= {f"{d} matmul": away(matmul, best[d]) for d in dtypes}
        times = time_in_turn(todo, options.repeats)
        made = {d: times.pop(f"{d} matmul") for d in dtypes}
        fastest = min(made, key=lambda d: statistics.median(made[d]))
        products = [8 * 2 * 1024**3 / s for s in made[fastest]]
        tokens = shape["train"]["batch_size"] * shape["model"]["context_length"]
        sizes: Any = SimpleNamespace(model=ModelConfig.model_validate(shape["model"]))
        flops, short = tokens * flops_per_token(sizes, 65), name.partition(":")[0]
        for who, seconds in times.items():
            typical = statistics.median(seconds)
            ratios = [f"{ratio(times, hf, who):.2f}" for hf in list(times)[: len(dtypes)]]
            pairs = zip(seconds, products, strict=True)
            share = statistics.median(flops / s / p for s, p in pairs)
            cells = (f"{1e3 * typical:.1f}", f"{tokens / typical:,.0f}", *ratios, f"{share:.0%}")
            yield row((short, who, *cells))
        speed = f"{statistics.median(products) / 1e9:.0f} GFLOP/s"
        yield row((short, f"{fastest} matmul, 1024 cubed", speed, *[""] * (len(dtypes) + 2)))


def command(*args: str, **sets: Any) -> list[str]:
    given = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "gptlite", *args, *given]


def time_lines(args: list[str]) -> Iterator[tuple[float, str]]:
    """Lines of a command's stderr with the seconds since its start; an empty one at its end."""
    began, environment = time.perf_counter(), {**os.environ, "CI": "true"}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(args, stderr=pipe, stdout=null, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                yield time.perf_counter() - began, line
        finally:
            process.kill()  # who has read enough need not wait
    yield time.perf_counter() - began, ""


def time_until(loss: float, args: list[str]) -> tuple[float, float, float]:
    """(last validation loss, seconds of the whole command, seconds until `loss` was known)."""
    last, reached = float("nan"), float("inf")
    seconds = 0.0
    for seconds, line in time_lines(args):  # noqa: B007
        if match := re.search(r"\bval ([\d.]+)", line):
            last = float(match[1])
            reached = min(reached, seconds) if last <= loss else reached
    return last, seconds, reached


def bench_target(options: argparse.Namespace) -> Iterator[str]:
    """From the start of the command until a loss of 1.88 on the whole validation split is known."""
    plain = {"dtype": "float32", "attention": "math"}
    recipe, fast = "nanoGPT's recipe (lr 1e-3), float32", "`shakespeare_char_fast`"
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        recipe: ("shakespeare_char_cpu", {**plain, "optim.lr": 1e-3}),
        "`shakespeare_char_cpu` (lr 2e-3), float32": ("shakespeare_char_cpu", plain),
        fast: ("shakespeare_char_fast", {}),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for seed in range(1337, 1337 + options.seeds):
        for name, (config, sets) in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                places = {"data.source": options.text, "data.cache_dir": f"{folder}/cache"}
                out = ("--out-dir", f"{folder}/run")
                args = command("train", "--config", config, *out, seed=seed, **places, **sets)
                found[name].append(time_until(1.88, args))
    yield row(("run", "validation loss at the end", "whole command, s", "1.88 known after, s"))
    yield "|---|---|---|---|"
    for name, results in found.items():
        losses, whole, reached = zip(*results, strict=True)
        known = ", ".join("never" if s == float("inf") else f"{s:.1f}" for s in reached)
        cells = [", ".join(f"{x:.3f}" for x in losses), ", ".join(f"{x:.1f}" for x in whole)]
        yield row((name, *cells, known))
    yield ""
    shares = []
    for name in list(runs)[:2]:
        pairs = zip(found[fast], found[name], strict=True)
        both = [(ours[2] / whole, ours[2] / reached) for ours, (_, whole, reached) in pairs]
        shares.append([statistics.median(pair[i] for pair in both) for i in range(2)])
    yield (
        f"Time until 1.88 is known, of the recipe's whole command: {shares[0][0]:.2f}; with "
        f"lr 2e-3 {shares[1][0]:.2f} of the whole command, {shares[1][1]:.2f} of its time to 1.88."
    )


def bench_generate(options: argparse.Namespace) -> Iterator[str]:
    """New tokens per second after a prompt of 16, sampling at temperature 0.8, with a cache."""
    small = {**GPT2, "n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256}
    memory = torch.randn(1 << 26)
    yield row(
        ("model", "streams", "who", "ms a step", "tokens/s", "x HF", "weights, GB/s", "of a read")
    )
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for name, sizes, vocab_size, n in (("10 M", small, 65, 100), ("124 M", GPT2, 50257, 32)):
        theirs = hugging_face(sizes, vocab_size).eval()
        config = ModelConfig.model_validate(sizes)
        dtypes = precisions(torch.device("cpu"))[0]
        ours = {d: GPT(config, vocab_size, kernel="fused").eval() for d in dtypes}
        for dtype in dtypes[1:]:
            halve(ours[dtype])
        wanted = {"max_new_tokens": n, "temperature": 0.8}
        settings = SampleConfig.model_validate(wanted)
        for streams in (1, 8):
            ids = torch.randint(0, vocab_size, (streams, 16))
            more: dict[str, Any] = {"min_new_tokens": n, "do_sample": True, "top_k": 0}
            more |= {"attention_mask": torch.ones_like(ids), **wanted}
            hf = "HF GPT-2, float32"
            todo: dict[str, Callable[[], Any]] = {hf: partial(theirs.generate, ids, **more)}
            for dtype, model in ours.items():
                args = (model, ids.tolist(), list(range(streams)), settings)
                todo[f"gptlite, {dtype}"] = partial(lambda *a: list(continuations(*a)), *args)
            todo["read"] = memory.sum
            times = time_interleaved(todo, options.repeats)
            reads = [4 * memory.numel() / s for s in times.pop("read")]
            for who, seconds in times.items():
                size = n * config.n_parameters(vocab_size) * (2 if "bfloat16" in who else 4)
                share = statistics.median(size / s / r for s, r in zip(seconds, reads, strict=True))
                step = statistics.median(seconds) / n
                cells = [
                    f"{1e3 * step:.2f}",
                    f"{streams / step:,.0f}",
                    f"{ratio(times, hf, who):.2f}",
                ]
                yield row(
                    (
                        name,
                        str(streams),
                        who,
                        *cells,
                        f"{size / step / n / 1e9:.1f}",
                        f"{share:.0%}",
                    )
                )


def bench_prepare(options: argparse.Namespace) -> Iterator[str]:
    """Text to token files with GPT-2's vocabulary, from reading the text to the digests."""
    import tiktoken

    text = options.text.read_text()
    encoding = tiktoken.get_encoding("gpt2")
    pieces = [text[at : at + 65536] for at in range(0, len(text), 65536)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def measure_peak(megabytes: int) -> float:
            source, place = folder / f"{megabytes}.txt", {"data.cache_dir": folder / "cache"}
            with source.open("w") as file:
                for _ in range(megabytes * 10**6 // len(text)):
                    file.write(text)
            gpt2 = {"tokenizer.kind": "tiktoken", "data.source": source, **place}
            args = command("prepare", "--config", "debug", **gpt2)
            done = subprocess.run([sys.executable, "-c", PEAK, *args], capture_output=True)
            return int(done.stdout.splitlines()[-1]) / 1024

        peaks = {megabytes: measure_peak(megabytes) for megabytes in (100, options.large_mb)}
        source = {"source": str(folder / "100.txt"), "cache_dir": f"{folder}/again"}

        def prepare_anew() -> None:
            run = {"data": source, "tokenizer": {"kind": "tiktoken"}, "train": {"epochs": 1}}
            prepare(validate(Document({**run, "optim": {"warmup_steps": 0}})))
            for file in sorted((folder / "again").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()

        def encode_alone() -> None:
            for _ in range(10**8 // len(text)):
                for piece in pieces:
                    encoding.encode_ordinary(piece)

        times = time_interleaved(
            {"tiktoken": encode_alone, "prepare": prepare_anew}, options.repeats
        )
        learn = time_interleaved({"bpe": lambda: train_bpe([text[: 10**6]], 4096)}, options.repeats)
    rates = {who: 100 / statistics.median(seconds) for who, seconds in times.items()}
    yield row(("what", "measured"))
    yield "|---|---:|"
    yield row(("tiktoken, one thread, 100 MB", f"{rates['tiktoken']:.1f} MB/s"))
    yield row(("`prepare`, 100 MB", f"{rates['prepare']:.1f} MB/s"))
    yield row(("ratio", f"{ratio(times, 'tiktoken', 'prepare'):.2f}"))
    for megabytes, peak in peaks.items():
        yield row((f"peak memory, {megabytes:,} MB of text", f"{peak:.0f} MiB"))
    yield row(("a BPE of 4096 from 1 MB", f"{statistics.median(learn['bpe']):.2f} s"))


def bench_numerics(options: argparse.Namespace) -> Iterator[str]:
    """`shakespeare_char_cpu` to its end: torch alone in float32 against what `auto` chooses."""
    ways: tuple[dict[str, str], ...] = ({"CC": "none"}, {})
    plain = {"dtype": "float32", "attention": "math"}
    yield row(("seed", "float32 on torch alone", "auto", "difference"))
    yield "|---|---:|---:|---:|"
    differences = []
    for seed in (1337, 1, 2)[: options.seeds]:
        losses = []
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                places = {"data.source": options.text, "data.cache_dir": f"{folder}/cache"}
                sets = {
                    "seed": seed,
                    "train.eval_interval": 2000,
                    **places,
                    **(plain if way else {}),
                }
                out = ("--out-dir", f"{folder}/run")
                args = command("train", "--config", "shakespeare_char_cpu", *out, **sets)
                subprocess.run(args, check=True, capture_output=True, env={**os.environ, **way})
                summary = json.loads(Path(folder, "run", "summary.json").read_text())
                losses.append(summary["val_loss"])
        differences.append(losses[1] - losses[0])
        yield row((str(seed), *(f"{loss:.4f}" for loss in losses), f"{differences[-1]:+.4f}"))
    yield row(("mean", "", "", f"{statistics.mean(differences):+.4f}"))


def bench_start(options: argparse.Namespace) -> Iterator[str]:
    """Whole processes, from their start to their end, or to the line of their first update."""
    times: dict[str, list[float]] = {}

    def time_first_update(folder: str, name: str) -> float:
        sets = {"data.cache_dir": f"{folder}/cache", "train.log_interval": 1}
        out = ("--out-dir", f"{folder}/{name}")
        args = command("train", "--config", "debug", "--config", "quickstart", *out, **sets)
        return next(s for s, line in time_lines(args) if line.startswith("step "))

    bad = command("config", "check", "--config", "quickstart", **{"optim.lr": -1})
    for _ in range(options.repeats):
        for name, args in (("--help", command("--help")), ("a config error", bad)):
            began = time.perf_counter()
            subprocess.run(args, capture_output=True)
            times.setdefault(name, []).append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder:
            for name in ("quickstart's first update, nothing cached", "again, text tokenized"):
                times.setdefault(name, []).append(time_first_update(folder, name[:5]))
    yield row(("what", "seconds"))
    yield "|---|---:|"
    for name, seconds in times.items():
        yield row((name, f"{statistics.median(seconds):.2f}"))


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "train": bench_train,
    "quality": bench_quality,
    "target": bench_target,
    "loops": bench_loops,
    "sites": bench_sites,
    "busy": bench_busy,
    "compiler": bench_compiler,
    "quickstart": bench_quickstart,
    "generate": bench_generate,
    "prepare": bench_prepare,
    "serve": bench_serve,
    "soak": bench_soak,
    "start": bench_start,
    "minutes": bench_minutes,
    "memory": bench_memory,
    "growth": bench_growth,
    "numerics": bench_numerics,
}


def write_section(name: str, lines: list[str]) -> None:
    """Replace what stands between the marks of a section, on the page that has them."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pages = {page: page.read_text() for page in DOCS.glob("*.md")}
    page, text = next((page, text) for page, text in pages.items() if marks[0] in text)
    before, rest = text.split(marks[0])
    _, after = rest.split(marks[1])
    page.write_text("\n".join([before + marks[0], *lines, marks[1] + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large-mb", type=int, default=2000, help="of text, for prepare's memory")
    parser.add_argument("--text", type=Path, default=Path("tinyshakespeare.txt"))
    parser.add_argument("--short", type=Path, default=Path("the-verdict.txt"), help="20 kB")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of it, which quality trains with")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 20], help="of quality")
    parser.add_argument("--lesser", action="store_true", help="as on a processor with AVX2 alone")
    parser.add_argument("--write", action="store_true", help="into the pages of docs/")
    options = parser.parse_args()
    if options.lesser and os.environ.get("CC") != LESSER["CC"]:  # before torch is loaded
        again = subprocess.run([sys.executable, *sys.argv], env={**os.environ, **LESSER})
        sys.exit(again.returncode)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    options.text = options.text.resolve()
    for name in options.section or SECTIONS:
        lesser = " --lesser" * options.lesser
        asked = (
            f"`scripts/bench.py {name}{lesser} --repeats {options.repeats} --seeds {options.seeds}`"
        )
        stamp = f"{asked}, {datetime.date.today()}, {describe_machine()}"
        print(f"\n{stamp}\n", flush=True)
        lines = [stamp, ""]
        for line in SECTIONS[name](options):
            print(line, flush=True)
            lines.append(line)
        if options.write:
            write_section(name + "-avx2" * options.lesser, lines)


if __name__ == "__main__":
    main()
