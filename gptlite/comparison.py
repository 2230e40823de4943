"""What several seeds say: means with intervals, paired differences, and which are above noise.

Intervals are Student's t over seeds. The percentile bootstrap stands beside them because it is what
papers print, but of three seeds it cannot leave [min, max] and misses the mean a quarter of the
time; decisions rest on the paired t test with Holm's correction over the comparisons of a metric.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptlite.errors import UserError
from gptlite.intervals import LEVEL, Floats, holm, interval, resamples


def student(n: int) -> Any:
    """Student's t distribution for n values."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("studies need scipy and optuna: pip install 'gptlite[study]'") from None
    return stats.t(n - 1)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval of one number per seed; a single seed has no interval."""
    x = np.asarray(values, dtype=np.float64)
    low = high = None
    bootstrap = {"low": None, "high": None}
    if len(x) > 1:
        half = half_width(x)
        low, high = float(x.mean() - half), float(x.mean() + half)
        bootstrap = interval(float(x.mean()), resamples(len(x), "seeds") @ x / len(x))
    return {
        "mean": float(x.mean()),
        "low": low,
        "high": high,
        "bootstrap_low": bootstrap["low"],
        "bootstrap_high": bootstrap["high"],
        "values": x.tolist(),
    }


def half_width(x: Floats) -> float:
    error = x.std(ddof=1) / np.sqrt(len(x))
    return float(student(len(x)).ppf((1 + LEVEL) / 2) * error)


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The difference to the baseline, seed by seed, with the p of its being 0."""
    x = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean = over_seeds(x.tolist())
    p = None
    if len(x) > 1:
        error = x.std(ddof=1) / np.sqrt(len(x))
        p = float(2 * student(len(x)).sf(abs(x.mean()) / error)) if error else float(x.mean() == 0)
    return {
        "difference": mean["mean"],
        **{name: mean[name] for name in ("low", "high", "bootstrap_low", "bootstrap_high")},
        "p": p,
        "n": len(x),
    }


def decide(found: list[dict[str, Any]]) -> None:
    """Adds `above_seed_noise` to the comparisons of one metric; None where nobody can know."""
    known = [comparison for comparison in found if comparison["p"] is not None]
    falls = holm(np.array([comparison["p"] for comparison in known]), 1 - LEVEL)
    for comparison in found:
        comparison["above_seed_noise"] = None
    for comparison, above in zip(known, falls.tolist(), strict=True):
        comparison["above_seed_noise"] = above
