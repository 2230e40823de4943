"""Time that is planned is time that is used, by arithmetic: clocks and costs are given."""

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Workshop

from gptlite.config.reader import read_layers
from gptlite.config.strict_yaml import Document
from gptlite.data.token_files import TokenFiles
from gptlite.planning import budget
from gptlite.planning.budget import Budget, Fit, Rung, climb, fit_run, guess_fit, make_rung
from gptlite.planning.rehearsal import Costs, EvaluationPace

COSTS = Costs(begin=2.0, update=0.04, evaluation=EvaluationPace(0.01, 64), save=0.1, sample=0.5)
NOTHING = Document({})
N_VAL = 640
SMALLEST = 6000
"""Parameters of the first rung."""


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def rung(workshop: Workshop, **train: Any) -> Rung:
    run = workshop.run(train={"save_interval": 1000, "eval_interval": 250, **train})
    made = make_rung((2, 32, 16), run, workshop.files())
    return made._replace(n_rows=10_000, text_tokens=1 << 60, seconds=0.05)


def minutes(number: float, spent: float = 0.0) -> Budget:
    made = Budget(number, 0.0, clock := Clock())
    clock.now = spent
    return made


def seconds_of(fitting: Fit, costs: Costs, one: Rung, n_val: int = N_VAL) -> float:
    """How long a run goes on that has these costs and does what fits."""
    n_val = fitting.eval_batches * one.run.train.batch_size if fitting.eval_batches else n_val
    look = costs.evaluation.seconds_for(n_val, one.n_rows) + costs.save
    interval = -(-fitting.steps // budget.LOOKS)
    total = costs.begin + costs.sample
    for step in range(1, fitting.steps + 1):
        total += costs.update
        looks = step % interval == 0 or step == fitting.steps
        total += look if looks else costs.save * (step % one.run.train.save_interval == 0)
    return total


def test_what_loading_took_is_taken_off_and_kept_for_the_page() -> None:
    clock = Clock(now=103.0)
    made = Budget(1, 100.0, clock)
    assert made.seconds_left() == pytest.approx(60 - 3 - 3 * budget.ENDING)
    clock.now = 110.0
    assert made.seconds_left() == pytest.approx(60 - 10 - 3 * budget.ENDING)
    assert Budget(1, None, clock).seconds_left() == 60


@pytest.mark.parametrize("number", [1, 2, 5, 30])
@pytest.mark.parametrize(
    "costs",
    [
        COSTS,
        COSTS._replace(begin=9.0, sample=4.0),
        COSTS._replace(save=2.0),
        COSTS._replace(evaluation=EvaluationPace(0.4, 64)),
        COSTS._replace(update=0.4),
    ],
)
def test_a_run_with_these_costs_takes_the_time_there_is(
    workshop: Workshop, number: float, costs: Costs
) -> None:
    one = rung(workshop)
    there_is = minutes(number, spent=7.0)
    fitting = fit_run(costs, one, N_VAL, there_is, NOTHING)
    assert "fits into" in fitting.why
    takes = seconds_of(fitting, costs, one)
    assert (
        there_is.seconds_left() * 0.98 - costs.update - costs.save
        <= takes
        <= there_is.seconds_left() + 1e-6
    )


def test_all_validation_text_is_looked_at_where_that_is_cheap(workshop: Workshop) -> None:
    one = rung(workshop)
    cheap = fit_run(COSTS, one, N_VAL, minutes(5), NOTHING)
    assert cheap.eval_batches is None
    costly = COSTS._replace(evaluation=EvaluationPace(0.2, 64))
    part = fit_run(costly, one, 100 * N_VAL, minutes(5), NOTHING)
    assert part.eval_batches is not None
    assert part.eval_batches > 2
    assert part.evaluating == pytest.approx(budget.MOST_EVALUATING, rel=0.15)
    assert cheap.evaluating < part.evaluating


def test_what_is_asked_for_is_counted_and_not_chosen(workshop: Workshop) -> None:
    def fitted(**train: Any) -> Fit:
        asked = read_layers([], [f"train.{key}={value}" for key, value in train.items()])
        costly = COSTS._replace(evaluation=EvaluationPace(0.2, 64))
        return fit_run(costly, rung(workshop, **train), N_VAL, minutes(2), asked)

    plain = fitted()
    assert fitted(eval_interval=10).steps < plain.steps / 2
    assert fitted(eval_batches=1).eval_batches is None
    assert fitted(max_steps=7).steps == 7
    assert fitted(max_steps=7).why.startswith("asked for")
    often = rung(workshop)._replace(run=workshop.run(sample={"interval": 1}))
    assert fit_run(COSTS, often, N_VAL, minutes(2), NOTHING).steps < plain.steps / 5


def test_a_run_is_not_longer_than_it_helps_nor_shorter_than_it_makes_sense(
    workshop: Workshop,
) -> None:
    one = rung(workshop)._replace(n_rows=50)
    short = fit_run(COSTS, one, N_VAL, minutes(5), NOTHING)
    assert short.steps == one.most_steps == budget.MOST_EPOCHS * 50 // 8
    assert short.why.startswith(f"{budget.MOST_EPOCHS} passes over the text")
    late = fit_run(COSTS, rung(workshop), N_VAL, minutes(0.1, spent=50), NOTHING)
    assert late.steps == budget.FEWEST_STEPS
    assert late.why.startswith("the fewest: 0.1 minutes are too short")
    assert guess_fit(one, minutes(5)).steps == one.most_steps
    assert guess_fit(rung(workshop), minutes(0.1, spent=50)).steps == budget.FEWEST_STEPS


def climbed(
    workshop: Workshop, patch: pytest.MonkeyPatch, growth: int, power: float
) -> tuple[int, int]:
    """Of 20 rungs that grow by this factor: how many are timed, and which is chosen.

    An update takes FLOPs ** power microseconds, and there are 108 seconds.
    """
    first, tried = rung(workshop), []

    def time_rung(each: Rung, files: TokenFiles, how_long: float) -> Rung:
        tried.append(each.size[0])
        return each._replace(seconds=1e-6 * each.flops**power)

    def rungs() -> Iterator[Rung]:
        for number in range(20):
            run, n = first.run.model_copy(update={"seed": number}), SMALLEST * growth**number
            size = (number, 1, 1)
            yield first._replace(size=size, run=run, n_parameters=n, flops=float(n), tokens=100)

    patch.setattr(budget, "time_rung", time_rung)
    chosen = climb(rungs(), workshop.files(), minutes(2)).size[0]
    assert tried == list(range(len(tried)))
    return len(tried), chosen


def largest_that_fits(growth: int, power: float) -> int:
    seconds = 120 * (1 - budget.MOST_EVALUATING)
    sizes = [SMALLEST * growth**number for number in range(20)]
    return sum(100 * seconds / (1e-6 * n**power) >= 4 * n for n in sizes) - 1


def test_a_rung_that_is_clearly_too_large_is_not_timed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, chosen = climbed(workshop, monkeypatch, growth=8, power=1.0)
    assert chosen == largest_that_fits(8, 1.0) == 1
    assert timed == chosen + 1


def test_a_rung_that_may_just_fit_is_timed(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where large matrices go faster, FLOPs alone would end the climb too early."""
    timed, chosen = climbed(workshop, monkeypatch, growth=4, power=0.5)
    assert chosen == largest_that_fits(4, 0.5)
    assert chosen < timed <= chosen + 2


def test_a_model_does_not_outgrow_its_text(workshop: Workshop) -> None:
    """However long there is."""
    one = rung(workshop)._replace(n_parameters=100_000)
    assert one.sees_enough(1e9)
    least = budget.TEXT_PER_PARAMETER * one.n_parameters
    assert one._replace(text_tokens=int(least) + 1).sees_enough(1e9)
    assert not one._replace(text_tokens=int(least) - 1).sees_enough(1e9)


def test_the_first_rung_is_chosen_if_none_fits_and_one_model_is_timed_once(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert climbed(workshop, monkeypatch, growth=2, power=4.0)[1] == 0
    same = [rung(workshop)._replace(size=(number, 1, 1)) for number in range(3)]
    timed = []
    monkeypatch.setattr(budget, "time_rung", lambda each, *_: timed.append(1) or same[0])
    assert climb(iter(same), workshop.files(), minutes(1)).size == (2, 1, 1)
    assert len(timed) == 1


def test_a_climb_that_takes_long_ends(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine timing itself would take the time."""
    first = rung(workshop)
    there_is, timed = Budget(2, 0.0, clock := Clock()), []

    def time_rung(each: Rung, files: TokenFiles, how_long: float) -> Rung:
        clock.now += 7
        timed.append(each.size[0])
        return each._replace(seconds=1e-9)

    monkeypatch.setattr(budget, "time_rung", time_rung)
    rungs = (
        first._replace(size=(number, 1, 1), run=workshop.run(seed=number)) for number in range(9)
    )
    assert climb(rungs, workshop.files(), there_is).size[0] == 1
    assert timed == [0, 1]
