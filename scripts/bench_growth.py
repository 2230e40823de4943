"""Memory and growth of an update, each measured in a process of its own; a part of bench.py."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_peers import DROPOUT, GPT2, hugging_face_update, row, trainer

from gptlite.config.run import ModelConfig
from gptlite.planning.memory import keep_freed, training_bytes
from gptlite.planning.plan import flops_per_token


def measure_away(**what: Any) -> dict[str, float]:
    """Peak memory and seconds of an update, in a process of its own."""
    args = [sys.executable, __file__, json.dumps(what)]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(what: dict[str, Any]) -> dict[str, float]:
    """The other side of `measure_away`."""
    vocab_size, n = what.pop("vocab_size", 65), what.pop("n", 2)
    batch = what.pop("batch_size")
    peer, top = what.pop("peer", None), what.pop("top", {})
    shape = {
        "model": {**what, "bias": False},
        "train": {"batch_size": batch, **top.pop("train", {})},
    }
    if peer is not None:
        update, estimate = hugging_face_update(shape, peer, vocab_size), 0
    else:
        keep_freed()
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(
                shape,
                Path(folder),
                dropout=top.pop("dropout", DROPOUT),
                vocab_size=vocab_size,
                **top,
            )
        size = made.run.train.micro_batch_size
        assert isinstance(size, int)
        estimate = training_bytes(made.run, vocab_size, size, made.run.train.recompute is True)
        update = partial(next, made.updates(made.max_steps))
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(n + 1):
        began = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gib = {"peak": peak / 2**20, "empty": empty / 2**20, "estimate": estimate / 2**30}
    return {**gib, "seconds": statistics.median(seconds[1:])}


def bench_memory(options: argparse.Namespace) -> Iterator[str]:
    """Peak resident memory of a process that makes updates; the imports alone take 0.35 GiB."""
    gpu = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "batch_size": 16}
    large = {**GPT2, "batch_size": 4, "vocab_size": 50257, "n": 1}
    no_weights = {"dropout": {"preset": "none", "sites": {"embedding": 0.1}}}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "HF GPT-2, float32": ("gpu", {**gpu, "peer": "float32"}),
        "HF GPT-2, bfloat16": ("gpu", {**gpu, "peer": "bfloat16"}),
        "gptlite": ("gpu", gpu),
        "gptlite, recompute": ("gpu", {**gpu, "top": {"train": {"recompute": True}}}),
        "gptlite, dropout at four places": ("124 M, 4 x 1024", large),
        "gptlite, no dropout of weights": ("124 M, 4 x 1024", {**large, "top": no_weights}),
        "gptlite, memory_gib: 4": (
            "124 M, 4 x 1024",
            {**large, "top": {"train": {"memory_gib": 4.0}}},
        ),
    }
    yield row(("shape", "who", "peak, GiB", "estimate of `plan`, GiB", "seconds an update"))
    yield "|---|---|---:|---:|---:|"
    for who, (name, what) in cases.items():
        got = measure_away(**what)
        estimate = f"{got['estimate']:.2f}" if got["estimate"] else ""
        yield row((name, who, f"{got['peak']:.2f}", estimate, f"{got['seconds']:.2f}"))


def bench_growth(options: argparse.Namespace) -> Iterator[str]:
    """One size at a time away from 4 layers, 128 wide, context 128, batch 8, vocabulary 512."""
    base = {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "context_length": 128,
        "batch_size": 8,
        "vocab_size": 512,
    }
    sizes: dict[str, tuple[int, ...]] = {
        "context_length": (64, 128, 256, 512, 1024, 2048),
        "n_embd": (64, 128, 256, 512, 1024),
        "n_layer": (2, 4, 8, 16, 32),
        "batch_size": (4, 8, 16, 32, 64),
        "vocab_size": (128, 512, 2048, 8192, 32768),
    }
    yield row(
        (
            "changed",
            "to",
            "ms an update",
            "times the one before",
            "FLOP, times the one before",
            "memory above the imports, MiB",
            "times the one before",
        )
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, values in sizes.items():
        before: dict[str, float] = {}
        for value in values:
            what = {**base, name: value, "n": options.repeats}
            got = measure_away(**what, top={"dtype": "bfloat16"})
            vocabulary = what["vocab_size"]
            model = ModelConfig.model_validate(
                {k: what[k] for k in ("n_layer", "n_head", "n_embd", "context_length")}
            )
            run: Any = SimpleNamespace(model=model)
            now = {
                "ms": 1e3 * got["seconds"],
                "flops": flops_per_token(run, vocabulary)
                * what["batch_size"]
                * what["context_length"],
                "MiB": 1024 * (got["peak"] - got["empty"]),
            }
            times = {key: f"{now[key] / before[key]:.1f}" if before else "" for key in now}
            yield row(
                (
                    name,
                    str(value),
                    f"{now['ms']:.1f}",
                    times["ms"],
                    times["flops"],
                    f"{now['MiB']:.0f}",
                    times["MiB"],
                )
            )
            before = now


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(measure(json.loads(sys.argv[1]))))
