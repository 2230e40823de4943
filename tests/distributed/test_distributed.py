"""Ranks: the same batches, masks, losses, checkpoints and exit codes as one process has."""

import json
import os
import signal
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workshop, trainer_on
from ranks import NOISE, begun, ended, together

from gptlite.config.dropout import SITES
from gptlite.config.run import RunConfig
from gptlite.core import tensor_files
from gptlite.core.dropout import Dropout
from gptlite.core.model import GPT
from gptlite.core.train import Trainer
from gptlite.core.weights import FILES, RAW, model_tensors
from gptlite.core.world import World
from gptlite.errors import ConfigError, StorageError
from gptlite.planning.header import header_lines
from gptlite.planning.plan import plan_run
from gptlite.runs import checkpoint
from gptlite.runs.start import resolve_on_all_ranks, train

STEPS = 50
SHAPE = {"batch_size": 8, "max_steps": STEPS, "eval_interval": 25, "log_interval": 1}
RATES = {**dict.fromkeys(SITES, 0.1), "head": 0.2}


def run_of(workshop: Workshop, engine: str = "ddp", **sections: Any) -> RunConfig:
    torch.set_num_threads(1)
    train = {**SHAPE, **sections.pop("train", {})}
    return workshop.run(
        **{"attention": "math", "dtype": "float32", "train": train},
        **{"dropout": {"preset": "gpt2", "rate": 0.1, "sites": RATES}},
        **{"distributed": {"engine": engine}, "sample": {"max_new_tokens": 5}},
        **sections,
    )


def work(run: RunConfig, directory: Path, world: World, resume: bool = False) -> Any:
    return train(run, directory, resume=resume, world=world)


def apart(run: RunConfig, directory: Path, elsewhere: Path, world: World) -> Any:
    """Go on where only the first rank sees the run directory, as on machines that share no disk."""
    return train(run, directory if world.first else elsewhere, resume=True, world=world)


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize(
    ("size", "engine", "optimizer", "micro"),
    [
        *((2, "ddp", "adamw", 8), (2, "ddp", "muon", 1), (4, "ddp", "adamw", 1)),
        *((2, "fsdp", "adamw", 2), (4, "fsdp", "adamw", 8)),
    ],
)
def test_any_number_of_ranks_comes_to_the_losses_of_one(
    workshop: Workshop, size: int, engine: str, optimizer: str, micro: int
) -> None:
    optim = {"name": optimizer, "warmup_steps": 5}
    whole = run_of(workshop, optim=optim)
    train(whole, workshop.folder / "one")
    run = run_of(workshop, engine, optim=optim, train={"micro_batch_size": micro})
    found = together(size, partial(work, run, workshop.folder / "many"), workshop.folder / "ranks")
    want, have = losses(workshop.folder / "one"), losses(workshop.folder / "many")
    assert len(have) == STEPS
    assert have == pytest.approx(want, rel=1e-5)
    assert len({summary["val_loss"] for summary in found}) == 1
    samples = [
        (workshop.folder / name / "samples" / f"step-{STEPS:08d}.txt").read_text()
        for name in ("one", "many")
    ]
    assert samples[0] == samples[1]


def dropped(run: RunConfig, workshop: Workshop, world: World) -> list[list[str]]:
    """Of two updates, for each row of the batch that this rank has, what was in it and fell."""
    resolved, _ = resolve_on_all_ranks(run, workshop.files(), World(world.size), {"float32"})
    trainer = trainer_on(resolved, workshop.files(), world)
    seen: list[list[bytes]] = []

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        fell = (output == 0).expand(len(output), *output.shape[1:])
        for row, place in zip(fell, seen[-len(fell) :], strict=True):
            place.append(row.numpy().tobytes())

    def begin(module: Any, inputs: Any) -> None:
        seen.extend([row.numpy().tobytes()] for row in inputs[0])

    trainer.model.register_forward_pre_hook(begin)
    for module in trainer.model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(note)
    for _ in trainer.updates(2):
        pass
    rows = [sha256(b"".join(parts)).hexdigest() for parts in seen]
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


def test_rows_and_masks_are_bit_for_bit_those_of_one_process(workshop: Workshop) -> None:
    """At every site. Equal seeds used to give equal masks on every rank (transformers 31412)."""
    run = run_of(workshop, train={"micro_batch_size": 2})
    whole = dropped(run, workshop, World())
    assert len(set(whole[0] + whole[1])) == 16
    for size in (2, 4):
        parts = together(size, partial(dropped, run, workshop), workshop.folder / "ranks")
        assert [sum((part[step] for part in parts), []) for step in (0, 1)] == whole


