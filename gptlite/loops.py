"""loops.c, built by this machine's C compiler while torch is still being imported.

Nothing built is kept on disk: what a cache holds could be anyone's. Without a compiler (or with CC
set to something that is none) everything runs on torch alone, slower.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

LONGEST_ROW = 8192
"""Keys in a row of attention weights that softmax takes."""
FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-fopenmp"], [])


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
def building() -> Future[ctypes.CDLL | None]:
    """Begin to build; what is called first need not wait."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(build)
    pool.shutdown(wait=False)
    return future


@cache
def library() -> ctypes.CDLL | None:
    """The loops; None without a compiler."""
    return building().result()


def build() -> ctypes.CDLL | None:
    source = Path(__file__).with_name("loops.c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for flags in FLAGS:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "loops.so"
            flags = ["-O3", *flags, f"-DLONGEST={LONGEST_ROW}", "-shared", "-fPIC"]
            command = [*compiler, *flags, str(source), "-o", str(built)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                return ctypes.CDLL(str(built))
            except (OSError, subprocess.SubprocessError):
                continue
    return None


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
    else:
        found.argtypes = (*[address] * 5, *[ctypes.c_int64] * 7)
    found.restype = None
    return found
