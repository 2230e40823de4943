"""How sure a measurement is: bootstrap intervals over the rows of text it was made on.

A model is measured on rows of a split; other rows would have given other numbers. Rows are drawn
anew, with replacement, and the spread of the results is the interval (Efron 1979). Draws are named,
so two models measured on the same rows are resampled alike and can be compared in pairs. That is
why the bootstrap is ours; Student's t is, because scipy is no dependency.
"""

import math
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlite.keys import key, uniform

Floats = NDArray[np.float64]
LEVEL = 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
RESAMPLES = 1000
FEWEST_ROWS = 5
"""For an interval: fewer can be drawn anew in too few ways."""


def withhold(reason: str) -> dict[str, Any]:
    """In place of a number that the text cannot tell."""
    return {"value": None, "low": None, "high": None, "reason": reason}


def resamples(n: int, name: str) -> Floats:
    """How often each of n things is drawn in each resample, (RESAMPLES, n); every row sums to n."""
    drawn = uniform(key("bootstrap", name, n), np.arange(RESAMPLES * n, dtype=np.int64)) * n
    number = drawn.astype(np.int64) + n * np.repeat(np.arange(RESAMPLES), n)
    return np.bincount(number, minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)


def percentiles(replicates: Floats, tail: float) -> tuple[float, float]:
    """What leaves this share of the replicates, or a little less, on either side."""
    low = np.quantile(replicates, tail, method="lower")
    return float(low), float(np.quantile(replicates, 1 - tail, method="higher"))


def interval(value: float, replicates: Floats, n: int) -> dict[str, Any]:
    """A number with its 95 % interval: the middle of what resampling n rows makes of it
    (RESAMPLES,), as much wider as the interval of a mean of n would be by Student's t.

    The number lies inside: rounding puts equal replicates a little to one side of it.
    """
    known = replicates[~np.isnan(replicates)]
    if not np.isfinite(value) or not len(known):
        return withhold("it is not a finite number")
    low = high = None
    if n >= FEWEST_ROWS:
        ends = percentiles(known, (1 - LEVEL) / 2)
        low, high = (float(value + stretch(n) * (end - value)) for end in ends)
        low, high = min(low, float(value)), max(high, float(value))
    return {"value": float(value), "low": low, "high": high}


def mean_bounds(mean: float, error: float, n: int) -> list[float] | None:
    """The ends of the 95 % interval of a mean over n rows with this standard error, by Student's t:
    for so many rows that resampling them would take too much memory."""
    if n < FEWEST_ROWS:
        return None
    half = student_quantile(n - 1) * error
    return [mean - half, mean + half]


def stretch(n: int) -> float:
    """Student's t over the normal quantile, and the sqrt((n - 1) / n) that resampled means of n
    spread too little by (Hesterberg 2015, arXiv:1411.5279)."""
    return student_quantile(n - 1) / NORMAL * math.sqrt(n / (n - 1))


def debiased_interval(value: float, replicates: Floats, n: int) -> dict[str, Any]:
    """The same for a statistic that noise pushes one way, as it does a maximum or a spread.

    Resampling adds the noise once more and pushes it as far again: so much (of the median) is taken
    off the value, and the interval is mirrored with it (Efron and Tibshirani 1993, chapter 10).
    """
    known = replicates[~np.isnan(replicates)]
    centre = float(np.median(known)) if len(known) else math.nan
    return interval(2 * value - centre, 2 * value - known, n)


def weighted_sums(weights: NDArray[Any], values: Floats) -> Floats:
    """(k, n) weights of values (n,) or (n, m) → their sums, (k,) or (k, m).

    By torch, which keeps to the threads of the run; numpy's own products take every core.
    """
    import torch  # loaded already where a model is measured

    factors = torch.as_tensor(weights, dtype=torch.float64)
    sums: Floats = (factors @ torch.as_tensor(values, dtype=torch.float64)).numpy()
    return sums


def mean_per_target(sums: Floats, targets: Floats, name: str) -> dict[str, Any]:
    """The mean of a sum per row over the targets of the rows, both (rows,)."""
    rows = resamples(len(sums), name)
    replicates = weighted_sums(rows, sums) / weighted_sums(rows, targets)
    return interval(sums.sum() / targets.sum(), replicates, len(sums))


def share(hits: int, n: int) -> dict[str, Any]:
    """Of n things, by Wilson's interval (1927): none or all of a few is not certain either, which
    drawing them anew, each time with the same result, would make it."""
    if n < FEWEST_ROWS:
        return {"value": hits / n, "low": None, "high": None}
    p, z = hits / n, NORMAL**2 / n
    half = NORMAL / math.sqrt(n) * math.sqrt(p * (1 - p) + z / 4)
    low, high = (p + z / 2 - half) / (1 + z), (p + z / 2 + half) / (1 + z)
    return {"value": p, "low": max(0.0, min(low, p)), "high": min(1.0, max(high, p))}


def doubt_divisor(below: Floats, name: str, nothing: str) -> str | None:
    """Why nothing should be divided by this sum over rows (rows,), if so: `nothing` is the reason
    where in other rows it may as well be 0 or less."""
    if len(below) < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows of text cannot tell a ratio from noise"
    found = interval(below.sum(), weighted_sums(resamples(len(below), name), below), len(below))
    return nothing if found["low"] is None or found["low"] <= 0 else None


def ratio(above: Floats, below: Floats, name: str, nothing: str) -> dict[str, Any]:
    """Of two sums over rows (rows,); withheld where the one below may be noise.

    A ratio of noise has no interval worth the name: draws in which the sum below changes its sign
    throw the result to the other side, and its own estimate can lie outside of their middle.
    """
    if reason := doubt_divisor(below, name, nothing):
        return withhold(reason)
    rows = resamples(len(below), name)
    replicates = weighted_sums(rows, above) / weighted_sums(rows, below)
    return interval(above.sum() / below.sum(), replicates, len(below))


def student_tail(t: Floats, df: int) -> Floats:
    """P(T > t) of Student's t with `df` degrees of freedom, a finite sum (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    angle = np.arctan(np.asarray(t, dtype=np.float64) / math.sqrt(df))
    square, odd = np.cos(angle) ** 2, df % 2
    term, total = np.ones_like(angle), np.zeros_like(angle)
    for k in range(df // 2):
        if k:
            term = term * square * ((2 * k - 1 + odd) / (2 * k + odd))
        total += term
    inside = np.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + np.cos(angle) * inside)
    return (1 - inside) / 2


@cache
def student_quantile(df: int) -> float:
    """What Student's t passes with a chance of (1 - LEVEL) / 2, from 4 degrees of freedom on to
    three digits (Abramowitz and Stegun 26.7.5)."""
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (k + 1) for k, term in enumerate(terms))


def holm(p: Floats, level: float) -> NDArray[np.bool_]:
    """Which of several null hypotheses fall at this level together (Holm 1979)."""
    order = np.argsort(p)
    falls = p[order] <= level / (len(p) - np.arange(len(p)))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: len(p) if falls.all() else int(np.argmin(falls))]] = True
    return rejected
