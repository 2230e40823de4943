"""What a run is: resumed exactly, damaged files found, nothing that is not finite kept."""

import itertools
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults import DyingDisk, WatchedDisk, set_disk
from torture_runs import Outcome, Workplace, run_digest

from gptlite import storage
from gptlite.core import tensor_files
from gptlite.core.train import Trainer
from gptlite.core.weights import FILES
from gptlite.data.token_files import open_token_files
from gptlite.errors import CheckpointError, DataError
from gptlite.runs import checkpoint

STEPS = 16
PRESETS: dict[str, dict[str, Any]] = {
    "none": {"preset": "none", "rate": None},
    "gpt2": {"preset": "gpt2", "rate": 0.2},
    "structured": {
        **{"preset": "none", "rate": None, "schedule": {"mode": "late", "until": 0.3}},
        "sites": {
            **{"head": 0.2, "layer": {"rate": 0.2, "scale": "inverted"}, "key": 0.1},
            **{"token": 0.1, "mlp_output": {"rate": 0.2, "granularity": "locked"}},
        },
    },
}
GRID: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw", "muon"),
    "accumulation": (1, 4),
    "dropout": tuple(PRESETS),
    "layout": ("stream", "documents"),
    "dtype": ("float32", "bfloat16", "float16"),
}


class SignallingDisk(WatchedDisk):
    """Sends its own process a signal at an operation."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__()
        self.at, self.number = at, number

    def interfere(self, operation: str, path: Path) -> None:
        if self.n_operations == self.at:
            os.kill(os.getpid(), self.number)


def grid_configs() -> Iterator[dict[str, Any]]:
    """Every combination of the grid, with a cadence of its own."""
    for number, values in enumerate(itertools.product(*GRID.values())):
        chosen = dict(zip(GRID, values, strict=True))
        fuses = chosen["dropout"] != "structured" and chosen["dtype"] != "float16"
        yield {
            "dtype": chosen["dtype"],
            "attention": "fused" if fuses and number % 2 else "math",
            "data": {"layout": chosen["layout"]},
            "dropout": PRESETS[chosen["dropout"]],
            "optim": {"name": chosen["optimizer"]},
            "train": {
                **{"max_steps": STEPS, "micro_batch_size": 4 // chosen["accumulation"]},
                **{"save_interval": (1, 3, 5)[number % 3], "eval_interval": (2, 7)[number % 2]},
            },
        }


def resume_exactly(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Killed or stopped twice and resumed: state and metrics as if nothing had happened."""
    chosen = list(grid_configs())
    if n < len(chosen):
        chosen = rng.sample(chosen, n)
    n_equal = 0
    for number, sections in enumerate(chosen):
        config = place.write_config(f"exact-{number}", **sections)
        whole, pieces = f"a-{number}", f"b-{number}"
        assert place.run(config, whole) == 0, place.stderr_lines(whole)
        dying = DyingDisk(rng.randint(40, 80))
        stopped = SignallingDisk(rng.randint(25, 50), signal.SIGTERM)
        for disk in (dying, stopped):
            place.run(config, pieces, "--resume", "auto", prepare=partial(set_disk, disk))
        assert place.run(config, pieces, "--resume", "auto") == 0, place.stderr_lines(pieces)
        digests = [run_digest(place.folder / name, STEPS) for name in (whole, pieces)]
        n_equal += digests[0] == digests[1]
        for name in (whole, pieces):
            shutil.rmtree(place.folder / name)
    result = f"{n_equal} equal bit for bit"
    yield Outcome("resume = uninterrupted", len(chosen), result, n_equal == len(chosen))


