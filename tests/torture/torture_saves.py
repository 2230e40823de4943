"""Saving: processes killed in the midst, power gone, disks that fail."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from faults import (
    DyingDisk,
    FailingDisk,
    Operation,
    RecordingDisk,
    WatchedDisk,
    crash_states,
    lay_out,
    set_disk,
    use_disk,
)
from torture_runs import Outcome, Workplace, run_digest, wait_for_exit, without_clocks

from gptlite import storage
from gptlite.data.prepare import prepare
from gptlite.errors import UserError
from gptlite.runs import checkpoint, start
from gptlite.runs.origin import load_run
from gptlite.runs.session import Session


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, which must be good; 0 if there is none yet."""
    found = checkpoint.folders(run_dir)
    if not found:
        assert checkpoint.read_pointer(run_dir, "last") is None
        return 0
    step = checkpoint.read_state(found[-1]).step
    pointed = checkpoint.read_pointer(run_dir, "last")
    assert pointed is None or step >= int(pointed[-8:])
    return step


def kill_runs(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """One run, killed n times: half of them at an operation of a save, the others anywhere."""
    steps = 8 * n + 800  # a quiet machine makes hundreds before a kill by the clock
    train = {"max_steps": steps, "log_interval": 2, "keep_last": 3}
    config = place.write_config("chain", train=train)
    assert place.run(config, "straight") == 0
    in_save = before = 0
    for _ in range(n):
        kind = rng.choice(("save", "save", "operation", "time"))
        disk = storage.Disk()
        if kind == "save":
            disk = DyingDisk(rng.randint(1, 20), inside="checkpoints")
        elif kind == "operation":
            disk = DyingDisk(rng.randint(1, 60))
        pid = place.start(config, "chain", "--resume", "auto", prepare=partial(set_disk, disk))
        if kind == "time":
            time.sleep(rng.uniform(0, 0.4))
            os.kill(pid, signal.SIGKILL)
        code = wait_for_exit(pid)
        assert code == -signal.SIGKILL, (code, place.stderr_lines("chain")[-3:])
        now = newest_step(place.folder / "chain")
        assert now >= before, f"step {before} was lost: {now}"
        before = now
        in_save += kind == "save"
    assert before < steps
    assert place.run(config, "chain", "--resume", "auto") == 0
    left = [p for p in (place.folder / "chain").rglob(".*") if storage.LEFT_BEHIND.match(p.name)]
    assert not left, left
    same = run_digest(place.folder / "chain", steps) == run_digest(place.folder / "straight", steps)
    yield Outcome("kill", n, f"{in_save} in a save; 0 checkpoints lost; end equal: {same}", same)


def kill_commands(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """The same with whole processes and the clock running."""
    config = place.write_config("commands", train={"max_steps": 1500, "log_interval": 10})
    plain = [sys.executable, "-m", "gptlite", "train", "-c", str(config), "--out-dir"]
    whole, run_dir = place.folder / "whole", place.folder / "pieces"
    assert subprocess.run([*plain, str(whole)], capture_output=True).returncode == 0
    command = [*plain, str(run_dir), "--resume", "auto"]
    before = 0
    for _ in range(n):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 4.5))
        process.kill()
        process.wait()
        now = newest_step(run_dir)
        assert now >= before
        before = now
    assert subprocess.run(command, capture_output=True).returncode == 0
    same = without_clocks(run_dir) == without_clocks(whole)
    yield Outcome("kill, whole processes", n, f"0 checkpoints lost; end equal: {same}", same)


