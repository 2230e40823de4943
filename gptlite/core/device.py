"""Devices and what they compute in: which there are, and which precisions they have hardware for.

Whoever asks names the device that will be used; what is emulated in software does not count.
"""

import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from gptlite import machine
from gptlite.config.run import RunConfig
from gptlite.core import loops
from gptlite.core.precision import HALF
from gptlite.core.world import World
from gptlite.errors import ConfigError

GIB = 1 << 30
X86 = ("x86_64", "AMD64")


def pick_device(wanted: str) -> tuple[str, str]:
    """The device that `wanted` means here, and why. Raises ConfigError if it is not there."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        if n_cuda:
            return "cuda", torch.cuda.get_device_name()
        apple = "no CUDA GPU; device: mps uses the Apple GPU, on which nothing was tested yet"
        return "cpu", apple if has_mps else "no GPU that torch can use"
    kind, _, number = wanted.partition(":")
    if (kind == "cuda" and int(number or 0) >= n_cuda) or (kind == "mps" and not has_mps):
        raise ConfigError(f"device: {wanted!r} not available ({n_cuda} CUDA devices)")
    return wanted, "asked for"


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, not what is free now: choices must not depend on the moment."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine.usable_memory_bytes()


def precisions(device: torch.device, own: set[str] | None = None) -> tuple[list[str], str]:
    """Precisions to choose from on a device: what it multiplies fast; float32 first on CPUs.

    `own` are those that the devices of all ranks have.
    """
    own = native_precisions(device) if own is None else own
    if device.type == "cuda":
        for name, why in (
            ("bfloat16", "this GPU has it"),
            ("float16", "this GPU has no bfloat16; the loss is scaled"),
        ):
            if name in own:
                return [name], why
        return ["float32"], "this GPU has no products of 16 bits"
    if device.type == "mps":
        return ["float32"], "not measured on MPS"
    if "bfloat16" in own:
        return ["float32", "bfloat16"], ""
    return ["float32"], "this CPU has no bfloat16 products"


def shared_precisions(run: RunConfig, world: World) -> set[str]:
    """Precisions that the devices of all ranks have hardware for; all ranks call it."""
    own = native_precisions(torch.device(pick_device(run.device)[0]))
    return set.intersection(*map(set, world.gather(sorted(own))))


def native_precisions(device: torch.device) -> set[str]:
    """Precisions that the device has hardware for."""
    own = {"float32"}
    if has_bfloat16(device):
        own.add("bfloat16")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        own.add("float16")
    if device.type == "cpu" and cpu_has_float16():
        own.add("float16")
    return own


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself multiplies bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """oneDNN's word alone does not do on x86: from AVX-512 on it emulates what is not there."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    own = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return own or platform.machine() not in X86


def cpu_has_float16() -> bool:
    """Not every build for Apple has oneDNN."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported()


@cache
def slowdown(name: str, kind: str) -> float:
    """Measured: how many times as long as in float32 a matrix product takes in this dtype."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 256, device=kind, dtype=dtype)
        return shortest(lambda: (x @ x).sum().item())

    return seconds(HALF[name]) / seconds(torch.float32)


def shortest(run: Callable[[], Any], turns: int = 3) -> float:
    """Seconds of the shortest of a few turns, after one that does not count."""
    times = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def cost_of(name: str, device: torch.device) -> str | None:
    """What it costs to compute in a dtype that the device has no hardware for; None if it has."""
    if name in native_precisions(device):
        return None
    times = slowdown(name, str(device))
    lacks = f"this {'CPU' if device.type == 'cpu' else 'GPU'} has no {name}"
    return f"{lacks}: a matrix product takes {times:.1f} times as long as in float32"


def adapt(run: RunConfig, own: set[str] | None = None) -> tuple[RunConfig, list[str]]:
    """A resolved run as this machine can compute it, and what is not as it was.

    `own` are the precisions that the devices of all ranks have.
    """
    notes, threads = [], run.train.threads
    try:
        device = pick_device(run.device)[0]
    except ConfigError:
        device = pick_device("auto")[0]
        notes.append(f"device: {run.device} -> {device}: not available here")
    there, dtype, attention = torch.device(device), run.dtype, run.attention
    what = "CPU" if there.type == "cpu" else "GPU"
    if dtype != "auto" and dtype not in (own or native_precisions(there)):
        notes.append(f"dtype: {dtype} -> float32: this {what} has no {dtype} products")
        dtype = "float32"
    if attention == "fused" and (there.type != "cpu" or loops.library() is None):
        attention = "math" if run.dropout.rates()["attention_weights"] else "sdpa"
        why = loops.why_not() if there.type == "cpu" else f"the device is {device}"
        notes.append(f"attention: fused -> {attention}: {why}")
    if threads != "auto":
        threads = min(threads, machine.count_cores())
    changed = {"device": device, "dtype": dtype, "attention": attention}
    train = run.train.model_copy(update={"threads": threads})
    return run.model_copy(update={**changed, "train": train}), notes


def usable_threads() -> int:
    """Threads that torch would take, but no more than the cores that this process may use."""
    return min(torch.get_num_threads(), machine.count_cores())


def use_threads(run: RunConfig) -> None:
    """Let torch work in as many threads as the run says."""
    wanted = run.train.threads
    torch.set_num_threads(usable_threads() if wanted == "auto" else wanted)
