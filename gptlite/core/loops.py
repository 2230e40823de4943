"""loops.c, built by this machine's C compiler while torch is still being imported.

Nothing built is kept on disk: what a cache holds could be anyone's. Without a compiler (or with CC
set to something that is none) everything runs on torch alone, slower.
"""

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

LONGEST_ROW = 8192
"""Keys in a row of attention weights that softmax takes."""
SOURCE = Path(__file__).with_name("loops.c")
FLAGS = ("-O3", "-ffp-contract=fast", f"-DLONGEST={LONGEST_ROW}")
"""The same roundings from every compiler."""
OWN = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
"""For this processor; without it, loops for the oldest one would be slower than torch."""
CHOOSES = ("-march", "-mcpu")
"""CC may have one of these itself, to build for another processor: CC="gcc -march=x86-64-v3"."""


class Rows(ctypes.Structure):
    """The shape of a tensor (B, H, T, W) and what its masks are drawn from, as in loops.c."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("salts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_t", "B", "H", "T", "W")),
        ("threshold", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


@cache
def building() -> Future[tuple[ctypes.CDLL | None, str]]:
    """Begin to build; what is called first need not wait."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(build)
    pool.shutdown(wait=False)
    return future


@cache
def library() -> ctypes.CDLL | None:
    """The loops; None where they cannot be built."""
    return building().result()[0]


def why_not() -> str:
    """Why there are no loops, and what to do; empty if there are."""
    return building().result()[1]


def has_threads() -> bool:
    """Whether the loops work in as many threads as torch: not all compilers have OpenMP."""
    loaded = library()
    return loaded is not None and bool(loaded.has_threads())


def build() -> tuple[ctypes.CDLL | None, str]:
    """The loops, or why there are none. Apple's clang has no OpenMP, so without it too."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    own = [] if any(flag.startswith(CHOOSES) for flag in compiler) else [OWN]
    why = ""
    for threads in (["-fopenmp"], []):
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "loops.so"
            flags = [*FLAGS, *own, *threads, "-shared", "-fPIC", str(SOURCE), "-o", str(built)]
            try:
                subprocess.run([*compiler, *flags], check=True, capture_output=True, timeout=60)
            except subprocess.CalledProcessError as error:
                lines = error.stderr.decode(errors="replace").splitlines() or ["no message"]
                wrong = next((line for line in lines if "error" in line), lines[0])[:200]
                why = f"{compiler[0]} failed: {wrong}"
                continue
            except (OSError, IndexError, subprocess.SubprocessError):
                return None, f"no C compiler ({shlex.join(compiler) or 'CC is empty'})"
            try:
                return ctypes.CDLL(str(built)), ""
            except OSError as error:
                why = f"what was built cannot be loaded ({error})"
                if "failed to map" in str(error):
                    where = tempfile.gettempdir()
                    why = f"{where} is mounted noexec; set TMPDIR to a folder that is not"
    return None, why


@cache
def function(name: str) -> Callable[..., None]:
    """A loop by its name in loops.c; only where there is a library."""
    loaded = library()
    assert loaded is not None
    found = loaded[name]
    rows, address = ctypes.POINTER(Rows), ctypes.c_void_p
    if name.startswith("drop"):
        found.argtypes = (rows, address, address)
    elif name.startswith("softmax_back"):
        found.argtypes = (rows, ctypes.c_float, address, address, address)
    elif name.startswith("softmax"):
        found.argtypes = (rows, ctypes.c_float, address, address)
    elif name.startswith("gelu"):
        found.argtypes = (*[address] * 3, ctypes.c_int64)
    elif name.startswith("linear"):
        found.argtypes = (*[address] * 4, *[ctypes.c_int64] * 3)
    elif name.startswith("block"):
        found.argtypes = (address, address, address)
    else:
        found.argtypes = (*[address] * 5, *[ctypes.c_int64] * 6)
    found.restype = None
    return found
