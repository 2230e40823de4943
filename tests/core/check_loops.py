"""Whether loops.c gives the same numbers on every processor: masks and sums, bit for bit.

    .venv/bin/python tests/core/check_loops.py

Builds it with each compiler at hand for x86-64-v2 (SSE), v3 (AVX2) and v4 (AVX-512), and for
aarch64 where a cross compiler and qemu-user are installed (Debian: gcc-aarch64-linux-gnu,
qemu-user), runs all on the same inputs, and compares with the first. What is not installed, or
cannot run on this processor, is skipped and named. x86-64-v2 has no fused multiply-add, so its sums
are rounded apart, and so are a few of clang's beside gcc's, and rotations (of two products that are
added either may be the fused one): there the largest difference is printed. Exits with 1 if
anything differs that must not.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlite.core import loops

HERE = Path(__file__).resolve().parent
EMULATOR = "qemu-aarch64"
LARGEST_ROUNDING = 1e-5
"""Of values up to 4, where multiply and add are rounded apart; bfloat16 has 8 bits: 2**-7."""
NEEDS = {"x86-64-v2": "sse4_2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}
"""What /proc/cpuinfo must name."""
Outputs = list[tuple[str, NDArray[Any]]]


class Target(NamedTuple):
    name: str
    build: tuple[str, ...]
    run: tuple[str, ...] = ()
    rounds_apart: bool = False
    """Without a fused multiply-add."""


def list_targets() -> Iterator[Target | str]:
    """What can be built and run here, and what cannot, with the reason."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for compiler in ("gcc", "clang"):
        if shutil.which(compiler) is None:
            yield f"{compiler}: not installed"
            continue
        if platform.machine() not in ("x86_64", "AMD64"):
            yield Target(f"{compiler} native", (compiler, "-mcpu=native"))
            continue
        for level, needed in NEEDS.items():
            if needed in flags:
                build = (compiler, f"-march={level}")
                yield Target(f"{compiler} {level}", build, rounds_apart=level == "x86-64-v2")
            else:
                yield f"{compiler} {level}: this processor has no {needed}"
    cross = "aarch64-linux-gnu-gcc"
    missing = [tool for tool in (cross, EMULATOR) if shutil.which(tool) is None]
    if missing and platform.machine() != "aarch64":
        yield f"aarch64: {' and '.join(missing)} not installed"
    elif platform.machine() != "aarch64":
        yield Target("gcc aarch64", (cross, "-static"), (EMULATOR,))


def run_target(target: Target, folder: Path) -> Outputs:
    """What every loop gives, built for this target."""
    binary = folder / "check"
    source = [f'-DLOOPS="{loops.SOURCE}"', str(HERE / "check_loops.c"), "-o", str(binary), "-lm"]
    subprocess.run([*target.build, *loops.FLAGS, *source], check=True)
    data = subprocess.run([*target.run, str(binary)], check=True, capture_output=True).stdout
    return list(read_outputs(data))


def read_outputs(data: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    at = 0
    while at < len(data):
        name = data[at : at + 32].rstrip(b"\0").decode()
        size, n = np.frombuffer(data, np.int64, 2, at + 32)
        kind = {2: np.uint16, 4: np.float32}[int(size)]
        yield name, np.frombuffer(data, kind, int(n), at + 48)
        at += 48 + int(size * n)


def as_numbers(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype == np.float32:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def compare(target: Target, found: Outputs, first: Outputs, *, exactly: bool) -> tuple[str, bool]:
    """What to say of a target beside another one, and whether it is right."""
    unequal, wrong = set(), set()
    largest = 0.0
    for (name, mine), (same, theirs) in zip(found, first, strict=True):
        assert name == same
        if mine.tobytes() == theirs.tobytes():
            continue
        unequal.add(name)
        a, b = as_numbers(mine), as_numbers(theirs)
        difference = float(np.abs(a - b).max())
        allowed = (
            4 * 2.0**-7 if mine.dtype == np.uint16 else LARGEST_ROUNDING * max(1.0, np.abs(b).max())
        )
        masks_differ = name.startswith("drop") or bool(
            ((a == 0) != (b == 0)).any() and "dropped" in name
        )
        largest = max(largest, difference)
        bound = exactly and not name.startswith("block")  # which has sums of two products
        if bound or masks_differ or difference > allowed:
            wrong.add(name)
    if wrong:
        return f"{target.name}: DIFFERS in {', '.join(sorted(wrong))} by up to {largest:.3g}", False
    if unequal:
        return f"{target.name}: masks equal, sums rounded apart by up to {largest:.3g}", True
    return f"{target.name}: all equal bit for bit", True


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    first: dict[str, Outputs] = {}
    right = True
    fused_first = sorted(
        list_targets(), key=lambda one: isinstance(one, Target) and one.rounds_apart
    )
    for target in fused_first:
        if isinstance(target, str):
            print(f"skipped {target}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run_target(target, Path(folder))
        compiler = target.name.split()[0]
        if not first:
            print(f"{target.name}: {len(found)} outputs, the others are held against them")
        else:
            other = compiler not in first
            against = next(iter(first.values())) if other else first[compiler]
            line, fine = compare(target, found, against, exactly=not (other or target.rounds_apart))
            right &= fine
            print(line, flush=True)
        first.setdefault(compiler, found)
    sys.exit(0 if right and first else 1)


if __name__ == "__main__":
    main()
