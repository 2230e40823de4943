"""What several seeds say: means with intervals, paired differences, and which are above noise.

Intervals are Student's t over seeds. The percentile bootstrap stands beside them because it is what
papers print, but of three seeds it cannot leave [min, max] and misses the mean a quarter of the
time; decisions rest on the paired t test with Holm's correction over the comparisons of a metric.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gptlite.errors import MissingPackages
from gptlite.measure.intervals import LEVEL, Floats, holm, percentiles, resamples

NOISE = 0.02
"""Of studies of nothing but noise, the share that may find something above it."""


def student_t() -> Any:
    """Student's t distribution."""
    try:
        from scipy.stats import t
    except ImportError:
        raise MissingPackages("gptlite study", "optuna", "scipy") from None
    return t


@cache
def half_width(n: int) -> float:
    """Of the 95 % interval of the mean of n values, in standard errors."""
    return float(student_t().ppf((1 + LEVEL) / 2, n - 1))


@cache
def seed_resamples(n: int) -> Floats:
    return resamples(n, "seeds")


def mean_over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval of one number per seed; a single seed has no interval."""
    x = np.asarray(values, dtype=np.float64)
    low = high = drawn_low = drawn_high = None
    if len(x) > 1:
        half = half_width(len(x)) * standard_error(x)
        low, high = float(x.mean() - half), float(x.mean() + half)
        drawn_low, drawn_high = percentiles(seed_resamples(len(x)) @ x / len(x), (1 - LEVEL) / 2)
    return {
        "mean": float(x.mean()),
        "low": low,
        "high": high,
        "bootstrap_low": drawn_low,
        "bootstrap_high": drawn_high,
        "values": x.tolist(),
    }


def standard_error(x: Floats) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The difference to the baseline, seed by seed, with the p of its being 0."""
    x = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean = mean_over_seeds(x.tolist())
    p = None
    if len(x) > 1:
        error = standard_error(x)
        t = abs(x.mean()) / error if error else 0.0 if x.mean() == 0 else np.inf
        p = float(2 * student_t().sf(t, len(x) - 1))
    return {
        "difference": mean["mean"],
        **{name: mean[name] for name in ("low", "high", "bootstrap_low", "bootstrap_high")},
        "p": p,
        "n": len(x),
    }


def mark_above_noise(found: list[dict[str, Any]]) -> None:
    """Adds `above_seed_noise` to the comparisons of one metric; None where nobody can know."""
    known = [comparison for comparison in found if comparison["p"] is not None]
    falls = holm(np.array([comparison["p"] for comparison in known]), NOISE)
    for comparison in found:
        comparison["above_seed_noise"] = None
    for comparison, above in zip(known, falls.tolist(), strict=True):
        comparison["above_seed_noise"] = above
