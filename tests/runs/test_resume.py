"""Going on: from the newest good checkpoint, never from zero, never in another run's place."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, trainer_on
from typer.testing import CliRunner

from gptlite import locks
from gptlite.cli.main import app
from gptlite.core.train import MOST_SKIPPED, Trainer
from gptlite.core.weights import FILES
from gptlite.core.world import World
from gptlite.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    RunInUseError,
    Stopped,
    Terminated,
)
from gptlite.runs import checkpoint, resume
from gptlite.runs.directory import hold_directory, refuse_if_held
from gptlite.runs.interrupts import Interrupted, Interrupts
from gptlite.runs.origin import load_run
from gptlite.runs.session import Session
from gptlite.runs.start import train


def harm(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def weights(directory: Path, step: int) -> list[bytes]:
    folder = directory / "checkpoints" / checkpoint.folder_name(step)
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture
def trained(workshop: Workshop) -> Path:
    directory = workshop.folder / "run"
    train(workshop.run(train={"save_interval": 2, "keep_last": "all"}), directory)
    return directory


def test_a_damaged_checkpoint_is_passed_over_set_aside_and_named(
    workshop: Workshop, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want, newest = weights(trained, 8), checkpoint.folders(trained)[-1]
    harm(newest)
    train(workshop.run(train={"save_interval": 2, "keep_last": "all"}), trained, resume=True)
    said = capsys.readouterr().err
    assert f"{newest}/model.safetensors: damaged (sha256 differs from state.json)" in said
    assert "resumed at step 6 of 8" in said
    assert newest.with_name(f"{newest.name}.corrupt").is_dir()
    assert weights(trained, 8) == want
    harm(newest)  # again: the name to set it aside under is taken
    train(workshop.run(train={"save_interval": 2, "keep_last": "all"}), trained, resume=True)
    assert newest.with_name(f"{newest.name}.corrupt-2").is_dir()


@pytest.mark.parametrize("then", ["at once", "again", "without folders"])
def test_a_run_whose_checkpoints_are_all_bad_never_starts_over(
    workshop: Workshop, trained: Path, then: str
) -> None:
    for folder in checkpoint.folders(trained):
        harm(folder)
    with pytest.raises(CheckpointError, match="no usable checkpoint is left; begin anew"):
        train(workshop.run(), trained, resume=True)
    if then == "without folders":
        for folder in (trained / "checkpoints").glob("*.corrupt"):
            shutil.rmtree(folder)
    if then != "at once":
        with pytest.raises(CheckpointError, match="no usable checkpoint is left; begin anew"):
            train(workshop.run(), trained, resume=True)


def test_a_run_that_had_saved_nothing_begins_again(
    workshop: Workshop, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = weights(trained, 8)
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(CheckpointError, match="has ended .* but its checkpoints are gone"):
        train(workshop.run(), trained, resume=True)
    (trained / "summary.json").unlink()
    train(workshop.run(), trained, resume=True)
    assert "nothing had been saved yet: begun again" in capsys.readouterr().err
    assert weights(trained, 8) == want


def test_a_checkpoint_of_another_run_is_not_taken(
    workshop: Workshop, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = workshop.folder / "other"
    train(workshop.run(seed=7, train={"max_steps": 9, "save_interval": 9}), other)
    shutil.copytree(other / "checkpoints" / "step-00000009", trained / "checkpoints/step-00000009")
    train(workshop.run(), trained, resume=True)
    assert "step-00000009: of another run (seed: 1337 -> 7)" in capsys.readouterr().err
    assert checkpoint.folders(trained)[-1].name == "step-00000008"


def test_a_config_that_was_edited_costs_no_checkpoint(workshop: Workshop, trained: Path) -> None:
    """All of its checkpoints are of another run then, and none may be set aside."""
    config = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(config.replace("n_embd: 32", "n_embd: 16"))
    before = [path.name for path in checkpoint.folders(trained)]
    with pytest.raises(CheckpointError, match=r"config\.yaml: is not what its .* undo the change"):
        train(workshop.run(model={"n_embd": 16}), trained, resume=True)
    assert [path.name for path in checkpoint.folders(trained)] == before
    (trained / "config.yaml").write_text(config)
    train(workshop.run(train={"max_steps": 9}), trained, resume=True)
    assert checkpoint.folders(trained)[-1].name == "step-00000009"


def test_what_has_changed_around_a_run_is_said_and_strictly_refused(
    workshop: Workshop, trained: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now = resume.fingerprint
    monkeypatch.setattr(resume, "fingerprint", lambda *of: {**now(*of), "torch": "9.9"})
    train(workshop.run(), trained, resume=True)
    change = f"torch: {torch.__version__} -> 9.9"
    assert f"not as when it was saved: {change}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"--resume: {change}".replace("+", r"\+")):
        train(workshop.run(), trained, resume=True, strict=True)


def test_a_compiled_run_goes_on_where_there_is_no_compiler(
    workshop: Workshop, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the same run, but for the last bits, which is said."""
    config = (trained / "config.yaml").read_text()
    assert "compile: false" in config
    (trained / "config.yaml").write_text(config.replace("compile: false", "compile: true"))
    train(workshop.run(compile=False, train={"max_steps": 10}), trained, resume=True)
    assert "resumed at step 8 of 10" in capsys.readouterr().err
    state = checkpoint.choose(trained, "last").state
    compiled = workshop.run(compile=True)
    changes = resume.changed_surroundings(compiled, state.environment, 1)
    assert "compile: False -> True" in changes


