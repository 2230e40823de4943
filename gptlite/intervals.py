"""How sure a measurement is: bootstrap intervals over the rows of text it was made on.

A model is measured on rows of a split; other rows would have given other numbers. Rows are drawn
anew, with replacement, and the spread of the results is the interval (Efron 1979). Draws are named,
so two models measured on the same rows are resampled alike and can be compared in pairs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlite.keys import key, uniform

Floats = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 1000


def resamples(n: int, name: str) -> Floats:
    """How often each of n things is drawn in each resample, (RESAMPLES, n); every row sums to n."""
    drawn = uniform(key("bootstrap", name, n), np.arange(RESAMPLES * n, dtype=np.int64)) * n
    number = drawn.astype(np.int64) + n * np.repeat(np.arange(RESAMPLES), n)
    return np.bincount(number, minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)


def interval(value: float, replicates: Floats) -> dict[str, Any]:
    """A number with the middle 95 % of what resampling makes of it (RESAMPLES,)."""
    finite = replicates[np.isfinite(replicates)]
    if not np.isfinite(value) or not len(finite):
        return {"value": None, "low": None, "high": None}
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, (tail, 1 - tail)).tolist()
    return {"value": float(value), "low": low, "high": high}


def mean_per_target(sums: Floats, targets: Floats, name: str) -> dict[str, Any]:
    """The mean of a sum per row over the targets of the rows, both (rows,)."""
    weights = resamples(len(sums), name)
    return interval(sums.sum() / targets.sum(), weights @ sums / (weights @ targets))


def holm(p: Floats, level: float) -> NDArray[np.bool_]:
    """Which of several null hypotheses fall at this level together (Holm 1979)."""
    order = np.argsort(p)
    falls = p[order] <= level / (len(p) - np.arange(len(p)))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order[: len(p) if falls.all() else int(np.argmin(falls))]] = True
    return rejected
