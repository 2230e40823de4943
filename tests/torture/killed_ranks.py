"""Kill ranks under torchrun at moments of all kinds; hold what remains against a quiet run.

python scripts/torture_ranks.py 40

Each trial starts two ranks with `--max-restarts=3 --resume auto`, kills one of them outright, and
waits: within 15 seconds the ranks must be gone or new ones at work, and the run must end with the
same weights, moments and metrics, byte for byte.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture_runs import without_clocks

CONFIG = """
data: {source: text.txt}
tokenizer: {kind: char}
model: {n_layer: 2, n_head: 2, n_embd: 64, context_length: 64}
dropout: {preset: gpt2, rate: 0.1}
dtype: float32
attention: math
train: {max_steps: 120, batch_size: 8, eval_interval: 15, save_interval: 6, log_interval: 1}
optim: {warmup_steps: 5}
sample: {max_new_tokens: 10}
"""
MOST_SECONDS = 15


def launch(folder: Path, out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=3", "-m", "gptlite", "train"]
    command += ["--config", "config.yaml", "--out-dir", out, "--resume", "auto"]
    log = (folder / f"{out}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}
    return subprocess.Popen(command, cwd=folder, stderr=log, stdout=log, env=environment)


def find_ranks(agent: int) -> dict[int, int]:
    """Rank → process of torchrun's workers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent:
                variables = (path / "environ").read_bytes().split(b"\0")
                rank = next((v for v in variables if v.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank[5:])] = int(path.name)
        except (OSError, ValueError):  # it has just ended
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def reach_start(run: Path, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 4))


def reach_work(run: Path, rng: random.Random) -> None:
    """In a forward or backward pass, adding up gradients, evaluating: whatever it is doing."""
    wait_until(lambda: any(run.glob("checkpoints/step-*")), 60)
    time.sleep(rng.uniform(0, 1.5))


def reach_save(run: Path, rng: random.Random) -> None:
    wait_until(lambda: any(run.glob("checkpoints/step-*")), 60)
    wait_until(lambda: any(run.glob("checkpoints/.*")), 5)


def reach_evaluation(run: Path, rng: random.Random) -> None:
    """Row 15 is written when its evaluation is done."""
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 14, 60)
    time.sleep(rng.uniform(0, 0.05))


MOMENTS = {
    "start": reach_start,
    "work": reach_work,
    "save": reach_save,
    "evaluation": reach_evaluation,
}
"""Each waits until then."""


def kill_rank(folder: Path, number: int, want: dict[str, Any]) -> str:
    """What was done and how it went; raises AssertionError if anything is lost."""
    rng = random.Random(number)
    moment, killed = list(MOMENTS)[number % 4], rng.randrange(2)
    run = folder / f"run-{number}"
    agent = launch(folder, run.name)
    assert wait_until(lambda: len(find_ranks(agent.pid)) == 2, 60), "no ranks"
    MOMENTS[moment](run, rng)
    before = find_ranks(agent.pid)
    if killed not in before:
        agent.wait(60)
        return f"{moment}: over before it could be disturbed"
    os.kill(before[killed], signal.SIGKILL)
    began = time.monotonic()
    gone = wait_until(lambda: not any(map(is_alive, before.values())), MOST_SECONDS)
    seconds = time.monotonic() - began
    assert gone, f"{moment}: rank {killed} killed, others alive after {MOST_SECONDS} s"
    assert agent.wait(180) == 0, f"{moment}: torchrun ended with {agent.returncode}"
    found = without_clocks(run)
    for name, value in want.items():
        assert found[name] == value, f"{moment}: {name} is not as in the undisturbed run"
    shutil.rmtree(run)
    return f"{moment}: rank {killed} killed, all gone after {seconds:.1f} s, same end"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trials", nargs="?", type=int, default=4)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = random.Random(0).choices(["so", "it", "was", "and", "then", "over\n"], k=20_000)
        (folder / "text.txt").write_text(" ".join(words))
        (folder / "config.yaml").write_text(CONFIG)
        undisturbed = launch(folder, "undisturbed").wait(180)
        assert undisturbed == 0, (folder / "undisturbed.log").read_text()
        want = without_clocks(folder / "undisturbed")
        failed = 0
        for number in range(trials):
            try:
                print(f"{number + 1}/{trials} {kill_rank(folder, number, want)}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{number + 1}/{trials} FAILED {error}", flush=True)
                print((folder / f"run-{number}.log").read_text()[-3000:], flush=True)
        print(f"{trials - failed} of {trials} passed")
        sys.exit(bool(failed))
