"""The compiled loops on other processors, with other compilers, and where they cannot be built."""

import ctypes
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptlite.core import kernels, loops, masks
from gptlite.core.masks import Mask
from gptlite.planning import auto
from tests.conftest import Workshop

ROOT = Path(__file__).resolve().parents[2]
has_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")


CACHED = (loops.building, loops.library, loops.function)


def build_anew() -> None:
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Build anew in the test, and once more behind it."""
    build_anew()
    yield
    build_anew()


def write_compiler(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@has_gcc
def test_every_processor_gives_the_same_numbers() -> None:
    """SSE, AVX2, AVX-512 and ARM, by each compiler that is here; see what the script prints."""
    script = [sys.executable, str(ROOT / "tests" / "core" / "check_loops.py")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def drop_ones() -> torch.Tensor:
    keys = torch.arange(12).view(3, 4) * 77777777777
    return masks.drop(torch.ones(3, 4, 70), Mask(keys, torch.zeros(1, dtype=torch.int64), 20000))


@has_gcc
def test_a_compiler_without_openmp_makes_loops_of_one_thread(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's clang. Masks are the same; torch does what its threads do faster."""
    expected, x = drop_ones(), torch.linspace(-3, 3, 1000)
    text = 'case "$*" in *-fopenmp*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec gcc "$@"'
    monkeypatch.setenv("CC", write_compiler(tmp_path, text))
    build_anew()
    assert loops.library() is not None
    assert not loops.has_threads()
    assert torch.equal(drop_ones(), expected)
    used: list[str] = []
    plain = loops.function
    monkeypatch.setattr(loops, "function", lambda name: used.append(name) or plain(name))
    for threads, loop in (
        (1, True),
        (kernels.MOST_THREADS, True),
        (kernels.MOST_THREADS + 1, False),
    ):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        used.clear()
        torch.testing.assert_close(kernels.gelu(x), F.gelu(x, approximate="tanh"))
        assert used == (["gelu_float32"] if loop else [])


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("no-such-compiler", "no C compiler (no-such-compiler)"),
        ("", "no C compiler (CC is empty)"),
        (
            "echo 'in file x.h' >&2; echo 'x.h:1: error: it broke' >&2; exit 1",
            "x.h:1: error: it broke",
        ),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_without_loops_the_reason_is_said_once_and_everything_works(
    fresh: None,
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    why: str,
) -> None:
    expected = drop_ones()
    shell = compiler.startswith(("echo", "exit"))
    monkeypatch.setenv("CC", write_compiler(tmp_path, compiler) if shell else compiler)
    build_anew()
    assert loops.library() is None
    assert torch.equal(drop_ones(), expected)
    resolved, reasons = auto.resolve_run(workshop.run(), vocab_size=50, n_rows=100)
    assert why in reasons["loops"]
    assert sum("compiler" in reason for reason in reasons.values()) <= 1
    assert resolved.attention in ("math", "sdpa")


@has_gcc
def test_a_temporary_folder_that_runs_nothing_is_named(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> ctypes.CDLL:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert loops.library() is None
    assert "is mounted noexec; set TMPDIR" in loops.why_not()


@has_gcc
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of another kind")
def test_cc_may_name_another_processor(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -march=x86-64-v2")
    build_anew()
    loaded = loops.library()
    assert loaded is not None
    assert loaded.register_bytes() == 16
