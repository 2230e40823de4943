"""Batches drawn from token ids. Nothing here knows about models, text or files.

A batch is a pure function of (seed, step): resuming at step 1000 needs the number 1000 and nothing
else. (A torch DataLoader would have to draw all batches before it again.) B rows, T positions;
`row` is a sequence's index in the update's batch.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gptlite.errors import DataError
from gptlite.keys import key, permute

IGNORED = -1
"""Target of a position that is not scored."""
ORDER_BLOCK = 4096
STRETCH = 1 << 24
"""Tokens that are looked through at a time."""
Ids = NDArray[np.int64]


class Tokens(Protocol):
    """Ids one behind the other: an array, or several read as one."""

    @property
    def dtype(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, at: Any, /) -> Any: ...


class Batch(NamedTuple):
    inputs: Ids
    """(B, T) token ids."""
    targets: Ids
    """(B, T) the id that follows each input, or IGNORED."""
    real: NDArray[np.bool_] | None
    """(B, T) False at padding; None: no padding."""

    @property
    def n_targets(self) -> int:
        return int(np.count_nonzero(self.targets != IGNORED))

    def part(self, start: int, stop: int) -> "Batch":
        """Some rows, without padding that no row of them needs."""
        real = None if self.real is None else self.real[start:stop]
        width = self.inputs.shape[1] if real is None else max(1, int(real.sum(1).max()))
        rows = slice(start, stop)
        kept = None if real is None else real[:, :width]
        return Batch(self.inputs[rows, :width], self.targets[rows, :width], kept)


class Layout(Protocol):
    n_rows: int
    """Rows of an epoch."""
    n_swept: int
    """Rows of a whole sweep."""
    length: int
    """Tokens that the longest row reads."""

    def cut(self, index: Ids, epoch: Ids, seed: int) -> Batch:
        """The rows of these numbers in these epochs."""
        ...

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Every target of the split once, in order; or about `limit` rows spread over it."""
        ...


def batch_at(layout: Layout, *, seed: int, step: int, batch_size: int) -> Batch:
    """The batch of an update. An epoch takes every row once, in an order of its own."""
    number = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch, place = np.divmod(number, layout.n_rows)
    block, index = place // ORDER_BLOCK, np.empty_like(place)
    for one, part in set(zip(epoch.tolist(), block.tolist(), strict=True)):
        inside = (epoch == one) & (block == part)
        index[inside] = order(layout.n_rows, seed, one, part)[place[inside] % ORDER_BLOCK]
    return layout.cut(index, epoch, seed)


@lru_cache(maxsize=8)
def order(n_rows: int, seed: int, epoch: int, block: int) -> Ids:
    """Which rows an epoch takes, ORDER_BLOCK at a time: one batch costs 0.4 ms, 4096 rows 3."""
    places = np.arange(block * ORDER_BLOCK, min(n_rows, (block + 1) * ORDER_BLOCK), dtype=np.int64)
    return permute(places, n_rows, key(seed, "order", epoch))


def spread_rows(n_rows: int, limit: int | None) -> Ids:
    n = n_rows if limit is None else min(limit, n_rows)
    return np.arange(n, dtype=np.int64) * n_rows // n


class Stream:
    """Fixed windows over all tokens, cut at an offset that differs from epoch to epoch."""

    def __init__(self, tokens: Tokens, context_length: int) -> None:
        self.tokens = tokens
        self.length = min(context_length, len(tokens) - 1)
        self.n_rows = max(1, (len(tokens) - self.length) // self.length)
        self.n_swept = -(-(len(tokens) - 1) // self.length)
        self.spare = len(tokens) - 1 - self.n_rows * self.length

    def cut(self, index: Ids, epoch: Ids, seed: int) -> Batch:
        offsets = {e: key(seed, "offset", e) % (self.spare + 1) for e in np.unique(epoch).tolist()}
        start = index * self.length + np.array([offsets[e] for e in epoch.tolist()], dtype=np.int64)
        return self.windows(start)

    def windows(self, start: Ids) -> Batch:
        ids = self.tokens[start[:, None] + np.arange(self.length + 1)].astype(np.int64)
        return Batch(ids[:, :-1], ids[:, 1:], None)

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        n_targets = len(self.tokens) - 1
        starts = spread_rows(self.n_swept, limit) * self.length
        for first in range(0, len(starts), batch_size):
            start = starts[first : first + batch_size]
            at = start[:, None] + np.arange(self.length + 1)
            ids = self.tokens[np.minimum(at, n_targets)].astype(np.int64)
            yield Batch(ids[:, :-1], np.where(at[:, 1:] <= n_targets, ids[:, 1:], IGNORED), None)


def places_of(tokens: Tokens, value: int) -> Ids:
    """Where an id stands, looked for in one stretch after the other."""
    stretches = range(0, len(tokens), STRETCH)
    found = [at + np.flatnonzero(tokens[at : at + STRETCH] == value) for at in stretches]
    return np.concatenate([np.empty(0, np.int64), *found])


class Documents:
    """One document per row, padded on the right to the longest of the batch.

    A document longer than the context is cut into rows of its own. Row r reads the tokens from
    `starts[r]`, of which `lengths[r]` have a target; the first of a document is the end-of-text
    token before it.
    """

    def __init__(self, tokens: Tokens, context_length: int, eot: int) -> None:
        self.tokens, self.pad = tokens, eot
        marks = places_of(tokens, eot)
        starts, lengths = marks[:-1], np.diff(marks)
        if not len(starts):
            raise DataError("data.source: this split has no whole document")
        rows = -(-lengths // context_length)
        inside = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        self.starts = np.repeat(starts, rows) + inside * context_length
        self.lengths = np.minimum(
            np.repeat(lengths, rows) - inside * context_length, context_length
        )
        self.n_rows = self.n_swept = len(self.starts)
        self.length = int(self.lengths.max())

    def cut(self, index: Ids, epoch: Ids, seed: int) -> Batch:
        return self.pad_rows(index)

    def pad_rows(self, index: Ids) -> Batch:
        start, length = self.starts[index][:, None], self.lengths[index][:, None]
        column = np.arange(int(length.max()))
        real = column < length
        at = np.where(real, start + column, 0)
        inputs = np.where(real, self.tokens[at].astype(np.int64), self.pad)
        targets = np.where(real, self.tokens[at + real].astype(np.int64), IGNORED)
        return Batch(inputs, targets, real)

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        chosen = spread_rows(self.n_rows, limit)
        for first in range(0, len(chosen), batch_size):
            yield self.pad_rows(chosen[first : first + batch_size])
