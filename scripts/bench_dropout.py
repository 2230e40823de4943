#!/usr/bin/env python
"""What dropout costs: one site, a whole update, and the generators a mask could be drawn with.

Everything is timed interleaved in one run; figures are medians, ratios medians of the ratios within
a repeat. Prints Markdown: .venv/bin/python scripts/bench_dropout.py [--repeats N]
"""

import argparse
import ctypes
import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite import auto, loops, masks
from gptlite.config_reader import validate
from gptlite.masks import GAMMA, Mask, mix
from gptlite.prepare import prepare
from gptlite.strict_yaml import Document
from gptlite.train import Trainer

SITE = (64, 1024, 384)  # 25.2 M values
SIX = (
    *("embedding", "attention_weights", "attention_context"),
    *("attention_output", "mlp_activation", "mlp_output"),
)
SHAPES: dict[str, dict[str, Any]] = {
    "cpu: 4 layers, 4 heads, 128 wide, context 64, batch 12": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 64, "bias": False},
        "train": {"batch_size": 12},
    },
    "gpu: 6 layers, 6 heads, 384 wide, context 256, batch 16": {
        "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "bias": False},
        "train": {"batch_size": 16},
    },
}


def interleaved(todo: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, each after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for repeat in range(repeats + 1):
        for name, run in todo.items():
            began = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def instead(run: Callable[[], Any], **replaced: Callable[..., Any]) -> Callable[[], None]:
    """The same with other functions in masks.py."""

    def changed() -> None:
        meant = {name: getattr(masks, name) for name in replaced}
        try:
            for name, function in replaced.items():
                setattr(masks, name, function)
            run()
        finally:
            for name, function in meant.items():
                setattr(masks, name, function)

    return changed


def without_compiler(run: Callable[[], Any]) -> Callable[[], None]:
    return instead(run, built=lambda x, dtype: False)


def copying(run: Callable[[], Any]) -> Callable[[], None]:
    """Copies every tensor where it would drop: what a pass over the memory costs."""
    return instead(run, compiled=lambda x, mask, dtype: x.to(dtype, copy=True))


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, as it does anyway for tensors below 32 MB."""
    try:
        return bool(ctypes.CDLL(None).mallopt(-3, 1 << 30) and ctypes.CDLL(None).mallopt(-1, -1))
    except (OSError, AttributeError):
        return False


def there_and_back(drop: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(drop(x), x, gradient)


def bench_site(repeats: int, memory: str) -> Iterator[str]:
    """Forward and backward of one site at p = 0.1 against torch's."""
    keys = torch.randint(-(2**62), 2**62, SITE[:2])
    mask = Mask(keys, torch.zeros(1, dtype=torch.int64), masks.cut_of(0.1))
    keyed = partial(masks.drop, mask=mask)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SITE).to(dtype).requires_grad_()
        run = partial(there_and_back, x=x, gradient=torch.randn(SITE).to(dtype))
        todo: dict[str, Callable[[], Any]] = {
            "F.dropout": partial(run, partial(F.dropout, p=0.1)),
            "keyed, no compiler": without_compiler(partial(run, keyed)),
        }
        if loops.library():
            todo["keyed, C loop"] = partial(run, keyed)
        if auto.has_cpp_compiler():
            in_graph = mask._replace(cut=torch.tensor(mask.cut))
            todo["keyed, torch.compile"] = partial(
                run, partial(torch.compile(masks.drop, dynamic=False), mask=in_graph)
            )
            todo["keyed, torch.compile"]()
            time.sleep(3)  # until the compiler's helpers have gone
        times = interleaved(todo, repeats)
        for way, seconds in times.items():
            faster = f"{ratio(times, 'F.dropout', way):.1f}x"
            cells = (memory, str(dtype).removeprefix("torch."), way, milliseconds(seconds), faster)
            yield row(cells)


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def trainer(shape: dict[str, Any], folder: Path, *, vocab_size: int = 65, **top: Any) -> Trainer:
    """A trainer on random characters, as many different ones as the vocabulary has."""
    text = folder / "text.txt"
    if not text.exists():
        letters = np.random.default_rng(0).permutation(np.arange(300_000) % vocab_size)
        text.write_text("".join(chr(33 + n if n < 5000 else 0x10000 + n) for n in letters))
    run = validate(
        Document(
            {
                "data": {"source": str(text), "cache_dir": str(folder / "cache")},
                "tokenizer": {"kind": "char"},
                "device": "cpu",
                **shape,
                "train": {**shape["train"], "max_steps": 10_000},
                **top,
            }
        )
    )
    files = prepare(run)
    rows = files.rows("train", run.model.context_length)
    return Trainer(auto.resolve(run, vocab_size=vocab_size, n_rows=rows.n_rows)[0], files)


