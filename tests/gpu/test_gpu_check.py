"""scripts/gpu_check as far as it can be tried without a GPU: its own text, times, page and peer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import numpy as np
import pytest
import torch
from gpu_check import Check, Result
from gpu_peer import plain_update
from gpu_runs import Failed, Place, Skipped

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("gpu_check.py")


def start(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = start()
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (2, 1, "")
    assert done.stdout.startswith("gpu_check: no CUDA GPU")


def test_a_check_runs_in_a_reduced_size_and_is_written_down(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    done = start("--device", "cpu", "--small", "--out", str(page), "masks", "shakespeare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "masks: kept: " in done.stdout
    assert "shakespeare: skipped: tinyshakespeare is not at hand" in done.stdout
    text, skeleton = page.read_text(), (ROOT / "docs" / "gpu.md").read_text()
    assert "a CPU" in text
    assert "in a reduced size" in text
    assert "| attention_weights |" in text
    assert text.count("Not measured.") == skeleton.count("Not measured.") - 2


def test_every_check_has_its_place_on_the_page(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    results = [
        Result(name, "kept", f"found {name}", [("a", "b"), ("1", "2")], 1.0)
        for name in gpu_check.CHECKS
    ]
    for _ in range(2):  # what was written once is replaced
        gpu_check.write_page(page, "today", results)
    for name in gpu_check.CHECKS:
        section = page.read_text().split(f"<!-- {name} -->")[1].split("<!-- end")[0]
        assert section == f"\ntoday: **kept**: found {name}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
        assert f"| {name} | kept | 1 | found {name} |" in page.read_text()
    assert "Not measured." not in page.read_text()


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ("import time; time.sleep(60)", "not done in 3 s"),
        ("import os; os._exit(3)", "its process ended with 3"),
    ],
)
def test_a_check_that_hangs_or_dies_is_reported_with_what_it_had_found(
    tmp_path: Path, ends: str, why: str
) -> None:
    line = r'{"row": ["a", "b"]}'
    code = f"import sys; open(sys.argv[1], 'w').write('{line}\\n'); {ends}"
    command = [sys.executable, "-c", code]
    result = gpu_check.attempt("masks", command, tmp_path, 3.0)
    assert (result.verdict, result.why) == ("FAILED", why)
    assert result.rows == [("a", "b")]


@pytest.mark.parametrize(
    ("kind", "verdict"), [(Failed, "FAILED"), (Skipped, "skipped"), (RuntimeError, "FAILED")]
)
def test_what_a_check_raises_is_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], verdict: str
) -> None:
    def ends_so(place: Any) -> Any:
        yield ("what",)
        raise kind("an illegal\nmemory access")

    place = Place("masks", "cpu", True, None, tmp_path, 0.0)
    monkeypatch.setitem(gpu_check.CHECKS, "masks", Check(ends_so, 1))
    gpu_check.run_alone("masks", place, tmp_path / "findings")
    first, last = map(json.loads, (tmp_path / "findings").read_text().splitlines())
    assert first == {"row": ["what"]}
    assert last["verdict"] == verdict
    assert "an illegal" in last["why"]


def test_the_plain_loop_learns() -> None:
    """A peer that did not train would be no measure of speed."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": 16}
    update = plain_update(
        sizes,
        np.arange(1000, dtype=np.uint16) % 7,
        7,
        batch_size=8,
        rate=0.1,
        device="cpu",
        dtype="float32",
        compiled=False,
    )
    losses = [update() for _ in range(60)]
    assert losses[-1] < losses[0] / 2