def test_a_run_does_not_stand_on_the_file_it_came_from(workshop: Workshop, trained: Path) -> None:
    """What safetensors reads is mapped; a file that changes meanwhile must not change the run."""
    found = checkpoint.choose(trained, "last")
    resumed = trainer_on(load_run([str(trained / "config.yaml")]), workshop.files())
    checkpoint.restore(resumed, found)
    before = {k: v.clone() for part in resumed.tensors().values() for k, v in part.items()}
    for name in FILES:
        size = (found.path / name).stat().st_size
        with (found.path / name).open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size // 2))
    after = {k: v for part in resumed.tensors().values() for k, v in part.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


# Signals


@pytest.fixture(autouse=True)
def _listening() -> Iterator[None]:
    """Who starts the tests may ignore Ctrl-C, as a shell does for what runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    with Interrupts().catch_signals() as listening:
        yield listening


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_first_signal_is_noted_and_a_second_leaves(interrupts: Interrupts, name: str) -> None:
    number = getattr(signal, name)
    signal.raise_signal(number)
    assert interrupts.received == number
    with pytest.raises(Terminated if name == "SIGTERM" else KeyboardInterrupt):
        signal.raise_signal(number)


def test_a_signal_cuts_what_changes_nothing(interrupts: Interrupts) -> None:
    with pytest.raises(Interrupted), interrupts.raise_at_once():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted), interrupts.raise_at_once():
        pytest.fail("begun although a signal had come")


def test_a_signal_that_comes_while_ranks_agree_is_not_lost() -> None:
    class Agreeing(World):
        def largest(self, number: int) -> int:
            signal.raise_signal(signal.SIGTERM)
            return number

    with Interrupts(Agreeing(2)).catch_signals() as listening:
        listening.poll()
        listening.world = World(2)
        with pytest.raises(Interrupted):
            listening.poll()
    assert listening.received == signal.SIGTERM


def test_what_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().catch_signals() as listening:
            signal.raise_signal(signal.SIGHUP)
            assert not listening.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("inside", ["evaluate", "sample", "save", "updates"])
def test_a_run_that_was_told_to_stop_goes_on_as_if_it_had_not(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """Wherever the signal comes: in an evaluation, in a sample, while saving, in an update."""
    run = workshop.run(
        dropout={"preset": "gpt2", "rate": 0.3},
        train={"eval_interval": 2, "save_interval": 4},
        sample={"interval": 2},
    )
    straight, directory = workshop.folder / "straight", workshop.folder / "run"
    train(run, straight)
    interrupt_in(monkeypatch, inside)
    with pytest.raises(Stopped, match="stopped at step 4, saved; go on with") as caught:
        train(run, directory)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    train(run, directory, resume=True)
    assert weights(directory, 8) == weights(straight, 8)
    rows = [timeless(each) for each in (directory, straight)]
    assert rows[0] == rows[1]
    samples = [sorted((each / "samples").iterdir()) for each in (directory, straight)]
    assert [p.read_text() for p in samples[0]] == [p.read_text() for p in samples[1]]
    last = [checkpoint.choose(each, "last").state for each in (directory, straight)]
    assert (last[0].best, last[0].pending) == (last[1].best, None)


@pytest.mark.parametrize("inside", ["evaluate", "sample"])
def test_what_was_cut_short_at_the_last_step_is_done_and_saved(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """Once, although that step is neither the best nor due to be saved."""
    getting_worse = {"lr": 3.0, "min_lr": 3.0, "warmup_steps": 0}
    train_ = {"eval_interval": 2, "save_interval": 100}
    run = workshop.run(optim=getting_worse, train=train_, sample={"interval": 2})
    train(run, workshop.folder / "straight")
    interrupt_in(monkeypatch, inside, 8)
    with pytest.raises(Stopped, match="step 8"):
        train(run, workshop.folder / "run")
    assert checkpoint.choose(workshop.folder / "run", "last").state.pending
    summary = train(run, workshop.folder / "run", resume=True)
    state = checkpoint.choose(workshop.folder / "run", "last").state
    assert summary["best"]["step"] < 8
    straight = checkpoint.choose(workshop.folder / "straight", "last").state
    given = {"run_id", "config", "elapsed_seconds", "wall_seconds"}
    assert state.model_dump(exclude=given) == straight.model_dump(exclude=given)
    assert timeless(workshop.folder / "run") == timeless(workshop.folder / "straight")


def interrupt_in(monkeypatch: pytest.MonkeyPatch, inside: str, at: int = 4) -> None:
    """Have a SIGTERM come at a step, once."""
    owner, name = {
        "evaluate": (sys.modules["gptlite.runs.session"], "measure"),
        "sample": (sys.modules["gptlite.runs.session"], "Generation"),
        "save": (Session, "save"),
        "updates": (Trainer, "accumulate"),
    }[inside]
    at -= inside == "updates"
    begun = getattr(owner, name)
    come: list[int] = []
    session: list[Session] = []
    initial = Session.__init__

    def begin(self: Session, *args: Any, **more: Any) -> None:
        session.append(self)
        initial(self, *args, **more)

    monkeypatch.setattr(Session, "__init__", begin)

    def interrupted(*args: Any, **more: Any) -> Any:
        if session and session[-1].trainer.step == at and not come:
            come.append(1)
            signal.raise_signal(signal.SIGTERM)
        return begun(*args, **more)

    monkeypatch.setattr(owner, name, interrupted)


def timeless(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    clocks = ("elapsed_seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


# What is not finite


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    accumulate = Trainer.accumulate

    def poisoned(self: Trainer, batch: Any) -> torch.Tensor:
        return accumulate(self, batch) * (torch.nan if self.step + 1 in steps else 1)

    monkeypatch.setattr(Trainer, "accumulate", poisoned)


def test_a_run_that_diverges_saves_the_step_before_and_says_what_to_try(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 6)
    directory = workshop.folder / "run"
    with pytest.raises(DivergedError) as caught:
        train(workshop.run(), directory)
    (line,) = caught.value.problems
    folder = directory / "checkpoints" / "step-00000005"
    assert line.startswith("step 6: loss nan, gradient norm ")
    assert (directory / "train.log").read_text().splitlines()[-1] == line
    assert f"the last good checkpoint is {folder}; try a lower optim.lr (now 0.001)" in line
    assert checkpoint.read_state(folder).step == 5


def test_a_run_that_diverges_at_once_has_nothing_saved(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    with pytest.raises(DivergedError, match="step 1: loss nan.*nothing was saved before"):
        train(workshop.run(), workshop.folder / "run")


def test_updates_are_skipped_if_asked_and_the_rest_is_as_exact(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first updates, too: a checkpoint then has no moments yet."""
    poison(monkeypatch, 1, 2, 5)
    train_ = {"on_nonfinite": "skip", "save_interval": 2, "keep_last": "all"}
    straight, directory = workshop.folder / "straight", workshop.folder / "run"
    train(workshop.run(train=train_), straight)
    said = capsys.readouterr().err
    assert "step 5: loss nan, gradient norm" in said
    assert "skipped (3 of at most 10 in 1000 updates)" in said
    assert [row["train/loss"] is None for row in timeless(straight)] == [
        *(step in (1, 2, 5) for step in range(1, 9))
    ]
    for step in (2, 6):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(straight, directory)
        for folder in checkpoint.folders(directory):
            if int(folder.name[-8:]) > step:
                shutil.rmtree(folder)
        train(workshop.run(train=train_), directory, resume=True)
        assert weights(directory, 8) == weights(straight, 8)
        assert timeless(directory) == timeless(straight)
        assert checkpoint.choose(directory, "last").state.skipped == [1, 2, 5]


def test_what_nobody_foresaw_leaves_its_place_in_the_log(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "accumulate", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(workshop.run(), workshop.folder / "run")
    log = (workshop.folder / "run" / "train.log").read_text()
    assert "ZeroDivisionError: division by zero" in log
    assert "in updates" in log


def test_skipping_has_a_bound(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *range(2, 100))
    run = workshop.run(train={"on_nonfinite": "skip", "max_steps": 50})
    with pytest.raises(DivergedError, match=rf"step {MOST_SKIPPED + 2}: .* after 10 skipped"):
        train(run, workshop.folder / "run")


# The lock


def test_a_lock_that_cannot_be_had_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on network file systems without locks."""

    def none(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with hold_directory(tmp_path):
        pass
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_who_looks_for_a_run_is_told_who_holds_it(tmp_path: Path) -> None:
    refuse_if_held(tmp_path)
    with hold_directory(tmp_path):
        with pytest.raises(RunInUseError, match=f"in use by pid {os.getpid()} on"):
            refuse_if_held(tmp_path)
        with (
            pytest.raises(RunInUseError, match="give another --out-dir"),
            hold_directory(tmp_path),
        ):
            pass
    refuse_if_held(tmp_path)
    with hold_directory(tmp_path):
        pass


def test_a_run_at_work_is_named_where_another_would_begin(trained: Path) -> None:
    with hold_directory(trained):
        arguments = ["train", "-c", str(trained / "config.yaml"), "--out-dir", str(trained)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 6
    assert "in use by pid" in result.stderr


def test_a_lock_file_holds_no_name_when_nobody_does(tmp_path: Path) -> None:
    with hold_directory(tmp_path):
        assert (tmp_path / ".lock").read_text()
    assert (tmp_path / ".lock").read_text() == ""
    with locks.open_lock(tmp_path) as ours, locks.open_lock(tmp_path) as theirs:
        assert locks.acquire(ours) is None
        assert locks.acquire(theirs) == "another process"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_jump_of_the_learning_rate_is_said(
    workshop: Workshop, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run that goes on has come down to its lowest rate; the longer schedule has not."""
    optim = {"schedule": schedule, "lr": 0.01, "min_lr": 0.001}
    directory = workshop.folder / "run"
    late = {"rate": 0.2, "schedule": {"mode": "late", "until": 0.75}}
    train(workshop.run(optim=optim, dropout=late), directory)
    train(workshop.run(optim=optim, dropout=late), directory, resume=True)
    assert "jumps" not in capsys.readouterr().err
    longer = workshop.run(optim=optim, dropout=late, train={"max_steps": 16})
    train(longer, directory, resume=True)
    said = capsys.readouterr().err
    assert ("learning rate: jumps from 0.001 to 0.0" in said) == (schedule != "constant")
    assert ("optim.lr: 0.001" in said) == (schedule != "constant")
    assert "dropout: jumps from 100% to 0% of its rates here" in said
    assert "spans 16 updates instead of 8" in said