def test_a_checkpoint_of_two_ranks_goes_on_in_one_and_in_four(workshop: Workshop) -> None:
    """One format: no rank's part is in it, and the losses are those of a run undisturbed."""
    constant = {"schedule": "constant", "warmup_steps": 0}
    straight = run_of(workshop, optim=constant)
    train(straight, workshop.folder / "straight")
    half = run_of(workshop, "fsdp", optim=constant, train={"max_steps": 20})
    directory = workshop.folder / "run"
    together(2, partial(work, half, directory), workshop.folder / "ranks")
    saved = checkpoint.choose(directory, "last").path
    assert sorted(p.name for p in saved.iterdir()) == [*sorted(FILES), "state.json"]
    whole = {n: t.shape for n, t in tensor_files.read_tensors(saved / FILES[0]).items()}
    names = model_tensors(GPT.of_run(half, workshop.files().meta["vocab_size"]))
    assert whole == {name: tensor.shape for name, tensor in names.items()}
    more = run_of(workshop, "fsdp", optim=constant, train={"max_steps": 25})
    together(4, partial(work, more, directory, resume=True), workshop.folder / "ranks")
    train(straight, directory, resume=True)
    assert losses(directory) == pytest.approx(losses(workshop.folder / "straight"), rel=1e-5)
    assert "ranks: 4 -> 1" in (directory / "train.log").read_text()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_average_the_weights_as_one_process_does(workshop: Workshop, engine: str) -> None:
    averaged = {"average": "ema", "average_half_life": 4.0, "max_steps": 12}
    constant = {"schedule": "constant", "warmup_steps": 0}
    train(run_of(workshop, optim=constant, train=averaged), workshop.folder / "straight")
    half = run_of(workshop, engine, optim=constant, train={**averaged, "max_steps": 6})
    whole = run_of(workshop, engine, optim=constant, train=averaged)
    directory, ranks = workshop.folder / "run", workshop.folder / "ranks"
    together(2, partial(work, half, directory), ranks)
    together(2, partial(work, whole, directory, resume=True), ranks)
    straight = workshop.folder / "straight"
    assert losses(directory) == pytest.approx(losses(straight), rel=1e-5)
    saved, want = (checkpoint.choose(each, "last").path for each in (directory, straight))
    for name in (FILES[0], RAW):
        ours, theirs = (tensor_files.read_tensors(path / name) for path in (saved, want))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_two_ranks_that_stop_and_go_on_are_bit_for_bit_undisturbed(workshop: Workshop) -> None:
    constant = {"schedule": "constant", "warmup_steps": 0}
    directories = [workshop.folder / name for name in ("straight", "stopped")]
    run = run_of(workshop, optim=constant, train={"max_steps": 16})
    together(2, partial(work, run, directories[0]), workshop.folder / "ranks")
    half = run_of(workshop, optim=constant, train={"max_steps": 8})
    together(2, partial(work, half, directories[1]), workshop.folder / "ranks")
    elsewhere = workshop.folder / "elsewhere"
    together(2, partial(apart, run, directories[1], elsewhere), workshop.folder / "ranks")
    assert not elsewhere.exists()
    last = [checkpoint.choose(each, "last").path for each in directories]
    for name in FILES:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_a_run_from_the_weights_of_another_goes_on_where_one_rank_sees_it(
    workshop: Workshop,
) -> None:
    plain = {"optim": {"schedule": "constant", "warmup_steps": 0}}
    origin, directory = workshop.folder / "origin", workshop.folder / "run"
    train(run_of(workshop, **plain, train={"max_steps": 2}), origin)
    half = run_of(workshop, **plain, train={"max_steps": 2}, init_from=str(origin))
    place = workshop.folder / "ranks"
    together(2, partial(work, half, directory), place)
    more = run_of(workshop, **plain, train={"max_steps": 4}, init_from=str(origin))
    found = together(2, partial(apart, more, directory, workshop.folder / "elsewhere"), place)
    assert [summary["steps"] for summary in found] == [4, 4]
    origin.rename(workshop.folder / "gone")
    last = run_of(workshop, **plain, train={"max_steps": 6}, init_from=str(origin))
    together(2, partial(work, last, directory, resume=True), place)
    assert len(losses(directory)) == 6


