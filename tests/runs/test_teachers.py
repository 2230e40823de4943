"""Runs that learn from other runs: verified, asked, and the same when they go on."""

from pathlib import Path

import pytest
from conftest import Workshop

from gptlite.config.run import RunConfig
from gptlite.core.weights import FILES
from gptlite.errors import CheckpointError, ConfigError
from gptlite.planning.memory import training_bytes
from gptlite.runs import checkpoint
from gptlite.runs.start import train
from gptlite.runs.teachers import load_teachers


@pytest.fixture
def teachers(workshop: Workshop) -> list[str]:
    found = []
    for seed in (1, 2):
        directory = workshop.folder / f"teacher-{seed}"
        train(workshop.run(seed=seed, train={"max_steps": 20}), directory)
        found.append(str(directory))
    return found


def student(workshop: Workshop, teachers: list[str], **sections: object) -> RunConfig:
    return workshop.run(distill={"teachers": teachers, "weight": 0.7}, **sections)


def test_a_student_goes_on_bit_for_bit(workshop: Workshop, teachers: list[str]) -> None:
    straight, parts = workshop.folder / "straight", workshop.folder / "parts"
    constant = {"optim": {"schedule": "constant", "warmup_steps": 0}}
    train(student(workshop, teachers, **constant), straight)
    train(student(workshop, teachers, **constant, train={"max_steps": 4}), parts)
    train(student(workshop, teachers, **constant), parts, resume=True)
    last = [checkpoint.choose(each, "last").path for each in (straight, parts)]
    for name in FILES:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    plain = workshop.folder / "plain"
    train(workshop.run(**constant), plain)
    name = FILES[0]
    assert (checkpoint.choose(plain, "last").path / name).read_bytes() != (
        last[0] / name
    ).read_bytes()


def test_a_teacher_that_changed_is_told_when_the_run_goes_on(
    workshop: Workshop, teachers: list[str]
) -> None:
    directory = workshop.folder / "student"
    train(student(workshop, teachers, train={"max_steps": 4}), directory)
    train(workshop.run(seed=1, train={"max_steps": 30}), Path(teachers[0]), resume=True)
    with pytest.raises(ConfigError, match=r"distill\.teachers: .*teacher-1: has other weights"):
        train(student(workshop, teachers), directory, resume=True)


def test_the_plan_names_them_and_the_estimate_counts_them(
    workshop: Workshop, teachers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = student(workshop, teachers)
    train(run, workshop.folder / "student")
    assert f"teachers: {teachers[0]}, {teachers[1]}: 70% of the loss" in capsys.readouterr().err
    more = training_bytes(run, 1000, 4, False) - training_bytes(workshop.run(), 1000, 4, False)
    assert more > 2 * 4 * run.model.n_parameters(1000)


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"tokenizer": {"kind": "byte"}}, "another tokenizer"),
        ({"model": {"context_length": 32}}, "reads 16 tokens, this run 32"),
    ],
)
def test_a_teacher_that_cannot_read_the_text_is_refused_before_anything_is_written(
    workshop: Workshop, teachers: list[str], sections: dict[str, object], word: str
) -> None:
    directory = workshop.folder / "student"
    with pytest.raises(ConfigError, match=word):
        train(student(workshop, teachers, **sections), directory)
    assert not directory.exists()


def test_a_teacher_that_is_no_run_or_is_damaged_is_refused(
    workshop: Workshop, teachers: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"distill\.teachers: nowhere: not a run directory"):
        load_teachers(student(workshop, ["nowhere"]), workshop.files().tokenizer)
    for path in (Path(teachers[0]) / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        load_teachers(student(workshop, teachers), workshop.files().tokenizer)
