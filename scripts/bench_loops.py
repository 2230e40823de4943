"""Each loop of loops.c beside torch, for registers of 16, 32 and 64 bytes; a part of bench.py."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_peers import row
from torch import Tensor

from gptlite.core import device, kernels, loops, masks
from gptlite.core.masks import Mask

LEVELS = {
    "SSE (x86-64-v2)": {"CC": "cc -march=x86-64-v2", "ATEN_CPU_CAPABILITY": "default"},
    "AVX2 (x86-64-v3)": {"CC": "cc -march=x86-64-v3", "ATEN_CPU_CAPABILITY": "avx2"},
    "this processor": {},
}
TURNS = 15


def measure() -> dict[str, list[float]]:
    """Values (for products GB of weights) a second, in billions: of torch, and of the loop."""
    torch.set_num_threads(1)
    x, scores = torch.randn(16, 256, 384), torch.randn(96, 256, 32)
    mask = Mask(torch.randint(-(2**62), 2**62, (16, 256)), torch.zeros(1, dtype=torch.int64), 6554)
    heads = Mask(mask.keys, torch.arange(6), 6554)
    q = scores.view(16, 6, 256, 32)
    weight, rows = torch.randn(4096, 768), torch.randn(8, 768)
    n_weights = 16 * 6 * 256 * 256
    todo: dict[str, tuple[float, Callable[[], Any], Callable[[], Any]]] = {
        "GELU": (x.numel(), partial(F.gelu, x, approximate="tanh"), partial(kernels.gelu, x)),
        "dropout": (x.numel(), partial(F.dropout, x, 0.1), partial(masks.drop, x, mask)),
        "causal attention that drops, weights": (
            n_weights,
            partial(plain_attention, q),
            partial(kernels.causal_attention, q, q, q, heads),
        ),
        **{
            f"product of {n} row{'s' * (n > 1)}, GB": (
                4 * weight.numel(),
                partial(F.linear, rows[:n], weight),
                partial(kernels.few_rows, rows[:n], weight, None),
            )
            for n in (1, 8)
        },
    }
    with torch.no_grad():
        return {
            name: [size / device.shortest(run, TURNS) / 1e9 for run in both]
            for name, (size, *both) in todo.items()
        }


def plain_attention(q: Tensor) -> Tensor:
    """What one writes in torch."""
    past = torch.ones(256, 256, dtype=torch.bool).tril()
    weights = (q @ q.mT * q.shape[-1] ** -0.5).masked_fill(~past, -torch.inf).softmax(-1)
    return F.dropout(weights, 0.1) @ q


def bench_loops(options: argparse.Namespace) -> Iterator[str]:
    """Every level in a process of its own."""
    found = {}
    for name, setting in LEVELS.items():
        command = [sys.executable, __file__]
        done = subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, **setting}
        )
        found[name] = json.loads(done.stdout)
    yield row(("G a second, one thread", *(f"{name}: torch, loop" for name in LEVELS)))
    yield f"|---|{'---:|' * len(LEVELS)}"
    for loop in next(iter(found.values())):
        cells = (
            f"{torch_:.2f}, {ours:.2f}" for torch_, ours in (of[loop] for of in found.values())
        )
        yield row((loop, *cells))


if __name__ == "__main__":
    assert loops.library() is not None
    print(json.dumps(measure()))
