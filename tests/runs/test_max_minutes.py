"""A run that is told its time: it anneals and ends in it, by a clock that the test moves."""

import json
import re
from pathlib import Path

import pytest
from conftest import Workshop

from gptlite.config.run import RunConfig
from gptlite.core.optim import lr_at
from gptlite.core.weights import FILES
from gptlite.errors import ConfigError
from gptlite.runs import checkpoint, session
from gptlite.runs.start import train

OPTIM = {"schedule": "wsd", "lr": 0.01, "min_lr": 0.0, "warmup_steps": 3}


class Clock:
    """Each look at it takes a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(0.1)
    monkeypatch.setattr(session.time, "perf_counter", made)
    return made


def timed(workshop: Workshop, minutes: float = 1.0, **train: object) -> RunConfig:
    limits = {"max_steps": 100_000, "max_minutes": minutes, "eval_interval": 1000}
    return workshop.run(optim=OPTIM, train={**limits, "log_interval": 1, **train})


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_it_ends_in_its_time_with_the_rate_at_its_end(workshop: Workshop, clock: Clock) -> None:
    directory = workshop.folder / "run"
    summary = train(timed(workshop), directory)
    assert clock.now == pytest.approx(60, rel=0.05)
    assert summary["ended"] == "max_steps"
    rates = [row["lr"] for row in rows(directory)]
    begins = rates.index(next(rate for rate in rates[4:] if rate < 0.01))
    assert begins == pytest.approx(0.8 * len(rates), rel=0.05)
    assert rates[-1] == 0
    falling = [a - b for a, b in zip(rates[begins:], rates[begins + 1 :], strict=False)]
    assert falling == pytest.approx([falling[0]] * len(falling))


def test_what_is_left_is_shown_by_the_clock(
    workshop: Workshop, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """max_steps is not where such a run ends."""
    summary = train(timed(workshop), workshop.folder / "run")
    shown = capsys.readouterr().err
    assert "plan: at most 100,000 updates" in shown
    totals = [int(total) for total in re.findall(r"^step \d+/(\d+)", shown, re.MULTILINE)]
    assert totals[1:]
    assert totals[1:] == pytest.approx([summary["steps"]] * len(totals[1:]), rel=0.2)


def test_its_last_update_may_come_first(workshop: Workshop, clock: Clock) -> None:
    summary = train(timed(workshop, minutes=100.0, max_steps=20), workshop.folder / "run")
    assert summary["steps"] == 20


def test_what_was_decided_stays_when_it_goes_on(workshop: Workshop, clock: Clock) -> None:
    """Stopped in the tail by a save that is the last thing seen, and gone on bit for bit."""
    straight = workshop.folder / "straight"
    train(timed(workshop, save_interval=1, keep_last="all"), straight)
    last = checkpoint.choose(straight, "last").state
    assert last.tail is not None
    begin, end = last.tail
    want = [(checkpoint.folders(straight)[-1] / name).read_bytes() for name in FILES]
    middle = checkpoint.folder_name((begin + end) // 2)
    for folder in checkpoint.folders(straight):
        if folder.name > middle:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    for name in ("last", "best"):
        (straight / "checkpoints" / name).write_text(f"{middle}\n")
    clock.seconds = 5.0  # slower now; nothing is decided anew
    train(timed(workshop, save_interval=1, keep_last="all"), straight, resume=True)
    assert checkpoint.choose(straight, "last").state.tail == (begin, end)
    found = [(checkpoint.folders(straight)[-1] / name).read_bytes() for name in FILES]
    assert found == want


def test_more_time_lets_a_run_go_on(
    workshop: Workshop, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = workshop.folder / "run"
    first = train(timed(workshop, minutes=0.5), directory)
    longer = train(timed(workshop, minutes=1.0), directory, resume=True)
    assert longer["steps"] > 1.5 * first["steps"]
    assert "learning rate: jumps from 0 to 0.01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"optim": {"schedule": "cosine"}}, "optim.schedule"),
        ({"optim": {**OPTIM, "weight_decay_schedule": "linear"}}, "optim.weight_decay_schedule"),
        (
            {"optim": OPTIM, "dropout": {"schedule": {"mode": "early", "until": 0.5}}},
            "dropout.schedule",
        ),
    ],
)
def test_what_has_to_know_the_end_is_refused(
    workshop: Workshop, sections: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*which train.max_minutes decides"):
        workshop.run(train={"max_minutes": 1.0}, **sections)
    with pytest.raises(ConfigError, match=r"train\.average_half_life: a share of the run"):
        workshop.run(optim=OPTIM, train={"max_minutes": 1.0, "average": "ema"})


def test_the_tail_begins_where_it_is_told() -> None:
    from gptlite.config.run import OptimConfig

    optim = OptimConfig.model_validate(OPTIM)
    found = [lr_at(step, 20, optim, tail_from=10) for step in range(20)]
    assert found[3:10] == [0.01] * 7
    assert found[10:] == pytest.approx([0.01 * (9 - i) / 10 for i in range(10)])