def test_only_the_first_rank_speaks(workshop: Workshop) -> None:
    run = run_of(workshop, train={"max_steps": 4})
    place = workshop.folder / "ranks"
    found = ended(begun(2, partial(work, run, workshop.folder / "run"), place), place)
    assert "ranks: 2, each with 4 sequences of an update" in found[0].said
    assert [rank.exit_code for rank in found] == [0, 0]
    assert found[1].said == ""


def failing(run: RunConfig, directory: Path, error: Exception, at: int, world: World) -> Any:
    """A rank whose update 3 fails."""
    accumulate = Trainer.accumulate

    def wrong(self: Trainer, batch: Any) -> torch.Tensor:
        if self.step == 3 and world.rank == at:
            raise error
        return accumulate(self, batch)

    Trainer.accumulate = wrong  # type: ignore[method-assign]  # in a process of its own
    return train(run, directory, world=world)


@pytest.mark.parametrize(
    ("at", "error", "code", "line"),
    [
        (1, StorageError("the disk is full"), 5, "the disk is full"),
        (0, ValueError("odd"), 1, "gptlite: ValueError: odd (a bug; -v shows where)"),
    ],
)
def test_what_fails_in_one_rank_ends_all_with_one_line_and_code(
    workshop: Workshop, at: int, error: Exception, code: int, line: str
) -> None:
    place, began = workshop.folder / "ranks", time.monotonic()
    of = partial(failing, run_of(workshop), workshop.folder / "run", error, at)
    found = ended(begun(2, of, place), place)
    assert time.monotonic() - began < 15
    assert [rank.exit_code for rank in found] == [code, code]
    assert found[0].said.splitlines()[-1] == (f"rank 1: {line}" if at else line)
    assert found[1].said == ""


def spoilt(run: RunConfig, directory: Path, world: World) -> Any:
    accumulate = Trainer.accumulate

    def wrong(self: Trainer, batch: Any) -> torch.Tensor:
        if self.step == 3 and world.rank == 1:
            with torch.no_grad():
                self.model.norm.weight.fill_(np.nan)
        return accumulate(self, batch)

    Trainer.accumulate = wrong  # type: ignore[method-assign]
    return train(run, directory, world=world)


def test_what_is_not_finite_in_one_rank_diverges_in_all(workshop: Workshop) -> None:
    place = workshop.folder / "ranks"
    of = partial(spoilt, run_of(workshop), workshop.folder / "run")
    found = ended(begun(2, of, place), place)
    assert [rank.exit_code for rank in found] == [4, 4]
    assert "step 4: loss nan" in found[0].said
    assert found[1].said == ""


def settings(mine: list[RunConfig], directory: Path, world: World) -> Any:
    return train(mine[world.rank], directory, world=world)


def test_bad_input_of_ranks_is_one_line_and_exit_code_2(workshop: Workshop) -> None:
    place, directory = workshop.folder / "ranks", workshop.folder / "run"
    other = workshop.folder / "other.txt"
    other.write_text(workshop.text.read_text().upper())
    run = run_of(workshop)
    elsewhere = run.data.model_copy(update={"source": str(other)})
    cases = {
        "train.batch_size: 2 processes do not divide 7; set 6 or 8": [
            run_of(workshop, train={"batch_size": 7})
        ]
        * 2,
        "distributed.engine: fsdp splits the whole matrices muon needs; set ddp": [
            run_of(workshop, "fsdp", optim={"name": "muon"})
        ]
        * 2,
        "data.source: rank 1 has other text or tokens than rank 0": [
            run,
            run.model_copy(update={"data": elsewhere}),
        ],
    }
    for line, runs in cases.items():
        found = ended(begun(2, partial(settings, runs, directory), place), place)
        assert [rank.exit_code for rank in found] == [2, 2], found
        assert found[0].said.strip() == line
        assert found[1].said == ""
        assert not directory.exists()