def bench_update(repeats: int, folder: Path) -> Iterator[str]:
    """A whole update: batch, forward, backward, clipping, AdamW."""
    none, six = {"preset": "none"}, {"preset": "none", "sites": dict.fromkeys(SIX, 0.2)}
    runs: dict[str, dict[str, Any]] = {
        "rate 0, math attention": {"dropout": none, "attention": "math"},
        "rate 0, sdpa attention": {"dropout": none, "attention": "sdpa"},
        "six sites at 0.2": {"dropout": six},
        "six sites, copying only": {"dropout": six},
        "six sites, no compiler": {"dropout": six},
        "six sites, native (torch's)": {"dropout": {**six, "masks": "native"}},
    }
    for shape, sections in SHAPES.items():
        n = 8 * repeats if shape.startswith("cpu") else repeats
        for dtype in ("float32", "bfloat16"):
            todo: dict[str, Callable[[], Any]] = {}
            for name, top in runs.items():
                made = trainer(sections, folder, dtype=dtype, **top)
                todo[name] = partial(next, made.updates(made.max_steps))
            for name, change in {"copying only": copying, "no compiler": without_compiler}.items():
                todo[f"six sites, {name}"] = change(todo[f"six sites, {name}"])
            times = interleaved(todo, n)
            base = min(list(runs)[:2], key=lambda name: statistics.median(times[name]))
            for name, seconds in times.items():
                more = f"{100 * (ratio(times, name, base) - 1):+.1f} %" if name != base else "base"
                yield row((shape.partition(":")[0], dtype, name, milliseconds(seconds), more))


def fmix32(x: Tensor) -> Tensor:
    """murmur3's finaliser: two draws a word."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51CB
    return x ^ (x >> 16 & 0xFFFF)


def philox(x: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011), eight draws a block, a 32-bit number per int64."""
    low, a, b = 0xFFFFFFFF, x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF
    c, d, k, m = torch.zeros_like(x), torch.zeros_like(x), 0x1234567, 0x89ABCDE
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32 & low) ^ b ^ k, q & low, (p >> 32 & low) ^ d ^ m, p & low
        k, m = (k + 0x9E3779B9) & low, (m + 0xBB67AE85) & low
    return a << 32 | b, c << 32 | d


def bench_generators(repeats: int) -> Iterator[str]:
    """25 M draws of 16 bits, a tile that fits the caches at a time."""
    draws, tile = 25_000_000, 1 << 19
    words = torch.arange(tile // 4) * GAMMA
    halves, blocks = torch.arange(tile // 2, dtype=torch.int32), torch.arange(tile // 8)
    out, source = torch.empty(tile // 4, dtype=torch.int64), np.random.Philox(0)
    generators: dict[str, tuple[Callable[[], Any], str]] = {
        "splitmix64, 4 draws a word": (partial(mix, words), "BigCrush (Steele 2014)"),
        "murmur3 fmix32, 2 draws a word": (partial(fmix32, halves), "only 32 bits of key"),
        "Philox4x32-10, 8 draws a block": (
            partial(philox, blocks),
            "BigCrush (Salmon 2011)",
        ),
        "numpy's Philox, 1 thread": (
            partial(source.random_raw, tile // 4),
            "not in a torch graph",
        ),
        "torch's mt19937, 1 thread": (out.random_, "has a state instead of a key"),
    }

    def all_tiles(make: Callable[[], Any]) -> None:
        for _ in range(draws // tile):
            make()

    todo = {name: partial(all_tiles, make) for name, (make, _) in generators.items()}
    for name, seconds in interleaved(todo, repeats).items():
        rate = f"{draws / statistics.median(seconds) / 1e9:.2f}"
        yield row((name, rate, generators[name][1]))


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"`scripts/bench_dropout.py --repeats {repeats}`, {datetime.date.today()}, {machine()}\n")
    head = (
        "memory",
        "values",
        "one site, 25.2 M values, p = 0.1",
        "forward + backward, ms",
        "faster",
    )
    print(row(head) + "\n|---|---|---|---:|---:|")
    show(bench_site(repeats, "fresh from the system"))
    if keep_freed_memory():
        show(bench_site(repeats, "kept by the allocator"))
    print("\n| shape | dtype | whole update | ms | more than rate 0 |\n|---|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        show(bench_update(repeats, Path(folder)))
    print("\n| generator | G draws/s | |\n|---|---:|---|")
    show(bench_generators(repeats))


def show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
