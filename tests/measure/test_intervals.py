"""Intervals against many worlds in which the truth is known."""

import numpy as np
import pytest

from gptlite.measure.intervals import (
    RESAMPLES,
    debiased_interval,
    holm,
    interval,
    mean_per_target,
    ratio,
    resamples,
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


def test_a_ratio_whose_divisor_may_be_nothing_is_unknown() -> None:
    """Units that cost nothing alone have no share of it in common."""
    rng, unknown = np.random.default_rng(0), 0
    for _ in range(400):
        below = rng.standard_normal(6) + rng.choice([0.0, 1.0, 4.0])
        found = ratio(2 * below + 0.3 * rng.standard_normal(6), below, "rows")
        unknown += found["value"] is None
        if found["value"] is not None:
            assert found["low"] <= found["value"] <= found["high"]
    assert 100 < unknown < 300
    assert ratio(np.ones(6), np.full(6, -1.0), "rows")["value"] is None


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