@pytest.mark.parametrize("gone", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_rendezvous_that_is_not_named_is_one_line(workshop: Workshop, gone: str) -> None:
    place = workshop.folder / "ranks"
    found = ended(begun(2, partial(work, run_of(workshop), place), place, **{gone: ""}), place)
    assert [rank.exit_code for rank in found] == [2, 2]
    assert f"{gone}: not set, though WORLD_SIZE is 2; start with torchrun" in found[0].said


def slowly(run: RunConfig, directory: Path, world: World) -> Any:
    """Updates that leave time to be disturbed."""
    accumulate = Trainer.accumulate

    def slow(self: Trainer, batch: Any) -> torch.Tensor:
        time.sleep(0.05)
        return accumulate(self, batch)

    Trainer.accumulate = slow  # type: ignore[method-assign]
    return train(run, directory, resume=(directory / "config.yaml").is_file(), world=world)


def until_saved(directory: Path) -> None:
    until = time.monotonic() + 30
    while not checkpoint.folders(directory) and time.monotonic() < until:
        time.sleep(0.02)
    assert checkpoint.folders(directory)


def test_a_signal_to_one_rank_saves_and_ends_all(workshop: Workshop) -> None:
    place, directory = workshop.folder / "ranks", workshop.folder / "run"
    run = run_of(workshop, train={"save_interval": 4, "max_steps": 2000})
    processes = begun(2, partial(slowly, run, directory), place)
    until_saved(directory)
    os.kill(processes[1].pid, signal.SIGTERM)
    found = ended(processes, place)
    assert [rank.exit_code for rank in found] == [143, 143]
    assert "saved; go on with: gptlite train --resume" in found[0].said
    last = checkpoint.choose(directory, "last").state.step
    assert f"stopped at step {last}" in found[0].said


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_nothing_saved_is_lost(
    workshop: Workshop, killed: int
) -> None:
    place, directory = workshop.folder / "ranks", workshop.folder / "run"
    run = run_of(workshop, train={"max_steps": 16, "save_interval": 4})
    together(2, partial(work, run, workshop.folder / "straight"), place)
    processes = begun(2, partial(slowly, run, directory), place)
    until_saved(directory)
    os.kill(processes[killed].pid, signal.SIGKILL)
    began = time.monotonic()
    found = ended(processes, place)
    assert time.monotonic() - began < 15
    assert found[killed].exit_code == -signal.SIGKILL
    assert found[1 - killed].exit_code == 1
    together(2, partial(slowly, run, directory), place)
    last = [
        checkpoint.choose(each, "last").path for each in (workshop.folder / "straight", directory)
    ]
    for name in FILES:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_a_rank_that_stands_still_is_named(workshop: Workshop) -> None:
    place, directory = workshop.folder / "ranks", workshop.folder / "run"
    run = run_of(workshop, train={"save_interval": 4, "max_steps": 2000})
    impatient = run.distributed.model_copy(update={"timeout_seconds": 2.0})
    run = run.model_copy(update={"distributed": impatient})
    processes = begun(2, partial(slowly, run, directory), place)
    until_saved(directory)
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        processes[0].join(15)
        assert processes[0].exitcode == 1
        said = NOISE.sub("", (place / "0.err").read_text()).splitlines()[-1]
        assert said.startswith(f"rank 1: process {processes[1].pid} on ")
        assert said.endswith("has not answered for 2 seconds")
    finally:
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[1].join()


def test_large_tensors_are_written_as_several_files_and_read_as_one(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(workshop, train={"max_steps": 4})
    train(run, workshop.folder / "one")
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 1 << 13)
    train(run, workshop.folder / "many")
    folder = checkpoint.choose(workshop.folder / "many", "last").path
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert all(path.stat().st_size < 1 << 16 for path in folder.iterdir())
    for name in FILES:
        whole = checkpoint.choose(workshop.folder / "one", "last").path / name
        want, have = (tensor_files.read_tensors(path) for path in (whole, folder / name))
        assert want.keys() == have.keys()
        assert all(torch.equal(want[key], have[key]) for key in want)
    more = run_of(workshop, train={"max_steps": 8})
    train(more, workshop.folder / "many", resume=True)
    assert "resumed at step 4" in (workshop.folder / "many" / "train.log").read_text()


def test_a_plan_shows_what_each_of_several_processes_takes(workshop: Workshop) -> None:
    run = run_of(workshop, "fsdp", model={"n_layer": 8, "n_embd": 256, "n_head": 4})
    memory = []
    for size in (1, 2, 8):
        planned = plan_run(run, size)
        memory.append(planned.plan["memory_bytes_estimate"])
        assert planned.plan["sequences_per_rank"] == 8 // size
    assert memory == sorted(memory, reverse=True)
    lines = header_lines(planned.run, planned.plan)
    assert "ranks: 8, each with 1 sequences of an update" in lines
    with pytest.raises(ConfigError, match="3 processes do not divide 8; set 6 or 9"):
        plan_run(run, 3)
