"""Who follows a run: a page that is made again, a time that is estimated; neither changes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Workshop

from gptlite.config.promise import Promise
from gptlite.core.generate import Generation
from gptlite.planning.budget import MOST_FOR_PAGES
from gptlite.report.page import add_report
from gptlite.runs import checkpoint, viewer
from gptlite.runs.start import train
from gptlite.runs.viewer import FIRST_PAGE, Pages, Viewer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(clock: Clock, seconds: float) -> Callable[[Path, Callable[[str], None]], None]:
    """Makes a page in so long."""

    def add(directory: Path, say: Callable[[str], None]) -> None:
        clock.now += seconds
        say("report: here")

    return add


def pages_of(clock: Clock, seconds: float = 2.0) -> Pages:
    return Pages(take(clock, seconds), Path("run"), print, clock)


def test_pages_take_a_small_share_of_the_time() -> None:
    clock = Clock()
    pages = pages_of(clock)
    for _ in range(1000):
        clock.now += 5.0  # of training
        pages.refresh(clock.now, 0.0)
        assert pages.spent <= MOST_FOR_PAGES * clock.now or pages.spent == 2.0
    assert pages.spent > 0.9 * MOST_FOR_PAGES * clock.now


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_first_page_comes_early_in_a_run_that_is_long_enough(share: float) -> None:
    clock = Clock()
    pages = pages_of(clock)
    pages.refresh(1.0, share * FIRST_PAGE / MOST_FOR_PAGES)
    assert (pages.spent > 0) == (share > 1)


def test_a_page_that_fails_is_told_once() -> None:
    said: list[str] = []
    calls = 0

    def fail(directory: Path, say: Callable[[str], None]) -> None:
        nonlocal calls
        calls += 1
        say("no report: cannot draw")

    pages = Pages(fail, Path("run"), said.append, Clock())
    pages.refresh(1e4, 0.0)
    pages.refresh(1e5, 0.0)
    assert (said, calls) == (["no report: cannot draw"], 1)


def weights(directory: Path) -> bytes:
    return (checkpoint.choose(directory, "last").path / "model.safetensors").read_bytes()


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("masks", ["keyed", "native"])
def test_whoever_follows_a_run_changes_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, masks: str
) -> None:
    """A page at every evaluation, an estimate before: the same weights, bit for bit."""
    pages: list[int] = []

    def add(directory: Path, say: Callable[[str], None]) -> None:
        add_report(directory, say)
        pages.append((directory / "report.html").stat().st_mtime_ns)

    monkeypatch.setattr(Pages, "is_affordable", lambda *_: True)
    run = workshop.run(
        dropout={"preset": "gpt2", "rate": 0.2, "masks": masks}, train={"eval_interval": 2}
    )
    train(run, workshop.folder / "alone")
    train(run, workshop.folder / "followed", viewer=Viewer(foresees=True, add_report=add))
    assert len(pages) == 4, "after updates 2, 4 and 6, and at the end"
    assert not (workshop.folder / "alone" / "report.html").exists()
    alone, followed = workshop.folder / "alone", workshop.folder / "followed"
    assert weights(alone) == weights(followed)
    assert losses(alone) == losses(followed)


def told(directory: Path) -> list[str]:
    return (directory / "train.log").read_text().splitlines()


def test_the_time_is_said_before_training(workshop: Workshop) -> None:
    train(workshop.run(), workshop.folder / "run", viewer=Viewer(foresees=True))
    (line,) = (line for line in told(workshop.folder / "run") if line.startswith("plan: "))
    assert line.endswith("epochs, about 1 s here")


def test_what_is_known_already_is_not_timed_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlite.runs import start

    monkeypatch.setattr(start.rehearsal, "foresee", lambda *_: 1 / 0)
    train(workshop.run(), workshop.folder / "run", viewer=Viewer(foresees=True, seconds=300.0))
    assert "epochs, about 5 min" in (workshop.folder / "run" / "train.log").read_text()
    train(workshop.run(), workshop.folder / "nobody")
    assert "about" not in told(workshop.folder / "nobody")[2]


@pytest.mark.parametrize(("seconds", "slow"), [(119.0, False), (121.0, True)])
def test_more_than_twice_what_was_promised_is_told(
    workshop: Workshop, seconds: float, slow: bool
) -> None:
    given = Viewer(foresees=True, seconds=seconds, promise=Promise(60.0, "tiny"))
    train(workshop.run(), workshop.folder / "run", viewer=given)
    lines = [line for line in told(workshop.folder / "run") if line.startswith("slow: ")]
    words = "slow: about 2 min instead of the 60 s of tiny: it runs in one thread; "
    words += "a smaller model would be faster (model.n_layer, model.n_embd)"
    assert lines == ([words] * slow)


def test_a_sample_is_never_empty(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(self: Any) -> list[dict[str, Any]]:
        return [{"prompt": "", "text": "\n"}]

    monkeypatch.setattr(Generation, "results", results)
    train(workshop.run(), workshop.folder / "run")
    log = (workshop.folder / "run" / "train.log").read_text()
    assert "sample at step 8 is empty: the model ends the text at once\n" in log


def test_a_picture_that_fails_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("gptlite.runs.look.load_trained", fail)
    said: list[str] = []
    clock = Clock()
    Pages(take(clock, 1.0), tmp_path, said.append, clock).finish()
    assert said == ["report: here"]
    assert (
        viewer.next_lines(tmp_path)[0] == f"next: gptlite generate --run {tmp_path} --interactive"
    )
