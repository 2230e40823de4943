"""Intervals against many worlds in which the truth is known."""

import numpy as np
import pytest

from gptlite.intervals import RESAMPLES, holm, interval, mean_per_target, resamples


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


def test_what_is_not_a_number_has_no_interval() -> None:
    assert interval(float("nan"), np.ones(3))["value"] is None
    assert interval(1.0, np.full(3, np.nan))["low"] is None
    assert interval(1.0, np.array([0.0, np.nan, 2.0]))["high"] == pytest.approx(1.95)


def test_holm_by_hand() -> None:
    """0.01 <= 0.05/4, 0.015 <= 0.05/3, 0.03 > 0.05/2, and the last falls with it."""
    assert holm(np.array([0.03, 0.01, 0.04, 0.015]), 0.05).tolist() == [False, True, False, True]
    assert holm(np.array([0.001, 0.002]), 0.05).all()
    assert not holm(np.array([0.2, 0.9]), 0.05).any()
