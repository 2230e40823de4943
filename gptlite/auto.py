"""What `auto` means on this machine: each choice with its reason, overridable by name.

Resolving a run twice on one machine gives the same run, except `dtype`, which is timed; the
resolved values are saved with the run, so a resumed run never asks again.
"""

import math
import os
import shutil
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gptlite import masks
from gptlite.config import RunConfig, fused_cannot_drop, physical_memory_bytes
from gptlite.errors import ConfigError

BF16_GAIN = 1.3
"""Matrix products must be this much faster in bfloat16 to pay for the conversions."""
BYTES_TO_TRAIN = 16
"""Per parameter in float32: weight, gradient and two moments."""


def resolve(run: RunConfig, *, vocab_size: int, n_rows: int) -> tuple[RunConfig, dict[str, str]]:
    """The run with every `auto` replaced, and for each replaced key why.

    `n_rows` is the number of rows in an epoch. Raises ConfigError for what this machine lacks.
    """
    reasons: dict[str, str] = {}
    top: dict[str, Any] = {}
    train: dict[str, Any] = {}
    top["device"], why = pick_device(run.device)
    if run.device == "auto":
        reasons["device"] = f"{top['device']}: {why}"
    device = torch.device(top["device"])
    if run.train.threads == "auto":
        train["threads"] = torch.get_num_threads()
        reasons["train.threads"] = f"{train['threads']}: torch's default on this machine"
    torch.set_num_threads(train.get("threads", run.train.threads))
    n_steps = planned_steps(run, n_rows)
    epochs = n_steps * run.train.batch_size / n_rows
    if run.dropout.rate == "auto":
        rate, why = pick_dropout_rate(epochs)
        reasons["dropout.rate"] = f"{rate:g}: {why}"
        run = run.model_copy(update={"dropout": run.dropout.model_copy(update={"rate": rate})})
    if run.attention == "auto":
        top["attention"], reasons["attention"] = pick_attention(run, device)
    run = run.model_copy(update=top)
    if problems := [f"{key}: {why}" for key, why in fused_cannot_drop(run)]:
        raise ConfigError(*problems)
    if run.dropout.masks == "auto" and any(run.dropout.rates().values()):
        reasons["dropout.masks"] = describe_masks(run, device)
    if run.dtype == "auto":
        top["dtype"], reasons["dtype"] = pick_dtype(run, device)
    top["compile"], why = pick_compile(run, device, n_steps)
    if run.compile == "auto":
        reasons["compile"] = why
    if run.train.micro_batch_size == "auto":
        size, why = pick_micro_batch(run, vocab_size, device)
        train["micro_batch_size"], reasons["train.micro_batch_size"] = size, f"{size}: {why}"
    if run.train.early_stop == "auto":
        train["early_stop"] = 10 if epochs > 2 else "never"
        reasons["train.early_stop"] = f"{train['early_stop']}: {epochs:.1f} epochs planned"
    resolved = run.model_copy(update={**top, "train": run.train.model_copy(update=train)})
    return resolved, reasons


def planned_steps(run: RunConfig, n_rows: int) -> int:
    """Updates of the run, at least one."""
    if run.train.max_steps is not None:
        return run.train.max_steps
    assert run.train.epochs is not None
    return max(1, math.ceil(run.train.epochs * n_rows / run.train.batch_size))


def pick_device(wanted: str) -> tuple[str, str]:
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        if n_cuda:
            return "cuda", torch.cuda.get_device_name()
        return ("mps", "Apple GPU") if has_mps else ("cpu", "no GPU that torch can use")
    kind, _, number = wanted.partition(":")
    if (kind == "cuda" and int(number or 0) >= n_cuda) or (kind == "mps" and not has_mps):
        raise ConfigError(f"device: {wanted!r} not available ({n_cuda} CUDA devices)")
    return wanted, "asked for"


def usable(run: RunConfig) -> RunConfig:
    """A trained run on this machine: its own device and precision, or what there is here."""
    try:
        pick_device(run.device)
        return run
    except ConfigError:
        return run.model_copy(update={"device": pick_device("auto")[0], "dtype": "float32"})


def pick_dropout_rate(epochs: float) -> tuple[float, str]:
    """From how often the text is seen; docs/dropout.md gives the sources."""
    planned = f"{epochs:.1f} epochs planned"
    if epochs <= 1:
        return 0.0, f"{planned}; text seen once cannot be learned by heart"
    if epochs <= 4:
        return 0.05, f"{planned}; up to 4 repeated text is almost as good as new"
    if epochs <= 16:
        return 0.1, f"{planned}; repeated text begins to be learned by heart"
    return 0.2, f"{planned}; a model sees each text so often that it learns it by heart"


