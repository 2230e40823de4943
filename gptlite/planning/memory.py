"""What training takes of a device's memory, by arithmetic, and how a run is made to fit.

The estimate counts what autograd keeps with the kernels of this project; `docs/benchmarks.md` holds
it against measured peaks.
"""

import ctypes
from collections.abc import Iterator

import torch

from gptlite.config.contradictions import largest_size
from gptlite.config.run import ASSUMED_VOCABULARY, RunConfig
from gptlite.core import loops
from gptlite.core.device import GIB, memory_bytes
from gptlite.core.loss import PART_BYTES
from gptlite.core.world import ALONE, World
from gptlite.errors import ConfigError
from gptlite.machine import usable_memory_bytes

TRAINING_BYTES_PER_PARAMETER = 16
"""In float32: weight, gradient and two moments."""
AVERAGE_BYTES_PER_PARAMETER = 4
"""More where weights are averaged."""
PROCESS_BYTES = int(0.35 * GIB)
"""Python, torch and the rest, before anything is trained."""
COMPILER_BYTES = int(0.12 * GIB)
"""What torch.compile adds to that."""
SLACK = 1.1
"""What passes by and is not kept."""
AUTO_SHARE = 0.5
"""Of the device's memory, unless train.memory_gib says how much."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h: free memory at the heap's end above which it is given back, and the size
of a block from which it is mapped by itself, and given back when it is freed."""


def block_bytes(run: RunConfig) -> int:
    """What one block keeps of one token for the backward pass."""
    model, size = run.model, 4 if run.dtype == "float32" else 2
    residual = 4 * 2 * model.n_embd
    heads = model.n_head * model.head_width
    # What matrices read, and the activation's slope.
    read = 2 * model.n_embd + 4 * heads + 2 * model.mlp_width
    loop = run.attention == "fused" and run.compile is not True  # none in a compiled graph
    rows_of_weights = 1 if loop else 0 if run.attention == "sdpa" else 2
    read += rows_of_weights * model.n_head * model.context_length
    return residual + size * read + mask_bytes(run)


def mask_bytes(run: RunConfig) -> int:
    """Masks that a block keeps of one token: torch's own, in the dtype, and keyed ones in float32
    where neither loops.c nor a compiled graph draws them again."""
    model, rates = run.model, run.dropout.rates()
    widths = dict.fromkeys(("attention_output", "mlp_output"), model.n_embd)
    widths["attention_context"] = model.n_head * model.head_width
    widths["mlp_activation"] = model.mlp_width
    if run.attention != "sdpa":
        widths["attention_weights"] = model.n_head * model.context_length
    n_values = sum(width for site, width in widths.items() if rates[site] > 0)
    if run.dropout.masks == "native":
        return n_values * (4 if run.dtype == "float32" else 2)
    loop = run.device == "cpu" and loops.library() is not None
    return 0 if loop or run.compile is True else 4 * n_values


def weight_bytes(run: RunConfig, vocab_size: int, ranks: int) -> int:
    """Weights, gradients and moments of a process; FSDP gathers one block, or what is in none."""
    model, n_parameters = run.model, run.model.n_parameters(vocab_size)
    copies = 0 if run.dtype == "float32" else 2  # of the weights
    kept = TRAINING_BYTES_PER_PARAMETER + AVERAGE_BYTES_PER_PARAMETER * (
        run.train.average != "none"
    )
    if run.distributed.engine != "fsdp" or ranks == 1:
        return n_parameters * (kept + copies)
    blocks = n_parameters - model.model_copy(update={"n_layer": 0}).n_parameters(vocab_size)
    gathered = n_parameters - blocks + 2 * blocks // model.n_layer  # the next is on its way
    return n_parameters * kept // ranks + gathered * (8 + copies)


def logit_bytes(run: RunConfig, vocab_size: int, tokens: int) -> int:
    """What the loss of so many tokens at a time makes.

    All at once: float32 logits, their gradient, and the rounded copy of a dtype of 16 bits. A
    compiled loss makes them so whatever their size. This is the most it takes: where the compiler
    fuses the softmax only logits and gradient in the dtype are left (measured on a CPU: 4 to 8
    bytes a logit in float32, 2 to 4 in bfloat16; `scripts/gpu_check memory` measures a GPU).
    In parts: a few blocks, with those of an evaluation, and the gradient of the output matrix.
    """
    if n_teachers := len(run.distill.teachers):  # all logits of each, and of the student four times
        return (24 + 8 * n_teachers) * vocab_size * tokens
    if run.compile is True or 4 * vocab_size * tokens <= PART_BYTES:
        return 10 * vocab_size * tokens
    return 6 * PART_BYTES + 4 * vocab_size * run.model.n_embd


