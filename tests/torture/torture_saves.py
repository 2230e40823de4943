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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import (
    Dying,
    Failing,
    Operation,
    Recording,
    Watched,
    lay_out,
    states,
    sync_sites,
    using,
)
from torture_runs import Outcome, Workplace, digest, on_disk, wait

from gptlite import storage
from gptlite.core.weights import FILES
from gptlite.data.prepare import prepare
from gptlite.errors import UserError
from gptlite.runs import checkpoint, start
from gptlite.runs.origin import load_run
from gptlite.runs.session import Session

CLOCKS = ("elapsed_seconds", "tokens_per_second")


class DyingInSave(Dying):
    """Counts only what happens below checkpoints/."""

    def counts(self, path: Path) -> bool:
        return "checkpoints" in path.parts


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint, which must be good; 0 if there is none yet."""
    found = checkpoint.folders(run_dir)
    if not found:
        assert checkpoint.read_pointer(run_dir, "last") is None
        return 0
    step = checkpoint.read_state(found[-1]).step
    pointed = checkpoint.read_pointer(run_dir, "last")
    assert pointed is None or step >= int(pointed[-8:])
    return step


def killed(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """One run, killed n times: half of them at an operation of a save, the others anywhere."""
    steps = 8 * n + 800  # a quiet machine makes hundreds before a kill by the clock
    config = place.config("chain", train={"max_steps": steps, "log_interval": 2, "keep_last": 3})
    assert place.run(config, "straight") == 0
    in_save = kills = before = 0
    while kills < n:
        more = ["--resume", "auto"]
        kind = rng.choice(("save", "save", "operation", "time"))
        if kind == "time":
            pid = place.start(config, "chain", *more)
            time.sleep(rng.uniform(0, 0.4))
            os.kill(pid, signal.SIGKILL)
        else:
            dying = DyingInSave(rng.randint(1, 20)) if kind == "save" else Dying(rng.randint(1, 60))
            pid = place.start(config, "chain", *more, prepared=on_disk(dying))
        code = wait(pid)
        assert code == -signal.SIGKILL, (code, place.said("chain")[-3:])
        now = newest(place.folder / "chain")
        assert now >= before, f"step {before} was lost: {now}"
        kills, before, in_save = kills + 1, now, in_save + (kind == "save")
    assert before < steps
    assert place.run(config, "chain", "--resume", "auto") == 0
    left = [p for p in (place.folder / "chain").rglob(".*") if storage.LEFT_BEHIND.match(p.name)]
    assert not left, left
    same = digest(place.folder / "chain", steps) == digest(place.folder / "straight", steps)
    yield Outcome("kill", n, f"{in_save} in a save; 0 checkpoints lost; end equal: {same}", same)


def killed_commands(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """The same with whole processes and the clock running."""
    config = place.config("commands", train={"max_steps": 1500, "log_interval": 10})
    plain = [sys.executable, "-m", "gptlite", "train", "-c", str(config), "--out-dir"]
    assert (
        subprocess.run([*plain, str(place.folder / "whole")], capture_output=True).returncode == 0
    )
    run_dir, before = place.folder / "pieces", 0
    for _ in range(n):
        process = subprocess.Popen(
            [*plain, str(run_dir), "--resume", "auto"], stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.5, 4.5))
        process.kill()
        process.wait()
        now = newest(run_dir)
        assert now >= before
        before = now
    last = [*plain, str(run_dir), "--resume", "auto"]
    assert subprocess.run(last, capture_output=True).returncode == 0
    same = timeless(run_dir, 1500) == timeless(place.folder / "whole", 1500)
    yield Outcome("kill, whole processes", n, f"0 checkpoints lost; end equal: {same}", same)


def timeless(run_dir: Path, step: int) -> Any:
    folder = run_dir / "checkpoints" / checkpoint.folder_name(step)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    return kept, [(folder / name).read_bytes() for name in FILES]


def recorded(place: Workplace, n: int) -> list[Operation]:
    """The operations of a run of n updates that stops and goes on, with what it has reported."""
    disk, save = Recording(place.folder), Session.save

    def noting_save(self: Session) -> None:
        save(self)
        rows = (self.directory / "metrics.jsonl").read_bytes()
        best = None if self.best is None else self.best.step
        disk.note({"step": self.trainer.step, "best": best, "rows": rows})

    train = {"save_interval": max(1, n // 4), "eval_interval": 2, "keep_last": 2}
    small = {"n_layer": 1, "n_embd": 8, "n_head": 1, "context_length": 8}
    brief = {"warmup_steps": 1}
    Session.save = noting_save  # type: ignore[method-assign]
    try:
        for steps, resume in ((n // 2, False), (n, True)):
            config = place.config(
                "power", train={**train, "max_steps": steps}, model=small, optim=brief
            )
            run = load_run([str(config)], [f"out_dir={json.dumps(str(place.folder / 'run'))}"])
            if not resume:
                prepare(run)  # the cache is not part of the run
            with using(disk):
                start.train(run, place.folder / "run", resume=resume)
    finally:
        Session.save = save  # type: ignore[method-assign]
    return disk.operations


def unsound(run_dir: Path, note: dict[str, Any] | None) -> str | None:
    """What a run would miss that goes on here; `note` is what it had reported."""
    told = note or {"step": 0, "best": None, "rows": b""}
    if told["step"] and not (run_dir / "config.yaml").is_file():
        return "the run is gone"
    if not (run_dir / "checkpoints").is_dir():
        return None
    try:
        load_run([str(run_dir / "config.yaml")]) if told["step"] else None
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
    return None if rows.startswith(told["rows"]) or cut_on_resume(rows, step) else "rows are gone"


def cut_on_resume(rows: bytes, step: int) -> bool:
    """Whether these are all rows until a step: who resumes there has cut what came after."""
    steps = [json.loads(line)["step"] for line in rows.splitlines()]
    return steps == list(range(1, step + 1))


def failures(
    operations: list[Operation], seed: int, *, without: str = "", enough: int = 10**9
) -> tuple[int, list[str]]:
    """How many states a loss of power can leave, and what is wrong with which."""
    problems, count = [], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for tree, note in states(operations, seed, without=without):
            count += 1
            target = Path(folder) / "state"
            lay_out(tree, target)
            if problem := unsound(target / "run", note):
                problems.append(problem)
            shutil.rmtree(target)
            if len(problems) >= enough:
                break
    return count, problems


def power(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Every state after a loss of power is sound, and each fsync is needed for that."""
    operations, seed = recorded(place, n), rng.randrange(2**32)
    count, problems = failures(operations, seed)
    example = f": {problems[0]}" if problems else ""
    result = f"{len(problems)} without a good checkpoint{example}"
    yield Outcome("power loss", count, result, not problems)
    sites = sync_sites(operations)
    caught = [site for site in sites if failures(operations, seed, without=site, enough=1)[1]]
    missed = ", ".join(set(sites) - set(caught)) or "none"
    yield Outcome(
        "power loss, one fsync removed", len(sites), f"{len(caught)} noticed", missed == "none"
    )


FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES)


def impatient(put: Callable[[], None]) -> Callable[[], None]:
    def prepared() -> None:
        checkpoint.SECONDS_BETWEEN_ATTEMPTS = 0
        put()

    return prepared


def broken_disk(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """A disk that fails at each operation of a run in turn, for good or once (n < 100: at some)."""
    steps = 12
    config = place.config("storage", train={"max_steps": steps, "save_interval": 4})
    counting = Watched()
    with using(counting):
        run = load_run([str(config)], [f"out_dir={json.dumps(str(place.folder / 'count'))}"])
        start.train(run, place.folder / "count")
    want = digest(place.folder / "count", steps)
    every = [(at, errno.ENOSPC, 10**9) for at in range(1, counting.n_operations + 1)]
    every = every if n >= 100 else rng.sample(every, 2 * n)
    others = [
        (rng.randint(1, counting.n_operations), rng.choice(FAULTS), rng.choice((1, 2, 10**9)))
        for _ in range(n)
    ]
    went_on = 0
    for number, (at, fault, times) in enumerate(every + others):
        name = f"fault-{number}"
        code = place.run(config, name, prepared=impatient(on_disk(Failing(at, fault, times))))
        said = place.said(name)
        assert code in (0, 5), (at, fault, times, code, said[-3:])
        if code == 5:
            assert os.strerror(fault) in said[-1], said[-1]
            assert not any("Traceback" in line for line in said)
        went_on += code == 0
        run_dir = place.folder / name
        newest(run_dir)
        left = [p for p in run_dir.rglob(".*-*") if times == 1]
        assert not left, left
        assert place.run(config, name, "--resume", "auto") == 0, place.said(name)[-2:]
        assert digest(run_dir, steps) == want
        shutil.rmtree(run_dir)
    result = f"exit 5 and one line, or {went_on} times saved at another attempt; all went on equal"
    yield Outcome("disk fails at an operation", len(every + others), result, True)


def other_disks(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """What the system itself refuses: files too large, too little space, a folder that vanishes."""
    config = place.config("others", train={"max_steps": 2000, "save_interval": 2})

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def no_space() -> None:
        Watched.free_bytes = lambda self, path: 1000  # type: ignore[method-assign]
        on_disk(Watched())()

    for name, put, what in (
        ("small", small_files, "File too large"),
        ("space", no_space, "MiB of free disk"),
    ):
        assert place.run(config, name, prepared=impatient(put)) == 5
        assert what in place.said(name)[-1], place.said(name)[-1]
        assert not checkpoint.folders(place.folder / name)
    gone = 0
    for number in range(n):
        pid = place.start(config, f"gone-{number}", prepared=impatient(lambda: None))
        time.sleep(rng.uniform(0.15, 0.5))
        shutil.rmtree(place.folder / f"gone-{number}", ignore_errors=True)
        code = wait(pid)
        assert code == 5, (code, place.said(f"gone-{number}")[-2:])
        gone += 1
        shutil.rmtree(place.folder / f"gone-{number}", ignore_errors=True)
    yield Outcome("files too large, no space, vanished folder", 2 + gone, "exit 5, one line", True)
