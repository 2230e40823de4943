"""The head of a run: what is trained, on what, for how long, and with which dropout."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop, trainer_on

from gptlite.config.dropout import DropoutSchedule
from gptlite.config.promise import Promise, read_promise
from gptlite.config.run import RunConfig
from gptlite.core.train import Trainer
from gptlite.core.world import World
from gptlite.planning import header, rehearsal
from gptlite.planning.auto import resolve_run
from gptlite.planning.header import (
    MOST_LINES,
    describe_schedule,
    header_lines,
    name_sources,
    note_lines,
)
from gptlite.planning.plan import make_plan
from gptlite.planning.rehearsal import Pace, foresee
from gptlite.runs.launch import describe_changes
from gptlite.terminal import describe_duration

SLOW = Promise(60.0, "quickstart")


def planned(workshop: Workshop, **sections: Any) -> tuple[RunConfig, dict[str, Any]]:
    """A run and its plan, as they are when it begins."""
    run, files = workshop.run(**sections), workshop.files(**sections)
    rows = files.rows("train", run.model.context_length)
    run, reasons = resolve_run(run, vocab_size=files.meta["vocab_size"], n_rows=rows.n_rows)
    return run, make_plan(run, trainer_on(run, files).model, files, rows, reasons)


def test_it_says_what_is_trained_on_what_how_long_and_what_drops(workshop: Workshop) -> None:
    run, plan = planned(workshop, dropout={"preset": "gpt2", "rate": 0.2})
    text, rows = plan["train_tokens"], plan["rows_per_epoch"]
    assert header_lines(run, plan, "runs/tiny", 130.0) == [
        "runs/tiny: 26.9k parameters (2 layers, 2 heads, 32 wide, context 16)",
        f"text: {workshop.text}, {text:,} tokens (char {plan['vocab_size']}), "
        f"{plan['val_tokens']:,} held out",
        f"plan: 8 updates of 8 x 16 tokens, {64 / rows:.2f} epochs, about 2.2 min here",
        "dropout: embedding 0.2, attention_weights 0.2, attention_output 0.2, mlp_output 0.2, "
        "constant",
    ]
    (note,) = note_lines(run, plan)
    assert note.startswith("note: dropout is on: the rule says rate 0 for 0.1 epochs")


def test_a_time_that_leaves_compiling_out_says_so(workshop: Workshop) -> None:
    run, plan = planned(workshop)
    compiled = run.model_copy(update={"compile": True})
    line = header_lines(compiled, plan, "run", 130.0)[2]
    assert line.endswith("about 2.2 min here (as timed without compiling)")


def test_with_all_that_there_is_to_say_it_has_eight_lines(workshop: Workshop) -> None:
    sections = {"train": {"average": "ema"}, "optim": {"weight_decay_schedule": "linear"}}
    run, plan = planned(workshop, **sections)
    run = run.model_copy(
        update={"distill": run.distill.model_copy(update={"teachers": ("elsewhere",)})}
    )
    plan |= {"ranks": 2, "sequences_per_rank": 4}
    lines = header_lines(run, plan, "run", 130.0, SLOW)
    heads = [line.partition(":")[0] for line in lines]
    assert heads == ["run", "text", "plan", "dropout", "slow", "ranks", "teachers", "average"]
    assert "weight decay: 0.1, linear" in note_lines(run, plan)
    assert MOST_LINES == 7, "so that a line about a config that was made for a text is the eighth"


def test_without_dropout_it_says_so(workshop: Workshop) -> None:
    run, plan = planned(workshop, dropout={"preset": "none"})
    assert header_lines(run, plan)[3] == "dropout: none"


def test_a_rate_that_changes_over_depth_is_told(workshop: Workshop) -> None:
    sites = {
        "layer": {"rate": 0.1, "profile": "increasing"},
        "mlp_output": {"rate": 0.2, "profile": [1.0, 0.5]},
    }
    run, plan = planned(workshop, dropout={"preset": "none", "sites": sites})
    line = "dropout: mlp_output 0.2 (by layer), layer 0.1 (increasing), constant"
    assert header_lines(run, plan)[3] == line


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({}, "constant"),
        ({"shape": "linear", "until": 0.3}, "rising linearly until 30% of the run"),
        ({"mode": "early", "until": 0.5}, "until 50% of the run"),
        ({"mode": "early", "shape": "cosine"}, "falling as a cosine to 0 at 100% of the run"),
        ({"mode": "late", "until": 0.5}, "from 50% of the run on"),
        (
            {"mode": "late", "shape": "linear", "until": 0.5},
            "rising linearly from 50% of the run on",
        ),
    ],
)
def test_schedules_in_words(schedule: dict[str, Any], words: str) -> None:
    assert describe_schedule(DropoutSchedule.model_validate(schedule)) == words


def test_of_many_files_the_first_are_named() -> None:
    assert name_sources(("a", "b", "c")) == "a, b, c"
    assert name_sources(tuple("abcde")) == "a, b and 3 more"


@pytest.mark.parametrize(
    ("over", "promise", "words"),
    [
        ({"threads": 1}, SLOW, "it runs in one thread"),
        ({"threads": 2}, SLOW, "this machine is slower, or busy"),
        ({"threads": 1}, SLOW._replace(changed="--set seed=1"), "changed by --set seed=1"),
    ],
)
def test_what_is_slow_has_a_reason_and_a_faster_choice(
    workshop: Workshop, over: dict[str, Any], promise: Promise, words: str
) -> None:
    run, plan = planned(workshop, train={**over, "max_steps": 1000})
    plan["auto"].pop("loops", None)
    assert header_lines(run, plan, "run", 130.0, promise)[4] == (
        f"slow: about 2.2 min instead of the 60 s of quickstart: {words}; "
        "--set train.max_steps=460 would take about 60 s"
    )
    assert "slow: " not in "\n".join(header_lines(run, plan, "run", 119.0, promise))
    plan["auto"]["loops"] = "none: no C compiler; torch alone is slower"
    line = header_lines(run, plan, "run", 130.0, SLOW)[4]
    assert ": no C compiler; torch alone is slower; --set" in line


def test_where_fewer_updates_would_be_none_another_choice_is_named(workshop: Workshop) -> None:
    run, plan = planned(workshop, train={"max_steps": 1000}, optim={"warmup_steps": 461})
    line = header_lines(run, plan, "run", 130.0, SLOW)[4]
    assert line.endswith("; a smaller model would be faster (model.n_layer, model.n_embd)")


@pytest.mark.parametrize(
    ("number", "rounded"), [(0.4, 0), (9.9, 9), (99.5, 99), (468.0, 460), (12_345.0, 12_000)]
)
def test_updates_are_rounded_down(number: float, rounded: int) -> None:
    assert header.round_down(number) == rounded


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("# 3 minutes on a laptop", 180.0),
        ("# on 2 cores about 90 seconds", 90.0),
        ("# 1.5 hours, or 2 minutes", 5400.0),
        ("# Three minutes on a laptop", None),
        ("# 124 M parameters; the next line says how long", None),
    ],
)
def test_the_first_line_of_a_config_may_promise_a_time(
    tmp_path: Path, line: str, seconds: float | None
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{line}\n# 7 minutes\nseed: 1\n")
    promise = None if seconds is None else Promise(seconds, str(path), "--set a=1")
    assert read_promise([str(path), "quickstart"], "--set a=1") == promise


def test_the_quickstart_promises_what_the_readme_says() -> None:
    promise = read_promise(["quickstart"], "")
    assert promise is not None
    assert promise.seconds == 180


def test_what_was_changed_is_named_unless_it_costs_nothing() -> None:
    overrides = ["seed=2", "out_dir=x", "log.progress=bar", "train.max_steps=9"]
    told = describe_changes(["quickstart", "more.yaml"], overrides, ["my.txt"])
    assert told == "--config more.yaml, --set train.max_steps=9, --data my.txt"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 s"),
        (42.4, "42 s"),
        (99.4, "99 s"),
        (100.0, "1.7 min"),
        (420.0, "7 min"),
        (3600.0, "60 min"),
        (9000.0, "2.5 h"),
        (48 * 3600.0, "48 h"),
        (50 * 3600.0, "2 days"),
        (4e8, "4,630 days"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert describe_duration(seconds) == words


def test_the_time_of_a_run_is_that_of_its_updates_and_evaluations(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def time_updates(trainer: Trainer, seconds: float) -> Pace:
        asked.append(seconds)
        return Pace(0.5, 8)

    monkeypatch.setattr(rehearsal, "time_updates", time_updates)
    run, _ = planned(workshop, train={"eval_interval": 3, "eval_batches": 1})
    files = workshop.files()
    evaluation = (8 + 256) / 8 * 0.5 * rehearsal.EVALUATING
    assert foresee(run, files, World(), 8) == pytest.approx(8 * 0.5 + 3 * evaluation)
    assert asked == [0.0], "so few updates are not worth more"
    foresee(run, files, World(), 110)
    assert asked == [0.0, 0.0, pytest.approx(0.55)]
    foresee(run, files, World(), 10_000)
    assert asked[-1] == 1.0


def test_what_one_model_does_not_tell_is_not_estimated(workshop: Workshop) -> None:
    fsdp, _ = planned(workshop, distributed={"engine": "fsdp"})
    assert foresee(fsdp, workshop.files(), World(2), 8) is None
    taught = fsdp.model_copy(
        update={"distill": fsdp.distill.model_copy(update={"teachers": ("elsewhere",)})}
    )
    assert foresee(taught, workshop.files(), World(), 8) is None