def training_bytes(
    run: RunConfig, vocab_size: int, rows: int, recompute: bool, ranks: int = 1
) -> int:
    """Peak of an update of `rows` sequences at a time: weights, moments, activations."""
    model = run.model
    tokens = rows * model.context_length
    weights = weight_bytes(run, vocab_size, ranks)
    logits = logit_bytes(run, vocab_size, tokens)
    # Of teachers only their number is known here: they count as if they were as large.
    weights += 4 * len(run.distill.teachers) * model.n_parameters(vocab_size)
    blocks = model.n_layer * block_bytes(run)
    if recompute:
        blocks = 4 * model.n_layer * model.n_embd + 2 * block_bytes(run)
    kept = weights + logits + tokens * (blocks + 16 * model.n_embd)
    return PROCESS_BYTES + COMPILER_BYTES * (run.compile is True) + int(SLACK * kept)


def fit_micro_batch(
    run: RunConfig, vocab_size: int, device: torch.device, world: World = ALONE
) -> tuple[int, bool, str]:
    """(sequences per forward pass, whether to recompute, why): the largest part that fits.

    Raises ConfigError if not even one sequence does.
    """
    total = memory_bytes(device)
    if device.type == "cpu":
        total //= world.here
    budget = total * AUTO_SHARE if run.train.memory_gib == "auto" else run.train.memory_gib * GIB
    for size, recompute in micro_batch_options(run, world.size):
        need = training_bytes(run, vocab_size, size, recompute, world.size)
        if need <= budget:
            return size, recompute, f"about {need / GIB:.2g} of {budget / GIB:.3g} GiB"
    if need <= total and run.train.memory_gib == "auto":
        return size, recompute, f"about {need / GIB:.2g} of {total / GIB:.3g} GiB"
    limit = total if run.train.memory_gib == "auto" else budget
    whose = str(device) if run.train.memory_gib == "auto" else "train.memory_gib"
    count = "one sequence" if size == 1 else f"{size} sequences at a time"
    instead = ", or set compile: false" if run.compile is True else ""
    raise ConfigError(
        f"model: needs about {need / GIB:.2g} GiB to train {count}, {whose} has "
        f"{limit / GIB:.3g}; lower n_layer, n_embd, context_length or micro_batch_size{instead}"
    )


def refuse_too_large(run: RunConfig) -> None:
    """By arithmetic, before any text is read. Raises ConfigError."""
    n_parameters = run.model.n_parameters(ASSUMED_VOCABULARY[run.tokenizer.kind])
    memory, need = usable_memory_bytes(), 4 * n_parameters
    if need > memory:
        key = f"model.{largest_size(run.model)}"
        raise ConfigError(
            f"{key}: would need {n_parameters:.1e} parameters, {need / GIB:,.0f} GiB in float32, "
            f"and this machine has {memory / GIB:.1f}; lower n_layer, n_embd or context_length"
        )


def fitting_kernels(run: RunConfig, kernels: list[str], device: torch.device) -> list[str]:
    """Those of the attention kernels by which at least one sequence can be trained, however it is
    done: `math` and `fused` keep a weight for each pair of positions.

    Raises ConfigError if there is none. By arithmetic, so that no kernel is tried that cannot end.
    """
    vocab_size, total = ASSUMED_VOCABULARY[run.tokenizer.kind], memory_bytes(device)
    smallest = {"dtype": "bfloat16"} if run.dtype == "auto" else {}
    need = {}
    for kernel in kernels:
        one = run.model_copy(update={**smallest, "attention": kernel})
        need[kernel] = training_bytes(one, vocab_size, 1, run.train.recompute is not False)
    fitting = [kernel for kernel in kernels if need[kernel] <= total]
    if not fitting:
        largest = largest_size(run.model)
        raise ConfigError(
            f"model.{largest}: {getattr(run.model, largest)} needs about "
            f"{min(need.values()) / GIB:,.0f} GiB to train one sequence, {device} has "
            f"{total / GIB:.3g}; lower {largest}"
        )
    return fitting


def micro_batch_options(run: RunConfig, ranks: int) -> Iterator[tuple[int, bool]]:
    """Ways to split and recompute that the run leaves open, the fastest first."""
    train, batch = run.train, run.train.batch_size // ranks
    sizes = [part for part in range(batch, 0, -1) if batch % part == 0]
    if train.micro_batch_size != "auto":
        sizes = [min(batch, train.micro_batch_size)]
    for recompute in (False, True) if train.recompute == "auto" else (train.recompute,):
        for size in sizes:
            yield size, recompute


def keep_freed() -> None:
    """Have glibc keep what is freed: handing 10 MB back and forth costs 6 % of a small update.

    In return the heap has holes, the larger the blocks: who makes large ones makes few (loss.py).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library: nothing to set
        return
    # Before version 2.35 glibc refuses the larger one. Where it refuses both, the other threshold
    # is left alone: setting either stops the dynamic one, and every block over 128 KiB is mapped.
    if any(mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
