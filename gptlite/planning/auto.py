"""What `auto` means on this machine: each choice with its reason, overridable by name.

Resolving a run twice on one machine gives the same run, except `attention` and `dtype`, which are
timed on CPUs; the resolved values are saved with the run, so a resumed run never asks again.
"""

import math
import os
import shutil
import sys
import sysconfig
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptlite.config.contradictions import fused_cannot_drop
from gptlite.config.run import RunConfig
from gptlite.core import loops
from gptlite.core.device import cost_of, pick_device, precisions, usable_threads, use_threads
from gptlite.core.dropout import site_maker
from gptlite.core.masks import mask_keys, sample_keys
from gptlite.core.model import Block, Scene, angles
from gptlite.core.precision import HALF
from gptlite.core.world import ALONE, World
from gptlite.errors import ConfigError
from gptlite.planning import memory
from gptlite.planning.regularisation import pick_rate

BF16_GAIN = 1.1
"""A block must be this much faster in bfloat16 to be worth its rounding."""
TIMED_TOKENS = 1024
TIMED_SECONDS = 0.3
OLDEST_FOR_TRITON = (7, 0)
"""Compute capability from which on Triton makes kernels."""


def resolve_run(
    run: RunConfig,
    *,
    vocab_size: int,
    n_rows: int,
    world: World = ALONE,
    own: set[str] | None = None,
) -> tuple[RunConfig, dict[str, str]]:
    """The run with every `auto` replaced, and for each replaced key why.

    `n_rows` is the number of rows in an epoch, `own` the precisions that all ranks have. Raises
    ConfigError for what this machine lacks.
    """
    reasons: dict[str, str] = {}
    top: dict[str, Any] = {}
    train: dict[str, Any] = {}
    top["device"], why = pick_device(run.device)
    if run.device == "auto":
        reasons["device"] = f"{top['device']}: {why}"
    device = torch.device(top["device"])
    if run.train.threads == "auto":
        train["threads"] = usable_threads()
        reasons["train.threads"] = f"{train['threads']}: the cores that this process may use"
    use_threads(run.model_copy(update={"train": run.train.model_copy(update=train)}))
    n_steps = run.planned_steps(n_rows)
    epochs = n_steps * run.train.batch_size / n_rows
    if run.dropout.rate == "auto":
        rate, why = pick_rate(epochs)
        reasons["dropout.rate"] = f"{rate:g}: {why}"
        run = run.model_copy(update={"dropout": run.dropout.model_copy(update={"rate": rate})})
    if device.type == "cpu" and (why := loops.why_not()):
        reasons["loops"] = f"none: {why}; torch alone is slower"
    chosen, why_chosen = pick_kernels(run, device, own, world)
    top |= chosen
    reasons |= why_chosen
    run = run.model_copy(update=top)
    if problems := [f"{key}: {why}" for key, why in fused_cannot_drop(run)]:
        raise ConfigError(*problems)
    if run.dropout.masks == "auto" and any(run.dropout.rates().values()):
        reasons["dropout.masks"] = describe_masks(run, device)
    if world.size > 1:
        run, reasons["distributed.engine"] = pick_engine(run, vocab_size, device, world)
        check_ranks(run, world.size)  # once more, as float16 may have been chosen
    top["compile"], why = pick_compile(run, device, n_steps)
    if run.compile == "auto":
        reasons["compile"] = why
    run = run.model_copy(update={"compile": top["compile"]})  # a compiled loss takes more memory
    micro_batch, why_micro_batch = pick_micro_batch(run, vocab_size, device, world)
    train |= micro_batch
    reasons |= why_micro_batch
    if run.train.early_stop == "auto":
        train["early_stop"] = 10 if epochs > 2 else "never"
        reasons["train.early_stop"] = f"{train['early_stop']}: {epochs:.1f} epochs planned"
    resolved = run.model_copy(update={**top, "train": run.train.model_copy(update=train)})
    return resolved, reasons


def pick_micro_batch(
    run: RunConfig, vocab_size: int, device: torch.device, world: World
) -> tuple[dict[str, Any], dict[str, str]]:
    """How a batch is split, and whether activations are made again; with reasons."""
    size, recompute, why = memory.fit_micro_batch(run, vocab_size, device, world)
    train: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if run.train.micro_batch_size == "auto":
        train["micro_batch_size"], reasons["train.micro_batch_size"] = size, f"{size}: {why}"
    if run.train.recompute == "auto":
        train["recompute"] = recompute
        needed = f"true: {size} sequences at a time would not fit else"
        reasons["train.recompute"] = needed if recompute else "false: fits"
    return train, reasons


