"""What is timed is the whole of what a run does, and nothing is left of having timed it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop, trainer_on

from gptlite.config.run import RunConfig
from gptlite.core.generate import Generation
from gptlite.core.optim import Optimizer
from gptlite.core.train import Trainer
from gptlite.core.weights import FILES
from gptlite.core.world import World
from gptlite.data.batches import Batch
from gptlite.planning import auto, rehearsal
from gptlite.planning.rehearsal import EvaluationPace, rehearse, time_updates
from gptlite.runs import checkpoint
from gptlite.runs.interrupts import Interrupts
from gptlite.runs.session import Session
from gptlite.runs.start import train

DROPS = {"preset": "gpt2", "rate": 0.2, "schedule": {"mode": "late", "until": 0.5}}


class Clock:
    """Seconds that only pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def charge(self, owner: type, name: str, seconds: Callable[[Any], float], patch: Any) -> None:
        """Let every call of a method take so long."""
        original = getattr(owner, name)

        def charged(one: Any, *args: Any) -> Any:
            self.now += seconds(one)
            return original(one, *args)

        patch.setattr(owner, name, charged)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rehearsal, "perf_counter", made)
    return made


def resolved(workshop: Workshop, **sections: Any) -> RunConfig:
    run = workshop.run(**sections)
    files = workshop.files(**sections)
    rows = files.rows("train", run.model.context_length)
    return auto.resolve_run(run, vocab_size=files.meta["vocab_size"], n_rows=rows.n_rows)[0]


def idle(workshop: Workshop, world: World | None = None, **sections: Any) -> Trainer:
    run, files = resolved(workshop, **sections), workshop.files(**sections)
    return rehearsal.make_idle_trainer(run, files, world or World())


@pytest.mark.parametrize(
    ("seconds", "typical", "left"), [(10.0, 2.0, 2), (1.0, 2.0, 2), (0.0, 2.0, 4), (13.0, 1.5, 1)]
)
def test_the_typical_time_is_the_median_without_the_first(
    clock: Clock, seconds: float, typical: float, left: int
) -> None:
    times = iter([50.0, 2.0, 1.0, 9.0, 1.0, 1.0])

    def act() -> None:
        clock.now += next(times)

    assert rehearsal.typical_seconds(act, seconds) == typical
    assert len(list(times)) == left


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_is_timed_with_its_optimizer(
    workshop: Workshop, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trainer = idle(workshop, optim={"name": name})
    clock.charge(Trainer, "accumulate", lambda _: 0.25, monkeypatch)
    clock.charge(Optimizer, "step", lambda _: 0.5, monkeypatch)
    assert time_updates(trainer, 3.0) == (0.75, 8)


def test_of_a_long_update_a_part_is_timed_and_the_optimizer_by_itself(
    workshop: Workshop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = idle(workshop, train={"micro_batch_size": 2})
    seen = []

    def seconds(one: Trainer) -> float:
        seen.append(one.own.stop - one.own.start)
        return 10.0 * seen[-1]

    clock.charge(Trainer, "accumulate", seconds, monkeypatch)
    clock.charge(Optimizer, "step", lambda _: 3.0, monkeypatch)
    assert time_updates(trainer) == (8 * 10.0 + 3.0, 2)
    assert set(seen) == {2}, "the whole batch was computed"


def test_a_rank_is_timed_with_its_share_of_the_batch(
    workshop: Workshop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = idle(workshop, World(4))
    clock.charge(Trainer, "accumulate", lambda one: 0.1 * one.own.stop, monkeypatch)
    assert time_updates(trainer).n_rows == 2
    assert time_updates(trainer).seconds == pytest.approx(0.2)


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rehearsing_changes_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sections: dict[str, Any] = {"optim": {"name": name}, "dropout": {**DROPS, "masks": "native"}}
    run, files = workshop.run(**sections), workshop.files(**sections)
    made: list[Trainer] = []
    original = rehearsal.make_idle_trainer

    def make(*args: Any) -> Trainer:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(rehearsal, "make_idle_trainer", make)
    fresh = trainer_on(resolved(workshop, **sections), files)
    before, state = files_below(workshop.folder), torch.get_rng_state()
    costs = rehearse(run, files, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert files_below(workshop.folder) == before
    assert made[0].step > 3, "updates were made"
    after = made[0].model.state_dict()
    assert all(torch.equal(after[key], old) for key, old in fresh.model.state_dict().items())
    assert min(costs.update, costs.save, costs.sample, costs.evaluation.seconds) > 0


def test_dropout_is_timed_at_full_rates_whatever_the_schedule(workshop: Workshop) -> None:
    trainer = idle(workshop, dropout=DROPS)
    assert (
        trainer_on(
            resolved(workshop, dropout=DROPS), workshop.files(dropout=DROPS)
        ).schedule_dropout()
        == 0.0
    )
    next(trainer.updates(1))
    assert trainer.strength == 1.0
    assert trainer.planned


@pytest.mark.parametrize(("seconds_a_row", "rows"), [(0.001, {4, 64}), (0.5, {4})])
def test_of_a_long_evaluation_a_few_sequences_are_timed(
    workshop: Workshop,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    seconds_a_row: float,
    rows: set[int],
) -> None:
    trainer, seen = idle(workshop), []

    def measure(model: Any, batches: list[Batch], *_: Any) -> None:
        sizes = [len(batch.inputs) for batch in batches]
        seen.extend(sizes)
        clock.now += (sum(sizes) + sizes[0]) * seconds_a_row

    monkeypatch.setattr(rehearsal, "measure", measure)
    pace = rehearsal.time_evaluation(trainer, workshop.files())
    assert pace.n_rows == 64
    assert pace.seconds == pytest.approx(64 * seconds_a_row)
    assert set(seen) == rows


@pytest.mark.parametrize("batches", ["all", 2])
def test_an_evaluation_is_counted_as_a_session_makes_it(workshop: Workshop, batches: Any) -> None:
    trainer = trainer_on(
        run := resolved(workshop, train={"eval_batches": batches}), files := workshop.files()
    )
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    session = Session(trainer, files, workshop.folder, None, Interrupts())
    session.evaluate(1)
    session.records.close()
    n_rows = rehearsal.eval_rows(run, files.meta["vocab_size"])
    pace = EvaluationPace(1.0, n_rows)
    assert pace.seconds_for(rehearsal.count_evaluated(run, files), trainer.rows.n_rows) == len(
        calls
    )


def test_a_save_writes_what_a_checkpoint_holds(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}
    digest = rehearsal.storage.file_digest

    def weigh(path: Path, **how: Any) -> str:
        sizes[path.name] = path.stat().st_size
        return digest(path, **how)

    trainer = idle(workshop)
    next(trainer.updates(1))
    monkeypatch.setattr(rehearsal.storage, "file_digest", weigh)
    rehearsal.time_save(trainer)
    tried, sizes = sizes, {}
    train(workshop.run(), workshop.folder / "run")
    saved = checkpoint.choose(workshop.folder / "run", "last").path
    for name in FILES:
        assert tried[name] == pytest.approx((saved / name).stat().st_size, rel=0.01)


def test_a_sample_that_ends_early_is_timed_as_a_whole_one(
    workshop: Workshop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(_: Generation) -> list[dict[str, Any]]:
        clock.now += 3.0
        return [{"tokens": 20}, {"tokens": 10}]

    monkeypatch.setattr(Generation, "results", results)
    trainer = idle(workshop, sample={"max_new_tokens": 200})
    assert rehearsal.time_sample(trainer, workshop.files().tokenizer) == 30.0
