"""Keys: 64 bits that depend on names and numbers alone, and what is drawn from them.

Every random choice of a run (weights, order, samples) starts from a key of (seed, purpose, step),
never from a shared generator: drawing one number can then not move another. Nor from numpy's, which
may draw other numbers in its next version.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def key(*names: int | str) -> int:
    """64 bits, unsigned, that depend on every name and number given."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], n: int, name: int) -> NDArray[np.int64]:
    """Where the permutation of range(n) called `name` sends each index, without a table.

    Four Feistel rounds over the smallest even number of bits that holds n; a value that falls
    outside range(n) walks on along its cycle (Black and Rogaway 2002).
    """
    bits = np.uint64(max(1, (n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << bits) - np.uint64(1)
    rounds = mix(np.uint64(name) ^ np.arange(1, 5, dtype=np.uint64))
    out = index.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> bits, out[todo] & low
        for turn in rounds:
            left, right = right, left ^ (mix(right + turn) & low)
        out[todo] = left << bits | right
        todo &= out >= n
    return out.astype(np.int64)


def derive_keys(name: int, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits per (key, number)."""
    return mix(mix(np.uint64(name) + numbers.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))


def uniform(name: int, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per (key, number)."""
    return (derive_keys(name, numbers) >> np.uint64(11)).astype(np.float64) / 2.0**53