def change_pace(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Evaluating, saving, logging and sampling at any pace leave weights and losses alone."""
    losses, weights = set(), set()
    paces = list(itertools.product((1, 7), (1, 5), (1, 4), (0, 1)))[:n]
    for number, (evaluate, save, log, sample) in enumerate(paces):
        train = {"eval_interval": evaluate, "save_interval": save, "log_interval": log}
        more = {"train": {"max_steps": STEPS, **train}, "sample": {"interval": sample}}
        assert place.run(place.write_config("pace", **more), f"pace-{number}") == 0
        run_dir = place.folder / f"pace-{number}"
        folder = run_dir / "checkpoints" / checkpoint.folder_name(STEPS)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.add(tuple(row["train/loss"] for row in rows if row["step"] % 4 == 0))
        weights.add(b"".join((folder / name).read_bytes() for name in FILES))
    same = len(losses) == len(weights) == 1
    result = "all alike" if same else f"{len(weights)} different ends"
    yield Outcome("pace of evaluation, saving, logging, sampling", len(paces), result, same)


def damage(whole: bytes, rng: random.Random, cut: bool) -> bytes:
    """With one byte changed, or cut at one."""
    at = rng.randrange(len(whole))
    if cut:
        return whole[:at]
    byte = (whole[at] + rng.randint(1, 255)) % 256
    return whole[:at] + bytes([byte]) + whole[at + 1 :]


def corrupt_files(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """n bytes changed and n/10 files cut: each is found, and the run goes on from before."""
    config = place.write_config(
        "corrupt", train={"max_steps": 12, "save_interval": 4, "keep_last": 3}
    )
    assert place.run(config, "corrupt") == 0
    run_dir = place.folder / "corrupt"
    newest = checkpoint.folders(run_dir)[-1]
    (tokens,) = (place.folder / "cache" / "tokens").iterdir()
    checks: dict[Path, Callable[[], object]] = {newest: lambda: checkpoint.read_state(newest)}
    checks[tokens] = lambda: open_token_files(tokens)
    files = [(file, check) for folder, check in checks.items() for file in folder.iterdir()]
    unnoticed = []
    trials = [False] * n + [True] * (n // 10)
    for cut in trials:
        file, check = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damage(whole, rng, cut))
        try:
            check()
            unnoticed.append(file)
        except (CheckpointError, DataError):
            pass
        file.write_bytes(whole)
    result = f"{len(trials) - len(unnoticed)} found"
    yield Outcome("bytes changed, files cut", len(trials), result, not unnoticed)
    yield from pass_over_damaged(place, config, rng, max(2, n // 150))


def pass_over_damaged(
    place: Workplace, config: Path, rng: random.Random, n: int
) -> Iterator[Outcome]:
    """A run whose newest checkpoint is damaged goes on from the one before, and says so."""
    want = run_digest(place.folder / "corrupt", 12)
    for number in range(n):
        run_dir = place.folder / f"damaged-{number}"
        shutil.copytree(place.folder / "corrupt", run_dir)
        folders = checkpoint.folders(run_dir)
        hurt = folders[-1 - number % 2 :] if number % 5 else folders
        for folder in hurt:
            file = rng.choice(list(folder.iterdir()))
            file.write_bytes(damage(file.read_bytes(), rng, rng.random() < 0.2))
        code = place.run(config, run_dir.name, "--resume", "auto")
        said = "\n".join(place.stderr_lines(run_dir.name))
        assert all(str(folder) in said for folder in hurt), said
        if hurt == folders:
            assert code == 3
            assert place.run(config, run_dir.name, "--resume", "auto") == 3  # and stays so
        else:
            assert code == 0, said
            left = checkpoint.read_state(folders[-1 - len(hurt)]).step
            assert f"resumed at step {left} of 12" in said
            assert run_digest(run_dir, 12) == want
        shutil.rmtree(run_dir)
    yield Outcome("damaged checkpoint passed over and named", n, "none restarted from zero", True)


def poison_updates(kind: str, first: int, times: int) -> None:
    """In a child: losses or gradients of some updates are not finite."""
    accumulate = Trainer.accumulate

    def poison(self: Trainer, batch: Any) -> torch.Tensor:
        loss = accumulate(self, batch)
        if not first <= self.step + 1 < first + times:
            return loss
        if kind == "loss":
            return loss * math.nan
        gradient = self.parameters[-1].grad
        assert gradient is not None
        gradient.view(-1)[0] = math.inf if kind == "gradient" else math.nan
        return loss

    setattr(Trainer, "accumulate", poison)  # noqa: B010


def diverge(place: Workplace, rng: random.Random, n: int) -> Iterator[Outcome]:
    """Losses and gradients that are not finite: what is left is finite, and what is said helps."""
    train = {"max_steps": 40, "save_interval": 1, "keep_last": "all"}
    config = place.write_config("healthy", train=train)
    assert place.run(config, "healthy") == 0
    cases = list(itertools.product(("loss", "gradient", "nan"), (1, 3, 50), ("stop", "skip")))
    cases = cases if n >= len(cases) else rng.sample(cases, n)
    for number, (kind, times, policy) in enumerate(cases):
        first, name = rng.randint(2, 20), f"poisoned-{number}"
        train = {"max_steps": 40, "save_interval": 7, "on_nonfinite": policy}
        config = place.write_config(name, train=train)
        poison = partial(poison_updates, kind, first, times)
        code = place.run(config, name, prepare=poison)
        run_dir, said = place.folder / name, place.stderr_lines(name)
        last = checkpoint.choose(run_dir, "last")
        tensors = [tensor_files.read_tensors(last.path / file) for file in FILES]
        assert all(t.isfinite().all() for part in tensors for t in part.values())
        if policy == "stop":
            assert code == 4, said[-2:]
            assert last.state.step == first - 1
            for word in (f"step {first}:", "loss", "gradient norm", str(last.path), "optim.lr"):
                assert word in said[-1], said[-1]
            for file in FILES:
                healthy = place.folder / "healthy" / "checkpoints" / last.path.name / file
                assert healthy.read_bytes() == (last.path / file).read_bytes()
        else:
            assert code == (4 if times > 10 else 0), said[-2:]
            disk = DyingDisk(rng.randint(40, 90))
            assert resume_poisoned(place, config, name, poison, disk) == code
    yield Outcome("not finite: stop and skip", len(cases), "nothing of it kept; exit 4", True)
    yield from poison_tokens(place)


def resume_poisoned(
    place: Workplace, config: Path, name: str, poison: Callable[[], None], disk: DyingDisk
) -> int:
    """A run that skips updates is as exact when it is killed and resumed; its exit code."""
    twin = f"{name}-twin"

    def prepare() -> None:
        poison()
        set_disk(disk)

    place.run(config, twin, prepare=prepare)
    code = place.run(config, twin, "--resume", "auto", prepare=poison)
    step = checkpoint.choose(place.folder / name, "last").state.step
    assert run_digest(place.folder / name, step) == run_digest(place.folder / twin, step)
    return code


def poison_tokens(place: Workplace) -> Iterator[Outcome]:
    """Token files that name a token beyond the vocabulary, with digests that fit."""
    config = place.write_config("ids", train={"max_steps": 5})
    assert place.run(config, "ids") == 0
    (tokens,) = (place.folder / "cache" / "tokens").iterdir()
    whole = (tokens / "train.bin").read_bytes()
    (tokens / "train.bin").write_bytes(whole[:-2] + b"\xff\xff")
    meta = storage.unseal((tokens / "meta.json").read_text())
    meta["splits"]["train"]["sha256"] = storage.file_digest(tokens / "train.bin")
    (tokens / "meta.json").write_text(storage.seal(meta))
    assert place.run(config, "ids-2") == 2
    (line,) = place.stderr_lines("ids-2")
    assert "token 65535" in line, line
    shutil.rmtree(tokens)
    yield Outcome("token beyond the vocabulary", 1, "exit 2, file and offset named", True)
