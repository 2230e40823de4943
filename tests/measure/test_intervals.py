"""Intervals against many worlds in which the truth is known."""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptlite.measure import calibration, importance, intervals, knockout
from gptlite.measure.intervals import (
    FEWEST_ROWS,
    RESAMPLES,
    debiased_interval,
    holm,
    interval,
    mean_bounds,
    mean_per_target,
    ratio,
    resamples,
    share,
    student_quantile,
    student_tail,
)


def test_a_resample_draws_as_many_as_there_are_and_the_same_at_every_call() -> None:
    drawn = resamples(40, "a")
    assert drawn.shape == (RESAMPLES, 40)
    assert (drawn.sum(1) == 40).all()
    assert np.array_equal(drawn, resamples(40, "a"))
    assert not np.array_equal(drawn, resamples(40, "b"))
    assert drawn.mean(0) == pytest.approx(np.ones(40), abs=0.2)
    assert drawn.var(0).mean() == pytest.approx(1 - 1 / 40, rel=0.05)


def test_an_interval_holds_the_truth_in_about_95_of_100_worlds() -> None:
    """Rows of unequal length whose nats per target vary from row to row."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        targets = rng.integers(5, 60, 64).astype(float)
        sums = targets * (2.0 + 0.3 * rng.standard_normal(64))
        found = mean_per_target(sums, targets, "rows")
        held += found["low"] <= 2.0 <= found["high"]
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.parametrize("rows", [5, 6, 8, 20])
def test_intervals_of_few_rows_hold_the_truth_as_often(rows: int) -> None:
    """The middle 95 % of the resamples do in 85, 86 and 88 of 100 worlds, of 5, 6 and 8 rows."""
    rng, targets = np.random.default_rng(rows), np.full(rows, 10.0)
    worlds = 20 + rng.standard_normal((1000, rows))
    found = [mean_per_target(sums, targets, "rows") for sums in worlds]
    assert np.mean([one["low"] <= 2.0 <= one["high"] for one in found]) >= 0.935
    assert all(one["low"] <= one["value"] <= one["high"] for one in found)


def test_what_is_not_a_number_or_of_a_handful_of_rows_has_no_interval() -> None:
    assert interval(float("nan"), np.ones(3), 9)["value"] is None
    assert interval(1.0, np.full(3, np.nan), 9)["low"] is None
    assert interval(1.0, np.array([0.0, np.nan, 2.0]), 4096)["high"] == pytest.approx(2, rel=1e-3)
    few = mean_per_target(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4), "rows")
    assert few == {"value": 2.5, "low": None, "high": None}


def test_a_maximum_of_noise_lies_in_its_interval_and_nearer_to_the_truth() -> None:
    """Sixty numbers that are 0: the largest of their means is above 0, and once more resampled."""
    rng, values = np.random.default_rng(0), []
    for _ in range(200):
        x = rng.standard_normal((20, 60))
        largest = x.mean(0).max()
        found = debiased_interval(largest, (resamples(20, "rows") @ x / 20).max(1), 20)
        assert found["low"] <= found["value"] <= found["high"]
        values.append((found["value"], largest))
    ours, plain = np.mean(values, axis=0)
    assert 0 < ours < 0.8 * plain


def test_a_ratio_whose_divisor_may_be_nothing_is_withheld_with_the_reason() -> None:
    """Units that cost nothing alone have no share of it in common."""
    rng, withheld = np.random.default_rng(0), 0
    for _ in range(400):
        below = rng.standard_normal(6) + rng.choice([0.0, 1.0, 4.0])
        found = ratio(2 * below + 0.3 * rng.standard_normal(6), below, "rows", "it is nothing")
        withheld += found["value"] is None
        if found["value"] is None:
            assert found["reason"] == "it is nothing"
    assert 100 < withheld < 300
    assert ratio(np.ones(6), np.full(6, -1.0), "rows", "why")["value"] is None
    few = ratio(np.ones(4), np.ones(4), "rows", "why")
    assert few["value"] is None
    assert "fewer than 5 rows" in few["reason"]


def draw_rows(rng: np.random.Generator, n: int) -> Any:
    """n numbers of one of several kinds: plain, with far outliers, skewed, or all equal."""
    far = rng.standard_normal(n) * np.where(rng.random(n) < 0.2, 50, 1)
    kinds = (rng.standard_normal(n), far, rng.exponential(1, n), np.full(n, rng.choice([0.1, 0.3])))
    size, shift = rng.choice([1e-6, 1, 1e3]), rng.choice([0, 0.5, 3])
    return (kinds[rng.integers(len(kinds))] + shift) * size


def plain_numbers(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    n = int(rng.integers(2, 13))
    above, below, targets = draw_rows(rng, n), draw_rows(rng, n), rng.integers(1, 60, n) * 1.0
    yield ratio(above + rng.choice([-1, 0, 1]) * below, below, "rows", "why")
    yield mean_per_target(above, targets, "rows")
    yield share(int(rng.integers(0, n + 1)), n)
    if ends := mean_bounds(above.mean(), above.std(), n):
        yield {"value": above.mean(), "low": ends[0], "high": ends[1]}


def of_curves(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Of losses over what is removed that rise, fall and jump, of models with skill and without."""
    fractions, n, masks = (0, 0.3, 0.5, 1), int(rng.integers(2, 9)), int(rng.integers(2, 7))
    steps = np.cumsum(np.append(0, rng.standard_normal(3))) * rng.choice([0, 0.3, 2])
    noise = rng.standard_normal((4, masks + 2, n)) * rng.choice([0, 0.05, 1])
    noise[0], noise[-1] = 0, noise[-1, :1]
    base = 2 + 0.3 * rng.standard_normal(n)
    nats = base + steps[:, None, None] + noise
    subject = SimpleNamespace(base=base, n_targets=np.ones(n), row_nats=lambda *_: base[None])
    unigram = base + rng.choice([0, 1]) + 0.3 * rng.standard_normal(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knockout, "curve", lambda *_: nats)
        found = knockout.knockout(subject, "head", np.zeros(4), unigram, fractions, masks)
    for curve in found.values():
        yield from (each for each in curve.values() if isinstance(each, dict))
        for value, low, high in zip(curve["loss"], curve["low"], curve["high"], strict=True):
            yield {"value": value, "low": low, "high": high}


