"""What bench.py, its parts and bench_dropout.py share: the peer, its update and gptlite's.

Each update is timed in a process of its own.
"""

import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from gptlite.config.reader import validate
from gptlite.config.strict_yaml import Document
from gptlite.core.device import cpu_has_bfloat16
from gptlite.core.train import Trainer
from gptlite.data.batches import batch_at
from gptlite.data.prepare import prepare
from gptlite.planning import auto
from gptlite.planning.memory import keep_freed

LESSER = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CC": "cc -march=x86-64-v3",
}
"""The environment in which a processor with AVX-512 works as one that has AVX2 and no more."""
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
NANOGPTS = ("embedding", "attention_weights", "attention_output", "mlp_output")
DROPOUT = {"preset": "none", "sites": dict.fromkeys(NANOGPTS, 0.2)}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def time_interleaved(todo: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
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


def describe_machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor()
    has = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" * cpu_has_bfloat16())
    lesser = " (emulated)" if os.environ.get("ATEN_CPU_CAPABILITY") else ""
    return f"{cpu}, {has}{lesser}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
    resolved, _ = auto.resolve_run(run, vocab_size=vocab_size, n_rows=rows.n_rows)
    return Trainer(resolved, rows, files.meta["vocab_size"])


def hugging_face(model: dict[str, int], vocab_size: int, rate: float = 0.2) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {key: model[key] for key in ("n_layer", "n_head", "n_embd")}
    more: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    more |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=model["context_length"], **sizes, **more)
    )


def hugging_face_update(
    shape: dict[str, Any], dtype: str, vocab_size: int = 65
) -> Callable[[], None]:
    """An update as people write it: forward, backward, clipping, AdamW."""
    model = hugging_face(shape["model"], vocab_size).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    sizes = shape["train"]["batch_size"], shape["model"]["context_length"]
    ids = torch.randint(0, vocab_size, sizes)

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        loss.item()

    return update


def gptlite_update(
    shape: dict[str, Any],
    *,
    loop: bool = True,
    compiler: bool = True,
    threads: int | None = None,
    **top: Any,
) -> Callable[[], Any]:
    """An update as `gptlite train` makes it; without its loop the same batch again and again."""
    if threads is not None:
        shape = {**shape, "train": {**shape["train"], "threads": threads}}
    if not compiler:
        os.environ["CC"] = "none"
    keep_freed()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(shape, Path(folder), **top)
    if loop:
        return partial(next, made.updates(made.max_steps))
    batch = batch_at(made.rows, seed=0, step=0, batch_size=made.run.train.batch_size)

    def update() -> None:
        made.accumulate(batch).item()
        clip_grad_norm_(made.parameters, 1.0).item()
        made.optimizer.step(1e-3)
        made.optimizer.zero_grad()

    return update


def matmul(dtype: torch.dtype, n: int = 1024) -> Callable[[], Any]:
    """Eight products of n cubed."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return lambda: [a @ b for _ in range(8)]


class Away:
    """Something to time in a process of its own, as its users run it: `calls` in a row, as caches
    and clocks are in a real run. Returns the seconds of one."""

    def __init__(
        self, make: Callable[..., Callable[[], Any]], *args: Any, calls: int = 1, **more: Any
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, make, args, more, calls), daemon=True).start()
        self.pipe.recv()  # ready: what `auto` times must have the machine for itself

    def __call__(self) -> float:
        time.sleep(0.01)  # until the threads of the one before have stopped waiting for work
        self.pipe.send("again")
        return float(self.pipe.recv())

    def stop(self) -> None:
        self.pipe.send("stop")


def serve(
    pipe: Any, make: Callable[..., Callable[[], Any]], args: Any, more: Any, calls: int
) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    run = make(*args, **more)
    run()
    pipe.send("ready")
    while pipe.recv() == "again":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        pipe.send((time.perf_counter() - began) / calls)


def time_in_turn(
    todo: Mapping[str, Away], repeats: int, *, stop: bool = True
) -> dict[str, list[float]]:
    """Seconds of every repeat, interleaved, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for repeat in range(repeats + 2):
        for name, run in todo.items():
            seconds = run()
            if repeat > 1:
                times[name].append(seconds)
    for run in todo.values() if stop else ():
        run.stop()
    return times
