"""Statistics over seeds in simulated studies whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from gptlite.studies.comparison import NOISE, mark_above_noise, mean_over_seeds, paired_difference

SEED_NOISE, PAIR_NOISE = 0.02, 0.004
"""Standard deviations in nats: between seeds, and of a difference between runs of one seed."""


def simulated(rng: np.random.Generator, effects: list[float], n_seeds: int) -> list[bool | None]:
    """For points with these true differences to the baseline: which come out above seed noise."""
    seeds = 2.0 + SEED_NOISE * rng.standard_normal(n_seeds)
    noise = PAIR_NOISE / np.sqrt(2) * rng.standard_normal((len(effects) + 1, n_seeds))
    runs = seeds + noise + np.array([0.0, *effects])[:, None]
    found = [paired_difference(run, runs[0]) for run in runs[1:]]
    mark_above_noise(found)
    return [comparison["above_seed_noise"] for comparison in found]


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_a_null_study_finds_nothing_in_95_of_100(n_seeds: int) -> None:
    """Four points that do not differ from the baseline: a study that finds any is wrong. Of 100
    comparisons of nothing but seeds at most 2 are."""
    rng = np.random.default_rng(0)
    found = [simulated(rng, [0.0] * 4, n_seeds) for _ in range(2000)]
    wrong = [any(of_study) for of_study in found]
    assert sum(bool(one) for of_study in found[:25] for one in of_study) <= 2
    assert sum(wrong[:100]) <= 5
    assert np.mean(wrong) <= NOISE + 3 * np.sqrt(NOISE * (1 - NOISE) / 2000)


def test_a_planted_difference_is_found() -> None:
    """0.04 nats, ten times the noise of a pair and twice that of seeds, among two that are null."""
    rng = np.random.default_rng(1)
    studies = [simulated(rng, [0.0, 0.04, 0.0], 5) for _ in range(200)]
    assert np.mean([found[1] for found in studies]) > 0.95
    assert np.mean([found[0] for found in studies]) < 0.05


def test_pairs_find_what_seeds_would_hide() -> None:
    """The difference is a fifth of the spread between seeds; unpaired it would be invisible."""
    rng = np.random.default_rng(2)
    seeds = SEED_NOISE * rng.standard_normal(5)
    a, b = seeds + 0.0002 * rng.standard_normal(5), seeds + 0.004
    assert paired_difference(b, a)["p"] < 0.01
    assert stats.ttest_ind(a, b).pvalue > 0.3


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_intervals_hold_the_mean_in_95_of_100_and_bootstrap_ones_do_not(n_seeds: int) -> None:
    rng = np.random.default_rng(3)
    worlds = [mean_over_seeds(rng.standard_normal(n_seeds).tolist()) for _ in range(2000)]
    held = np.mean([world["low"] <= 0 <= world["high"] for world in worlds])
    boot = np.mean([world["bootstrap_low"] <= 0 <= world["bootstrap_high"] for world in worlds])
    assert held == pytest.approx(0.95, abs=0.015)
    assert boot < (0.80 if n_seeds == 3 else 0.90)


def test_numbers_are_those_of_scipy() -> None:
    a, b = [1.0, 2.0, 4.0, 4.5], [0.5, 2.5, 2.0, 3.0]
    found, expected = paired_difference(a, b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert (found["difference"], found["n"]) == (pytest.approx(0.875), 4)


def test_one_seed_knows_nothing_of_noise() -> None:
    found = [paired_difference([1.0], [2.0])]
    mark_above_noise(found)
    assert found[0]["difference"] == -1
    assert found[0]["low"] is found[0]["p"] is found[0]["above_seed_noise"] is None
    assert mean_over_seeds([3.0])["high"] is None


def test_equal_pairs_are_equal_and_equally_different_ones_differ() -> None:
    same, shifted = (
        paired_difference([1.0, 2.0], [1.0, 2.0]),
        paired_difference([1.5, 2.5], [1.0, 2.0]),
    )
    assert (same["p"], shifted["p"]) == (1.0, 0.0)