def of_units(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Of importances that are all noise, all alike, or one that matters."""
    rows, units = int(rng.integers(2, 9)), 12
    subject = SimpleNamespace(base=np.zeros(rows), n_targets=np.full(rows, 9.0))
    subject.row_nats = lambda _, removed, __: 2 * removed.numpy().astype(float) @ singles
    singles = rng.standard_normal((units, rows)) * rng.choice([0, 0.01, 1])
    singles += rng.exponential(1, (units, 1)) * rng.choice([0, 1, 5])
    found = importance.importance(subject, singles, 1)  # type: ignore[arg-type]
    found |= importance.backup(subject, "head", singles, 5)  # type: ignore[arg-type]
    yield from (each for each in found.values() if isinstance(each, dict))


def of_guesses(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    n, rows = 60, int(rng.integers(1, 24))
    confidence = rng.choice([rng.uniform(0, 1, n), np.full(n, 0.3)])
    correct = (rng.random(n) < confidence * rng.choice([0, 0.6, 1])).astype(float)
    row = np.sort(rng.integers(0, rows, n))
    row -= row.min()
    found = calibration.calibration(
        calibration.Guesses(np.unique(row, return_inverse=True)[1], confidence, correct, correct)
    )
    yield from (each for each in found.values() if isinstance(each, dict))


@pytest.mark.parametrize("draw", [plain_numbers, of_curves, of_units, of_guesses])
def test_no_number_of_any_kind_lies_outside_of_its_interval(
    draw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what has no number says why."""
    once = cache(resamples)
    for module in (intervals, knockout, importance):
        monkeypatch.setattr(module, "resamples", once)
    rng, known = np.random.default_rng(0), 0
    for _ in range(250):
        for found in draw(rng):
            value, low, high = (found[name] for name in ("value", "low", "high"))
            if value is None:
                assert low is high is None
                assert found["reason"]
            elif low is not None:
                known += 1
                assert low <= value <= high, found
    assert known > 200


def test_none_of_a_few_is_not_certainly_none() -> None:
    """Drawn anew, 0 of 60 would always be 0; the rule of three says up to 5 %."""
    none, some, all_ = share(0, 60), share(6, 60), share(60, 60)
    assert none["low"] == 0
    assert 0.04 < none["high"] < 0.07
    assert (some["low"], some["high"]) == pytest.approx((0.0466, 0.2015), abs=1e-3)
    assert (all_["low"], all_["high"]) == pytest.approx((1 - none["high"], 1))
    assert share(1, FEWEST_ROWS - 1)["low"] is None


def test_student_by_table() -> None:
    for df, t in ((1, 12.706), (2, 4.3027), (5, 2.5706), (30, 2.0423), (4095, 1.9606)):
        assert student_tail(np.array([t, -t, 0.0]), df) == pytest.approx(
            [0.025, 0.975, 0.5], rel=1e-3
        )
    assert student_tail(np.array([np.inf, 100.0]), 7).tolist() == pytest.approx(
        [0, 1.3e-12], abs=1e-12
    )
    for df, t in ((4, 2.7764), (5, 2.5706), (7, 2.3646), (30, 2.0423), (4095, 1.9606)):
        assert student_quantile(df) == pytest.approx(t, abs=1e-3)


def test_holm_by_hand() -> None:
    """0.01 <= 0.05/4, 0.015 <= 0.05/3, 0.03 > 0.05/2, and the last falls with it."""
    assert holm(np.array([0.03, 0.01, 0.04, 0.015]), 0.05).tolist() == [False, True, False, True]
    assert holm(np.array([0.001, 0.002]), 0.05).all()
    assert not holm(np.array([0.2, 0.9]), 0.05).any()
