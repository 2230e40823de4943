"""What training takes of a device's memory, by arithmetic, and how a run is made to fit.

The estimate counts what autograd keeps with the kernels of this project; `docs/benchmarks.md` holds
it against measured peaks.
"""

import ctypes
from collections.abc import Iterator

import torch

from gptlite.config import RunConfig
from gptlite.devices import HALF
from gptlite.errors import ConfigError
from gptlite.loss import PART_BYTES
from gptlite.machine import usable_memory_bytes
from gptlite.world import ALONE, World

GIB = 1 << 30
BYTES_PER_PARAMETER = 16
"""In float32: weight, gradient and two moments."""
PROCESS_BYTES = int(0.35 * GIB)
"""Python, torch and the rest, before anything is trained."""
SLACK = 1.1
"""What passes by and is not kept."""
AUTO_SHARE = 0.5
"""Of the device's memory, unless train.memory_gib says how much."""


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, not what is free now: choices must not depend on the moment."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return usable_memory_bytes()


def block_bytes(run: RunConfig) -> int:
    """What one block keeps of one token for the backward pass."""
    model, half = run.model, 2 if run.dtype in HALF else 4
    residual = 4 * 2 * model.n_embd
    read = 6 * model.n_embd + 2 * model.mlp_width  # what matrices read, and the activation's slope
    rows_of_weights = {"sdpa": 0, "fused": 1}.get(run.attention, 2)
    read += rows_of_weights * model.n_head * model.context_length
    if run.dropout.masks == "native":  # keyed masks are drawn again, not kept
        rates = run.dropout.rates()
        read += sum(model.n_embd for rate in rates.values() if rate > 0)
    return residual + half * read


def weight_bytes(run: RunConfig, vocab_size: int, ranks: int) -> int:
    """Weights, gradients and moments of a process; FSDP gathers one block, or what is in none."""
    model, n_parameters = run.model, run.model.n_parameters(vocab_size)
    copies = 2 if run.dtype in HALF else 0  # of the weights
    if run.distributed.engine != "fsdp" or ranks == 1:
        return n_parameters * (BYTES_PER_PARAMETER + copies)
    blocks = n_parameters - model.model_copy(update={"n_layer": 0}).n_parameters(vocab_size)
    gathered = n_parameters - blocks + 2 * blocks // model.n_layer  # the next is on its way
    return n_parameters * BYTES_PER_PARAMETER // ranks + gathered * (8 + copies)


def training_bytes(
    run: RunConfig, vocab_size: int, rows: int, recompute: bool, ranks: int = 1
) -> int:
    """Peak of an update of `rows` sequences at a time: weights, moments, activations."""
    model = run.model
    tokens = rows * model.context_length
    weights = weight_bytes(run, vocab_size, ranks)
    logits = 10 * vocab_size * tokens
    if 4 * vocab_size * tokens > PART_BYTES:
        logits = 6 * PART_BYTES + 4 * vocab_size * model.n_embd  # with those of an evaluation
    blocks = model.n_layer * block_bytes(run)
    if recompute:
        blocks = 4 * model.n_layer * model.n_embd + 2 * block_bytes(run)
    kept = weights + logits + tokens * (blocks + 16 * model.n_embd)
    return PROCESS_BYTES + int(SLACK * kept)


def fit(
    run: RunConfig, vocab_size: int, device: torch.device, world: World = ALONE
) -> tuple[int, bool, str]:
    """(sequences per forward pass, whether to recompute, why): the largest part that fits.

    Raises ConfigError if not even one sequence does.
    """
    total = memory_bytes(device)
    if device.type == "cpu":
        total //= world.here
    budget = total * AUTO_SHARE if run.train.memory_gib == "auto" else run.train.memory_gib * GIB
    for size, recompute in ways(run, world.size):
        need = training_bytes(run, vocab_size, size, recompute, world.size)
        if need <= budget:
            return size, recompute, f"about {need / GIB:.2g} of {budget / GIB:.3g} GiB"
    if need <= total and run.train.memory_gib == "auto":
        return size, recompute, f"about {need / GIB:.2g} of {total / GIB:.3g} GiB"
    limit = total if run.train.memory_gib == "auto" else budget
    whose = str(device) if run.train.memory_gib == "auto" else "train.memory_gib"
    count = "one sequence" if size == 1 else f"{size} sequences at a time"
    raise ConfigError(
        f"model: needs about {need / GIB:.2g} GiB to train {count}, {whose} has "
        f"{limit / GIB:.3g}; lower n_layer, n_embd, context_length or micro_batch_size"
    )


def ways(run: RunConfig, ranks: int) -> Iterator[tuple[int, bool]]:
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
        libc = ctypes.CDLL(None)
        for name in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(name, 1 << 30)
    except (OSError, AttributeError, TypeError):  # another C library: nothing to set
        pass