def check_ranks(run: RunConfig, ranks: int) -> None:
    """Raises ConfigError for what several processes cannot do together."""
    if ranks == 1:
        return
    batch, engine = run.train.batch_size, run.distributed.engine
    problems = []
    if batch % ranks:
        near = [n for n in (batch // ranks * ranks, -(-batch // ranks) * ranks) if n]
        fits = " or ".join(map(str, near))
        problems.append(f"train.batch_size: {ranks} processes do not divide {batch}; set {fits}")
    if run.device.startswith(("cuda:", "mps")):
        problems.append(f"device: {run.device} is one for {ranks} processes; set cuda or cpu")
    if engine == "fsdp" and run.optim.name == "muon":
        problems.append("distributed.engine: fsdp splits the whole matrices muon needs; set ddp")
    if engine == "fsdp" and run.dtype == "float16":
        problems.append(
            "distributed.engine: fsdp splits gradients, which float16 checks whole; set ddp"
        )
    if engine == "fsdp" and run.compile is True:
        problems.append("distributed.engine: fsdp is not tested with compile: true; set ddp")
    if problems:
        raise ConfigError(*problems)


def pick_engine(
    run: RunConfig, vocab_size: int, device: torch.device, world: World
) -> tuple[RunConfig, str]:
    """The run with its engine, and why: whole models as long as they fit."""
    asked = run.distributed.engine
    runs = {
        engine: run.model_copy(
            update={"distributed": run.distributed.model_copy(update={"engine": engine})}
        )
        for engine in ("ddp", "fsdp")
    }
    if asked != "auto":
        return runs[asked], f"{asked}: asked for"
    if run.optim.name == "muon" or run.compile is True:
        return runs["ddp"], "ddp: whole matrices"
    if run.dtype == "float16":
        return runs["ddp"], "ddp: whole gradients, which float16 checks"
    try:
        memory.fit_micro_batch(runs["ddp"], vocab_size, device, world)
    except ConfigError:
        return runs["fsdp"], "fsdp: the whole model does not fit into each process"
    return runs["ddp"], "ddp: the whole model fits into each process"


def check_warmup(run: RunConfig, n_rows: int) -> None:
    """Raises ConfigError if warm-up would take all updates of `train.epochs`, whose number is known
    only now; of `train.max_steps` it is known from the config."""
    steps, warmup = run.planned_steps(n_rows), run.optim.warmup_steps
    if run.train.epochs is not None and warmup >= steps:
        raise ConfigError(
            f"optim.warmup_steps: {warmup} is not below the {steps} updates that train.epochs "
            f"{run.train.epochs:g} makes of this text; set fewer, or more epochs"
        )


def pick_kernels(
    run: RunConfig, device: torch.device, own: set[str] | None = None, world: World = ALONE
) -> tuple[dict[str, Any], dict[str, str]]:
    """Attention and dtype, by rule on GPUs, by timing a block on CPUs; with reasons."""
    if run.attention == "fused" and (device.type != "cpu" or loops.library() is None):
        why = loops.why_not() if device.type == "cpu" else f"device is {device}"
        raise ConfigError(f"attention: fused needs a CPU and a C compiler: {why}; set auto")
    if run.attention == "fused" and run.dtype == "float16":
        raise ConfigError("attention: fused knows no float16; set auto")
    kernels, why_kernel = usable_kernels(run, device)
    dtypes, why_dtype = precisions(device, own)
    if dtypes == ["float16"] and world.size > 1 and run.distributed.engine == "fsdp":
        dtypes, why_dtype = ["float32"], "fsdp splits gradients, which float16 checks whole"
    kernels = kernels if run.attention == "auto" else [run.attention]
    kernels = memory.fitting_kernels(run, kernels, device)
    dtypes = dtypes if run.dtype == "auto" else [run.dtype]
    seconds = {(kernel, dtype): 0.0 for kernel in kernels for dtype in dtypes}
    if len(seconds) > 1:
        seconds = time_blocks(run, list(seconds))
        timed = {k: min(s for (one, _), s in seconds.items() if one == k) for k in kernels}
        why_kernel = "fastest of " + ", ".join(f"{k} {1e3 * s:.3g} ms" for k, s in timed.items())
        best = [min(s for (_, d), s in seconds.items() if d == one) for one in dtypes]
        if len(dtypes) == 2:
            why_dtype = f"a block timed {best[0] / best[1]:.2f}x as fast in bfloat16"
            dtypes = ["bfloat16" if best[0] / best[1] >= BF16_GAIN else "float32"]
    dtype = dtypes[0]
    kernel = min(kernels, key=lambda one: seconds[one, dtype])
    chosen, reasons = {"attention": kernel, "dtype": dtype}, {}
    if run.attention == "auto":
        reasons["attention"] = f"{kernel}: {why_kernel}"
    if run.dtype == "auto":
        reasons["dtype"] = f"{dtype}: {why_dtype}"
    elif (cost := cost_of(run.dtype, device)) is not None:
        reasons["dtype"] = f"{dtype}: asked for, though {cost}"
    elif own is not None and run.dtype not in own:
        reasons["dtype"] = f"{dtype}: asked for, though another rank has no {dtype} products"
    return chosen, reasons


def usable_kernels(run: RunConfig, device: torch.device) -> tuple[list[str], str]:
    """Kernels that can do what the rates ask for."""
    drops = run.dropout.rates()["attention_weights"] > 0
    if device.type == "cpu":
        if drops and run.dropout.masks == "native":
            return ["math"], "no fused CPU kernel drops attention weights by torch's masks"
        plain = ["math"] if loops.library() is None or run.dtype == "float16" else ["fused"]
        if not drops:
            return [*plain, "sdpa"], ""
        alone = plain == ["fused"] and not loops.has_threads()
        return [*plain, *(["math"] if alone else [])], "drops attention weights by keyed masks"
    if device.type == "cuda" and drops and run.dropout.masks != "keyed":
        return ["sdpa"], "torch's fused kernel, which drops attention weights by itself"
    if drops:
        return ["math"], "no fused kernel drops attention weights by keyed masks"
    return ["sdpa"], "torch's fused kernel"


def time_blocks(run: RunConfig, ways: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Forward and backward of one block for each (attention, dtype), interleaved: the shortest."""
    model, dropout = run.model, run.dropout
    rows = max(1, min(run.train.batch_size, TIMED_TOKENS // model.context_length))
    position = torch.arange(model.context_length)[None]
    keys = mask_keys(sample_keys(0, 0, np.arange(rows)), position, None)
    rotation = angles(position, model) if model.position == "rope" else None
    steps = {}
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(rows, model.context_length, model.n_embd, requires_grad=True)
        for way in ways:
            site = site_maker(dropout, model.n_layer, model.n_head, way[0])
            block = Block(model, site, 0, way[0]).train()
            scene = Scene(None, rotation, keys)
            steps[way] = partial(forward_and_backward, block, x, scene, way[1])
        shortest = dict.fromkeys(ways, math.inf)
        began = time.perf_counter()
        for turn in range(10):
            for way, step in steps.items():
                start = time.perf_counter()
                step()
                if turn:
                    shortest[way] = min(shortest[way], time.perf_counter() - start)
            if turn > 1 and time.perf_counter() - began > TIMED_SECONDS:
                break
    return shortest


def forward_and_backward(block: Block, x: torch.Tensor, scene: Scene, dtype: str) -> None:
    """On the CPU, in this precision."""
    with torch.autocast("cpu", HALF.get(dtype), enabled=dtype in HALF):
        y = block(x, scene, None)
    y.backward(x.detach())


def describe_masks(run: RunConfig, device: torch.device) -> str:
    native = run.dropout.native_sites(run.attention)
    if native:
        return f"keyed, except {', '.join(native)}: native, inside the fused kernel"
    if device.type == "cpu":
        loop = loops.library() is not None and run.dtype != "float16"
        return f"keyed, by {'a compiled loop' if loop else 'torch'}"
    return "keyed"


def pick_compile(run: RunConfig, device: torch.device, n_steps: int) -> tuple[bool, str]:
    broken = device.type == "cuda" and bool(run.dropout.native_sites(run.attention))
    lacks = missing_to_compile(device)
    if run.compile is True and broken:
        raise ConfigError(
            "compile: true with native dropout on CUDA is refused: compiled torch dropout can "
            "give neighbouring channels one mask (pytorch issue 198333); set dropout.masks: keyed"
        )
    if run.compile is True and lacks:
        raise ConfigError(f"compile: true needs {lacks}; set false")
    if run.compile != "auto":
        return bool(run.compile), "asked for"
    if device.type != "cuda":
        return False, "false: compiling takes longer than it saves on small CPU runs"
    if broken:
        return False, "false: compiled native dropout is wrong on CUDA (pytorch issue 198333)"
    if run.distributed.engine == "fsdp":
        return False, "false: not tested with distributed.engine: fsdp"
    if n_steps < 500:
        return False, f"false: {n_steps} updates do not repay compiling"
    if lacks:
        return False, f"false: needs {lacks}"
    return True, "true: CUDA and a run long enough to repay it"


def missing_to_compile(device: torch.device) -> str | None:
    """What torch.compile needs for a device and this machine lacks; without it the first update
    would fail.

    For a CPU torch writes C++, for CUDA it calls Triton, which builds its launcher in C; both
    include Python.h. They take one program from CXX or CC and look for no other if it is set.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton"
        if torch.cuda.get_device_capability(device) < OLDEST_FOR_TRITON:
            return "a GPU of compute capability 7.0 or more (Triton)"
        compilers, what = compilers_from("CC", "gcc", "clang"), "a C compiler (gcc or clang, or CC)"
    elif device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compilers, what = compilers_from("CXX", usual), f"a C++ compiler ({usual}, or CXX)"
    else:
        return None
    if not any(map(shutil.which, compilers)):
        return what
    # A framework's Python on macOS keeps its headers elsewhere, where torch looks too.
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if sys.platform != "darwin" and not headers.is_file():
        return f"Python's headers ({headers}; Debian and Ubuntu: python3-dev)"
    return None


def compilers_from(variable: str, *usual: str) -> tuple[str, ...]:
    """The program that the user names in the environment, or the usual ones."""
    return (os.environ[variable],) if variable in os.environ else usual
