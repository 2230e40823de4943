#!/usr/bin/env python
"""What dropout costs: one site, a whole update, and the generators a mask could be drawn with.

Everything is timed interleaved in one run; figures are medians, ratios medians of the ratios within
a repeat. Prints Markdown: .venv/bin/python scripts/bench_dropout.py [--repeats N]
"""

import argparse
import ctypes
import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_peers import (
    SHAPES,
    Away,
    describe_machine,
    gptlite_update,
    milliseconds,
    ratio,
    row,
    time_in_turn,
    time_interleaved,
)
from torch import Tensor

from gptlite.core import loops, masks
from gptlite.core.masks import GAMMA, Mask, mix
from gptlite.planning import auto

SITE = (64, 1024, 384)  # 25.2 M values
SIX = (
    *("embedding", "attention_weights", "attention_context"),
    *("attention_output", "mlp_activation", "mlp_output"),
)


def replace(run: Callable[[], Any], **replaced: Callable[..., Any]) -> Callable[[], None]:
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
    return replace(run, has_loop=lambda x, dtype: False)


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, as it does anyway for tensors below 32 MB."""
    try:
        return bool(ctypes.CDLL(None).mallopt(-3, 1 << 30) and ctypes.CDLL(None).mallopt(-1, -1))
    except (OSError, AttributeError):
        return False


def run_both_ways(drop: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(drop(x), x, gradient)


def bench_site(repeats: int, memory: str) -> Iterator[str]:
    """Forward and backward of one site at p = 0.1 against torch's."""
    keys = torch.randint(-(2**62), 2**62, SITE[:2])
    mask = Mask(keys, torch.zeros(1, dtype=torch.int64), masks.cut_of(0.1))
    keyed = partial(masks.drop, mask=mask)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SITE).to(dtype).requires_grad_()
        run = partial(run_both_ways, x=x, gradient=torch.randn(SITE).to(dtype))
        todo: dict[str, Callable[[], Any]] = {
            "F.dropout": partial(run, partial(F.dropout, p=0.1)),
            "keyed, no compiler": without_compiler(partial(run, keyed)),
        }
        if loops.library():
            todo["keyed, C loop"] = partial(run, keyed)
        if auto.missing_to_compile(torch.device("cpu")) is None:
            in_graph = mask._replace(cut=torch.tensor(mask.cut))
            todo["keyed, torch.compile"] = partial(
                run, partial(torch.compile(masks.drop, dynamic=False), mask=in_graph)
            )
            todo["keyed, torch.compile"]()
            time.sleep(3)  # until the compiler's helpers have gone
        times = time_interleaved(todo, repeats)
        for way, seconds in times.items():
            faster = f"{ratio(times, 'F.dropout', way):.1f}x"
            cells = (memory, str(dtype).removeprefix("torch."), way, milliseconds(seconds), faster)
            yield row(cells)


def bench_update(repeats: int) -> Iterator[str]:
    """A whole update: batch, forward, backward, clipping, AdamW."""
    none, six = {"preset": "none"}, {"preset": "none", "sites": dict.fromkeys(SIX, 0.2)}
    runs: dict[str, dict[str, Any]] = {
        "rate 0, fused attention": {"dropout": none, "attention": "fused"},
        "rate 0, sdpa attention": {"dropout": none, "attention": "sdpa"},
        "six sites at 0.2": {"dropout": six},
        "rate 0, no compiler": {"dropout": none, "compiler": False},
        "six sites, no compiler": {"dropout": six, "compiler": False},
        "six sites, native (torch's)": {"dropout": {**six, "masks": "native"}},
    }
    for shape, sections in SHAPES.items():
        calls = 10 if shape.startswith("cpu") else 1
        for dtype in ("float32", "bfloat16"):
            todo = {
                name: Away(gptlite_update, sections, calls=calls, dtype=dtype, **top)
                for name, top in runs.items()
            }
            times = time_in_turn(todo, repeats)
            base = min(list(runs)[:2], key=lambda name: statistics.median(times[name]))
            for name, seconds in times.items():
                against = "rate 0, no compiler" if name == "six sites, no compiler" else base
                more = f"{100 * (ratio(times, name, against) - 1):+.1f} %"
                more = "base" if name == base else more
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
    high = torch.tensor(12345, dtype=torch.int32)
    generators: dict[str, tuple[Callable[[], Any], str]] = {
        "lowbias32 with a second key, 2 draws a word": (
            partial(masks.scramble, halves, high),
            "64 bits of key a row; tests/core/test_masks.py",
        ),
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
    for name, seconds in time_interleaved(todo, repeats).items():
        rate = f"{draws / statistics.median(seconds) / 1e9:.2f}"
        yield row((name, rate, generators[name][1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    torch.manual_seed(0)
    asked = f"`scripts/bench_dropout.py --repeats {repeats}`"
    print(f"{asked}, {datetime.date.today()}, {describe_machine()}\n")
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
    show(bench_update(repeats))
    print("\n| generator | G draws/s | |\n|---|---:|---|")
    show(bench_generators(repeats))


def show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