def pick_attention(run: RunConfig, device: torch.device) -> tuple[str, str]:
    if run.dropout.rates()["attention_weights"] == 0:
        return "sdpa", "sdpa: torch's fused kernel"
    if device.type == "cuda" and run.dropout.masks != "keyed":
        return "sdpa", "sdpa: torch's fused kernel, which drops attention weights by itself"
    if run.dropout.masks == "keyed" or device.type != "cpu":
        return "math", "math: no fused kernel drops attention weights by keyed masks"
    return "math", "math: no fused CPU kernel drops attention weights"


def describe_masks(run: RunConfig, device: torch.device) -> str:
    native = run.dropout.native_sites(run.attention)
    if native:
        return f"keyed, except {', '.join(native)}: native, inside the fused kernel"
    if device.type == "cpu":
        way = "by the C compiler's loop" if masks.library() else "by torch; a C compiler is faster"
        return f"keyed, {way}"
    return "keyed"


def pick_dtype(run: RunConfig, device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16", "bfloat16: this GPU has it"
        return "float32", "float32: this GPU has no bfloat16"
    if device.type == "mps":
        return "float32", "float32: not measured on MPS"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "float32", "float32: this CPU has no bfloat16 products"
    gain = bfloat16_gain(run)
    choice = "bfloat16" if gain >= BF16_GAIN else "float32"
    return choice, f"{choice}: matrix products timed {gain:.2f}x as fast in bfloat16"


def bfloat16_gain(run: RunConfig) -> float:
    """Time of the MLP's product in float32 over bfloat16, interleaved, about 0.1 s."""
    rows = min(4096, run.train.batch_size * run.model.context_length)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.random.fork_rng(devices=[]):
        x, w = (
            torch.randn(rows, run.model.n_embd),
            torch.randn(run.model.mlp_width, run.model.n_embd),
        )
    sets = {dtype: (x.to(dtype), w.to(dtype)) for dtype in times}
    began = time.perf_counter()
    while len(times[torch.float32]) < 5 or (
        time.perf_counter() - began < 0.1 and len(times[torch.float32]) < 100
    ):
        for dtype, (a, b) in sets.items():
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times[dtype].append(time.perf_counter() - start)
    return statistics.median(times[torch.float32]) / statistics.median(times[torch.bfloat16])


def pick_compile(run: RunConfig, device: torch.device, n_steps: int) -> tuple[bool, str]:
    broken = device.type == "cuda" and bool(run.dropout.native_sites(run.attention))
    if run.compile is True and broken:
        raise ConfigError(
            "compile: true with native dropout on CUDA is refused: compiled torch dropout can "
            "give neighbouring channels one mask (pytorch issue 198333); set dropout.masks: keyed"
        )
    if run.compile is True and device.type == "cpu" and not has_cpp_compiler():
        raise ConfigError("compile: true needs a C++ compiler (g++ or clang++, or CXX); set false")
    if run.compile != "auto":
        return bool(run.compile), "asked for"
    if device.type != "cuda":
        return False, "false: compiling takes longer than it saves on small CPU runs"
    if broken:
        return False, "false: compiled native dropout is wrong on CUDA (pytorch issue 198333)"
    if n_steps < 500:
        return False, f"false: {n_steps} updates do not repay compiling"
    return True, "true: CUDA and a run long enough to repay it"


def has_cpp_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def activation_bytes_per_row(run: RunConfig, vocab_size: int) -> int:
    """Estimate of what one sequence keeps for the backward pass, in float32."""
    model = run.model
    rates = run.dropout.rates()
    per_layer = 12 * model.n_embd + 3 * model.mlp_width
    if rates["attention_weights"] > 0 or run.attention == "math":
        per_layer += 4 * model.n_head * model.context_length
    if run.dropout.masks == "native":  # keyed masks are drawn again, not kept
        per_layer += sum(2 * model.n_embd for rate in rates.values() if rate > 0)
    per_token = model.n_layer * per_layer + 4 * model.n_embd + 4 * vocab_size
    return 4 * per_token * model.context_length


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, not what is free now: choices must not depend on the moment."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return physical_memory_bytes()


def pick_micro_batch(run: RunConfig, vocab_size: int, device: torch.device) -> tuple[int, str]:
    """The largest part of a batch that fits half of the memory; at least one sequence."""
    weights = run.model.n_parameters(vocab_size) * BYTES_TO_TRAIN
    total, per_row = memory_bytes(device), activation_bytes_per_row(run, vocab_size)
    if weights + per_row > total:
        need = (weights + per_row) / 2**30
        raise ConfigError(
            f"model: needs about {need:.1f} GiB to train one sequence, {device} has "
            f"{total / 2**30:.1f}; lower n_layer, n_embd or context_length"
        )
    rows = max(1, int((total / 2 - weights) // per_row))
    batch = run.train.batch_size
    size = max(part for part in range(1, min(rows, batch) + 1) if batch % part == 0)
    return size, f"about {per_row / 2**20:.0f} MiB per sequence, {total / 2**30:.0f} GiB of memory"


def precision(run: RunConfig) -> AbstractContextManager[Any]:
    """Where matrix products take the precision that the resolved run names."""
    if run.dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)
