"""Which documents are for validation: about a share of the bytes, copies always on one side.

A document is known by the digest of its text alone, so what is chosen depends neither on the order
of the files nor on how many processes read them, and few change sides when text is added.
"""

import numpy as np
from numpy.typing import NDArray


def choose_documents(
    digests: NDArray[np.uint64], n_bytes: NDArray[np.uint64], fraction: float
) -> NDArray[np.bool_]:
    """Whether each document is for validation; there must be two different ones.

    Equal documents are one step. Small steps are taken in the order of their digests until the
    fraction is reached. A large one (of the bytes, or of the documents) stays in training unless
    the small ones are not enough; then those are added that come nearest. Training keeps at least
    half of what it should get.
    """
    distinct, step, copies = np.unique(digests, return_inverse=True, return_counts=True)
    sizes = np.bincount(step, n_bytes)
    slack = min(fraction, 1 - fraction) / 2
    small = np.maximum(sizes / sizes.sum(), copies / len(digests)) <= slack
    target, most = sizes.sum() * fraction, sizes.sum() * (1 + fraction) / 2
    ends = np.cumsum(np.concatenate([[0.0], sizes[small]]))
    n = int(np.argmin(np.abs(ends - target)))
    chosen = np.zeros(len(distinct), dtype=bool)
    chosen[np.flatnonzero(small)[:n]] = True
    reached = float(ends[n])
    while reached < target - sizes.sum() * slack / 2:
        after = np.where(chosen | (reached + sizes > most), np.inf, reached + sizes)
        nearest = int(np.argmin(np.abs(after - target)))
        if abs(after[nearest] - target) >= abs(reached - target) and chosen.any():
            break
        chosen[nearest], reached = True, float(after[nearest])
    return chosen[step]


def is_near(share: float, fraction: float) -> bool:
    """Whether validation got about what it should."""
    return abs(share - fraction) <= min(fraction, 1 - fraction) / 4