def record_run(place: Workplace, n: int) -> list[Operation]:
    """The operations of a run of n updates that stops and goes on, with what it has reported."""
    disk, save = RecordingDisk(place.folder), Session.save

    def save_with_note(self: Session) -> None:
        save(self)
        rows = (self.directory / "metrics.jsonl").read_bytes()
        disk.note({"step": self.trainer.step, "rows": rows})

    train = {"save_interval": max(1, n // 4), "eval_interval": 2, "keep_last": 2}
    sections = {
        "model": {"n_layer": 1, "n_embd": 8, "n_head": 1, "context_length": 8},
        "optim": {"warmup_steps": 1},
    }
    Session.save = save_with_note  # type: ignore[method-assign]
    try:
        for steps, resume in ((n // 2, False), (n, True)):
            config = place.write_config("power", train={**train, "max_steps": steps}, **sections)
            run = load_run([str(config)], [f"out_dir={json.dumps(str(place.folder / 'run'))}"])
            if not resume:
                prepare(run)  # the cache is not part of the run
            with use_disk(disk):
                start.train(run, place.folder / "run", resume=resume)
    finally:
        Session.save = save  # type: ignore[method-assign]
    return disk.operations


def find_damage(run_dir: Path, note: dict[str, Any] | None) -> str | None:
    """What a run would miss that goes on here; `note` is what it had reported."""
    told = note or {"step": 0, "rows": b""}
    if told["step"] and not (run_dir / "config.yaml").is_file():
        return "the run is gone"
    if not (run_dir / "checkpoints").is_dir():
        return None
    try:
        if told["step"]:
            load_run([str(run_dir / "config.yaml")])
        found = checkpoint.recover(run_dir, lambda state: None)
        step = found.state.step if found else 0
        if found and found.problems or step < told["step"]:
            return f"step {told['step']} was saved, step {step} is found"
        for name in ("last", "best") if told["step"] else ():
            if checkpoint.choose(run_dir, name).problems:
                return f"{name} names nothing good"
        if told["step"] and checkpoint.choose(run_dir, "last").state.step < told["step"]:
            return "last is old"
    except UserError as error:
        return str(error)
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_bytes() if metrics.is_file() else b""
    return (
        None if rows.startswith(told["rows"]) or is_cut_on_resume(rows, step) else "rows are gone"
    )


def is_cut_on_resume(rows: bytes, step: int) -> bool:
    """Whether these are all rows until a step: who resumes there has cut what came after."""
    steps = [json.loads(line)["step"] for line in rows.splitlines()]
    return steps == list(range(1, step + 1))


def find_problems(
    operations: list[Operation], seed: int, *, without: str = "", enough: int = 10**9
) -> tuple[int, list[str]]:
    """How many states a loss of power can leave, and what is wrong with which."""
    problems, count = [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for tree, note in crash_states(operations, seed, without=without):
            count += 1
            target = Path(folder) / "state"
            lay_out(tree, target)
            if problem := find_damage(target / "run", note):
                problems.append(problem)
            shutil.rmtree(target)
            if len(problems) >= enough:
                break
    return count, problems


def lose_power(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Every state after a loss of power is sound, and each fsync is needed for that."""
    operations, seed = record_run(place, n), rng.randrange(2**32)
    count, problems = find_problems(operations, seed)
    example = f": {problems[0]}" if problems else ""
    result = f"{len(problems)} without a good checkpoint{example}"
    yield Outcome("power loss", count, result, not problems)
    sites = sorted({operation.site for operation in operations if operation.kind == "sync"})
    caught = [site for site in sites if find_problems(operations, seed, without=site, enough=1)[1]]
    noticed = f"{len(caught)} noticed"
    yield Outcome("power loss, one fsync removed", len(sites), noticed, caught == sites)


FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)


def break_disk(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """A disk that fails at each operation of a run in turn, for good or once (n < 100: at some)."""
    steps = 12
    config = place.write_config("storage", train={"max_steps": steps, "save_interval": 4})
    counting = WatchedDisk()
    with use_disk(counting):
        run = load_run([str(config)], [f"out_dir={json.dumps(str(place.folder / 'count'))}"])
        start.train(run, place.folder / "count")
    want = run_digest(place.folder / "count", steps)
    every = [(at, errno.ENOSPC, 10**9) for at in range(1, counting.n_operations + 1)]
    every = every if n >= 100 else rng.sample(every, 2 * n)
    others = [
        (rng.randint(1, counting.n_operations), rng.choice(FAULTS), rng.choice((1, 2, 10**9)))
        for _ in range(n)
    ]
    went_on = 0
    for number, (at, fault, times) in enumerate(every + others):
        name = f"fault-{number}"
        disk = FailingDisk(at, fault, times)
        code = place.run(config, name, prepare=partial(set_disk, disk))
        said = place.stderr_lines(name)
        assert code in (0, 5), (at, fault, times, code, said[-3:])
        if code == 5:
            assert os.strerror(fault) in said[-1], said[-1]
            assert not any("Traceback" in line for line in said)
        went_on += code == 0
        run_dir = place.folder / name
        newest_step(run_dir)
        left = [p for p in run_dir.rglob(".*-*") if times == 1]
        assert not left, left
        assert place.run(config, name, "--resume", "auto") == 0, place.stderr_lines(name)[-2:]
        assert run_digest(run_dir, steps) == want
        shutil.rmtree(run_dir)
    result = f"exit 5 and one line, or {went_on} times saved at another attempt; all went on equal"
    yield Outcome("disk fails at an operation", len(every + others), result, True)


def refuse_storage(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """What the system itself refuses: files too large, too little space, a folder that vanishes."""
    config = place.write_config("others", train={"max_steps": 2000, "save_interval": 2})

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def leave_no_space() -> None:
        WatchedDisk.free_bytes = lambda self, path: 1000  # type: ignore[method-assign]
        set_disk(WatchedDisk())

    for name, limit, what in (
        ("small", limit_file_size, "File too large"),
        ("space", leave_no_space, "MiB of free disk"),
    ):
        assert place.run(config, name, prepare=limit) == 5
        assert what in place.stderr_lines(name)[-1], place.stderr_lines(name)[-1]
        assert not checkpoint.folders(place.folder / name)
    for number in range(n):
        name = f"gone-{number}"
        pid = place.start(config, name)
        time.sleep(rng.uniform(0.15, 0.5))
        shutil.rmtree(place.folder / name, ignore_errors=True)
        code = wait_for_exit(pid)
        assert code == 5, (code, place.stderr_lines(name)[-2:])
        shutil.rmtree(place.folder / name, ignore_errors=True)
    yield Outcome("files too large, no space, vanished folder", 2 + n, "exit 5, one line", True)
