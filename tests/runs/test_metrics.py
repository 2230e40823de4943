"""Numbers a run writes: rates by a fake clock, rows that survive a resume."""

import io
import json
from pathlib import Path

import pytest

from gptlite.runs.metrics import Meter, MetricsFile
from gptlite.terminal import format_duration, format_number, wants_bar


class FakeClock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_leaves_out_what_is_not_training() -> None:
    """litgpt prints tokens per second from a timestamp: 60.93 shown, 20,692 true."""
    time = FakeClock()
    meter = Meter(time)
    meter.resume()
    for _ in range(4):
        time.now += 0.5
        meter.count(100)
        meter.resume()  # resuming what runs must not forget the time that passed
    meter.pause()
    time.now += 1000  # an evaluation
    assert meter.rate() == pytest.approx(200)
    meter.resume()
    time.now += 1
    meter.count(50)
    assert meter.rate() == pytest.approx(50)
    assert meter.elapsed_seconds == pytest.approx(3)
    assert meter.tokens == 450


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.write({"step": step, "train/loss": step / 10})
    with path.open("ab") as file:
        file.write('{"step": 15}'.encode("utf-16") + b"\n")  # JSON in an encoding of its own
    with path.open("a") as file:
        file.write("[" * 100_000 + "\n")  # deeper than Python can go
        file.write('{"step": 40, "tra')  # a crash cut this short
    second = MetricsFile(path, 20)
    second.write({"step": 30, "train/loss": float("nan")})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["train/loss"] is None


def test_a_bar_is_only_shown_where_it_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_bar("auto", Terminal())
    assert not wants_bar("auto", io.StringIO())
    assert not wants_bar("lines", Terminal())
    assert wants_bar("bar", io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_bar("auto", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "true")
    assert not wants_bar("auto", Terminal())


def test_numbers_for_people() -> None:
    assert [format_number(n) for n in (0.5, 999, 1234, 5.6e7, 7e12)] == [
        "0.5",
        "999",
        "1.23k",
        "56M",
        "7T",
    ]
    assert [format_duration(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]
