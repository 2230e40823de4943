"""Living with others: signals, two runs in one directory, readers, long runs, what it all costs."""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faults import set_disk
from torture_runs import Outcome, Workplace, run_digest, start_child, wait_for_exit

from gptlite import storage
from gptlite.runs import checkpoint
from gptlite.runs.session import Session
from gptlite.runs.trained import load_trained
from gptlite.storage import Disk
from gptlite.terminal import leave_when_terminated

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BUSY = {
    "train": {"max_steps": 4000, "eval_interval": 3, "save_interval": 50, "log_interval": 10},
    "sample": {"interval": 4, "max_new_tokens": 40},
}
"""Mostly evaluating and sampling, so that most signals come in their midst."""


def send_signals(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """One run, told n times to stop: each time it saves where it is and leaves."""
    steps = 30 * n
    config = place.write_config("busy", **{**BUSY, "train": {**BUSY["train"], "max_steps": steps}})
    assert place.run(config, "straight", prepare=leave_when_terminated) == 0
    slowest = 0.0
    saved = early = 0
    while saved + early < n:
        number = rng.choice(SIGNALS)
        pid = place.start(config, "told", "--resume", "auto", prepare=leave_when_terminated)
        time.sleep(rng.uniform(0.1, 0.4))
        began = time.monotonic()
        os.kill(pid, number)
        code = wait_for_exit(pid)
        slowest = max(slowest, time.monotonic() - began)
        said = place.stderr_lines("told")
        assert not any("Traceback" in line for line in said), said[-3:]
        stopped = re.match(r"stopped at step (\d+), saved", said[-1] if said else "")
        if stopped:
            assert code == 128 + number, (code, number)
            last = checkpoint.choose(place.folder / "told", "last")
            assert last.state.step == int(stopped[1])
            saved += 1
        else:  # before there was anything to save
            assert code in (128 + number, -number), (code, said[-2:])
            early += 1
    assert place.run(config, "told", "--resume", "auto") == 0
    same = run_digest(place.folder / "told", steps) == run_digest(place.folder / "straight", steps)
    result = f"{saved} saved, {early} before training began; slowest {slowest:.1f} s; equal: {same}"
    yield Outcome("SIGTERM, SIGINT, SIGUSR1", n, result, same and slowest <= 5)
    yield from send_second_signal(place, rng, max(1, n // 10))


def send_second_signal(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """A second Ctrl-C leaves at once, and what was saved before is whole."""
    config = place.write_config("twice", **BUSY)
    for number in range(n):
        pid = place.start(config, f"twice-{number}", prepare=leave_when_terminated)
        time.sleep(rng.uniform(0.25, 0.5))
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(rng.uniform(0, 0.003))
        code = wait_for_exit(pid)
        assert code in (130, -signal.SIGINT), (code, place.stderr_lines(f"twice-{number}")[-3:])
        for folder in checkpoint.folders(place.folder / f"twice-{number}"):
            checkpoint.read_state(folder)
    yield Outcome("Ctrl-C twice", n, "left at once, exit 130", True)


def start_two_runs(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Two runs begun together in one directory: one goes on, the other says who."""
    config = place.write_config("two", train={"max_steps": 400})
    for number in range(n):
        name = f"both-{number}"
        arguments = ["train", "-c", str(config), "--out-dir", str(place.folder / name)]
        more = rng.choice(([], ["--resume", "auto"]))
        ends = [place.folder / f"{name}-{which}.err" for which in "ab"]
        pids = [start_child([*arguments, *more], end) for end in ends]
        codes = [wait_for_exit(pid) for pid in pids]
        assert sorted(codes) == [0, 6], (codes, [end.read_text() for end in ends])
        (line,) = ends[codes.index(6)].read_text().splitlines()
        assert f"in use by pid {pids[codes.index(0)]} on " in line, line
        shutil.rmtree(place.folder / name)
    yield Outcome(
        "two runs, one directory", n, "one went on, the other left with 6 naming it", True
    )


def read_while_saving(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Loading for `generate` and `eval` while a run saves and prunes at every update."""
    train = {"max_steps": 100_000, "save_interval": 1, "eval_interval": 2, "keep_last": 2}
    config = place.write_config("read", train=train, sample={"interval": 0})
    pid = place.start(config, "read")
    run_dir = place.folder / "read"
    while checkpoint.read_pointer(run_dir, "best") is None:
        time.sleep(0.05)
    steps = set()
    try:
        for number in range(n):
            steps.add(load_trained(run_dir, ("best", "last")[number % 2]).state.step)
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
    result = f"{n} read well, {len(steps)} different checkpoints"
    yield Outcome("reading while saving and pruning", n, result, len(steps) > 1)


def train_long(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """n updates with evaluations, samples and saves: memory, handles, files and disk stay."""
    train = {"max_steps": n, "eval_interval": 100, "save_interval": 100, "log_interval": 100}
    config = place.write_config("soak", train=train, sample={"interval": 500, "max_new_tokens": 8})
    pid = place.start(config, "soak")
    run_dir, seen = place.folder / "soak", []
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.25)
        if usage := read_usage(pid, run_dir):
            seen.append(usage)
    assert wait_for_exit(pid) == 0, place.stderr_lines("soak")[-2:]
    settled = np.array([usage for usage in seen if usage[0] > n / 10], dtype=float)
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 10_000
    handles, parts, folders = settled[:, 2:].max(0).astype(int)
    fewest = int(settled[:, 2].min())
    kept = bool(slope <= 1.0) and handles - fewest <= 2 and parts <= 1 and folders <= 4
    result = (
        f"{slope:+.2f} MB anonymous memory in 10,000 updates; {fewest} to {handles} handles, "
        f"at most {parts} temporary names and {folders} checkpoints"
    )
    yield Outcome("long run", n, result, kept)


def read_usage(pid: int, run_dir: Path) -> tuple[float, ...] | None:
    """(step, MB of anonymous memory, handles, temporary names, checkpoints); None before a save."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        handles = len(os.listdir(f"/proc/{pid}/fd"))
        last = checkpoint.read_pointer(run_dir, "last")
        inside = os.listdir(run_dir / "checkpoints")
    except OSError:
        return None
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
    if last is None or anonymous is None:
        return None
    parts = sum(bool(storage.LEFT_BEHIND.match(name)) for name in inside)
    folders = sum(bool(checkpoint.FOLDER.match(name)) for name in inside)
    return int(last[-8:]), int(anonymous[1]) / 1000, handles, parts, folders


class TimedDisk(Disk):
    """Adds up the seconds of syncing."""

    seconds = 0.0

    def sync(self, path: Path) -> None:
        began = time.perf_counter()
        super().sync(path)
        TimedDisk.seconds += time.perf_counter() - began


def measure_cost(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Shares of a quickstart run of n updates that saves every 100."""
    out = place.folder / "cost.txt"
    arguments = ["train", "-c", "quickstart", "--out-dir", str(place.folder / "cost")]
    for value in (f"train.max_steps={n}", "train.save_interval=100", "optim.warmup_steps=20"):
        arguments += ["--set", value]
    arguments += ["--set", f"data.cache_dir={place.folder / 'cache'}"]
    arguments += ["--set", "train.threads=2"]
    pid = start_child(arguments, place.folder / "cost.err", prepare=partial(time_saving, out))
    assert wait_for_exit(pid, 600) == 0, place.stderr_lines("cost")[-3:]
    hashing, syncing, saving, saves, whole = map(float, out.read_text().split())
    share = (hashing + syncing) / whole
    result = (
        f"hashing and syncing {share:.1%}, saving in all {saving / whole:.1%} of {whole:.1f} s; "
        f"{1e3 * saving / saves:.0f} ms a save"
    )
    yield Outcome("cost of saving every 100 updates", int(saves), result, share <= 0.03)


def time_saving(out: Path) -> None:
    """In a child: seconds of hashing, syncing, saving and training, written to a file."""
    spent = {"hash": 0.0, "save": 0.0, "saves": 0.0}
    file_digest = storage.file_digest
    save, work = Session.save, Session.work

    def timed_digest(path: Path, **more: Any) -> str:
        began = time.perf_counter()
        try:
            return file_digest(path, **more)
        finally:
            spent["hash"] += time.perf_counter() - began

    def timed_save(self: Session) -> None:
        began = time.perf_counter()
        save(self)
        spent["save"] += time.perf_counter() - began
        spent["saves"] += 1

    def timed_work(self: Session) -> dict[str, Any]:
        TimedDisk.seconds = spent["hash"] = 0.0
        began = time.perf_counter()
        summary = work(self)
        whole = time.perf_counter() - began
        numbers = (spent["hash"], TimedDisk.seconds, spent["save"], spent["saves"], whole)
        out.write_text(" ".join(map(str, numbers)))
        return summary

    set_disk(TimedDisk())
    storage.file_digest = timed_digest
    setattr(Session, "save", timed_save)  # noqa: B010
    setattr(Session, "work", timed_work)  # noqa: B010
