"""Token files and the batches drawn from them. Nothing here knows about models or text.

    train.bin, val.bin   token ids, raw little-endian uint16, or uint32 if the vocabulary needs it
    meta.json            layout, dtype, tokenizer digest, counts, sha256 of each file

A batch is a pure function of (seed, step): resuming at step 1000 needs the number 1000 and nothing
else. B rows, T positions; `row` is a sequence's index in the update's batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gptlite import storage, tokenizer
from gptlite.errors import DataError
from gptlite.keys import key, permuted
from gptlite.tokenizer import Tokenizer

IGNORED = -1
"""Target of a position that is not scored."""
ORDER_BLOCK = 4096
MOST_META_BYTES = 1 << 26
READ_WHOLE_BYTES = 1 << 26
"""Token files up to here are read at once: a mapped file that someone cuts short kills the run."""
Ids = NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class TokenFiles:
    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train_tokens: int | None = None
    """How many of the training split's tokens count; None: all."""

    def n_tokens(self, split: str) -> int:
        """Tokens of a split that count. Raises DataError if there are fewer than asked for."""
        n: int = self.meta["splits"][split]["tokens"]
        if split != "train" or self.train_tokens is None:
            return n
        if self.train_tokens > n:
            raise DataError(
                f"data.train_tokens: the training split has {n} tokens (got {self.train_tokens})"
            )
        return self.train_tokens

    def tokens(self, split: str) -> NDArray[Any]:
        """The ids of a split, mapped if large. Raises DataError if there are too few to learn."""
        n = self.n_tokens(split)
        if n < 2:
            raise DataError(
                f"data.source: {split} has {n} tokens, needs >= 2; give more text, or change "
                f"data.val_fraction"
            )
        path, dtype = self.folder / f"{split}.bin", token_dtype(self.meta["vocab_size"])
        if n * dtype.itemsize > READ_WHOLE_BYTES:
            return np.memmap(path, dtype, "r")[:n]
        return np.fromfile(path, dtype, n)

    def rows(self, split: str, context_length: int) -> "Layout":
        tokens = self.tokens(split)
        if self.meta["layout"] == "stream":
            return Stream(tokens, context_length)
        return Documents(tokens, context_length, self.meta["eot"])

    @property
    def digest(self) -> str:
        """Names the content: equal digests mean equal training."""
        splits = self.meta["splits"]
        part = "" if self.train_tokens is None else f"-{self.train_tokens}"
        sums = f"{splits['train']['sha256']}{part}-{splits['val']['sha256']}"
        return f"{self.meta['layout']}-{sums}"


def open_token_files(
    folder: Path, *, way_out: str = "delete the folder to make it anew"
) -> TokenFiles:
    """Token files with their digests checked; DataError names what is damaged and the way out."""
    path = folder / "meta.json"
    try:
        meta = storage.unsealed(storage.read_regular(path, MOST_META_BYTES))
        return checked(folder, meta, tokenizer.read(folder / "tokenizer.json"))
    except DataError as error:
        why = str(error)
    except (OSError, ValueError) as error:
        why = f"{path}: {getattr(error, 'strerror', None) or error}"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{path}: damaged ({error!r})"
    raise DataError(f"{why}; {way_out}")


def checked(folder: Path, meta: dict[str, Any], built: Tokenizer) -> TokenFiles:
    if tokenizer.digest(built) != meta["tokenizer_sha256"]:
        raise DataError(f"{folder}/tokenizer.json: damaged (sha256 differs from meta.json)")
    ids = (meta["vocab_size"], meta["eot"])
    if ids != (built.vocab_size, built.eot) or meta["layout"] not in ("stream", "documents"):
        raise DataError(f"{folder}/meta.json: damaged (layout or vocabulary)")
    size_of_one = token_dtype(built.vocab_size).itemsize
    for split in ("train", "val"):
        about, path = meta["splits"][split], folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else 0
        if size != about["tokens"] * size_of_one:
            tokens = f"meta.json says {about['tokens']} tokens of {size_of_one} bytes"
            raise DataError(f"{path}: has {size} bytes, {tokens}")
        if storage.file_digest(path) != about["sha256"]:
            raise DataError(f"{path}: damaged (sha256 differs from meta.json)")
        if size:
            check_ids(path, np.memmap(path, token_dtype(built.vocab_size), "r"), built.vocab_size)
    return TokenFiles(folder, meta, built)


def check_ids(path: Path, tokens: NDArray[Any], vocab_size: int) -> None:
    """DataError for an id that the vocabulary does not have."""
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        if part.max() >= vocab_size:
            at = start + int(np.argmax(part >= vocab_size))
            raise DataError(f"{path}: token {tokens[at]} at offset {at} >= vocab_size {vocab_size}")


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
    return permuted(places, n_rows, key(seed, "order", epoch))


def spread(n_rows: int, limit: int | None) -> Ids:
    n = n_rows if limit is None else min(limit, n_rows)
    return np.arange(n, dtype=np.int64) * n_rows // n


class Stream:
    """Fixed windows over all tokens, cut at an offset that differs from epoch to epoch."""

    def __init__(self, tokens: NDArray[Any], context_length: int) -> None:
        self.tokens = tokens
        self.length = min(context_length, len(tokens) - 1)
        self.n_rows = max(1, (len(tokens) - self.length) // self.length)
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
        starts = spread(-(-n_targets // self.length), limit) * self.length
        for first in range(0, len(starts), batch_size):
            start = starts[first : first + batch_size]
            at = start[:, None] + np.arange(self.length + 1)
            ids = self.tokens[np.minimum(at, n_targets)].astype(np.int64)
            yield Batch(ids[:, :-1], np.where(at[:, 1:] <= n_targets, ids[:, 1:], IGNORED), None)


class Documents:
    """One document per row, padded on the right to the longest of the batch.

    A document longer than the context is cut into rows of its own. Row r reads the tokens from
    `starts[r]`, of which `lengths[r]` have a target; the first of a document is the end-of-text
    token before it.
    """

    def __init__(self, tokens: NDArray[Any], context_length: int, eot: int) -> None:
        self.tokens, self.pad = tokens, eot
        marks = np.flatnonzero(np.asarray(tokens) == eot)
        starts, lengths = marks[:-1], np.diff(marks)
        if not len(starts):
            raise DataError("data.source: this split has no whole document")
        rows = -(-lengths // context_length)
        inside = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        self.starts = np.repeat(starts, rows) + inside * context_length
        self.lengths = np.minimum(
            np.repeat(lengths, rows) - inside * context_length, context_length
        )
        self.n_rows = len(self.starts)

    def cut(self, index: Ids, epoch: Ids, seed: int) -> Batch:
        return self.padded(index)

    def padded(self, index: Ids) -> Batch:
        start, length = self.starts[index][:, None], self.lengths[index][:, None]
        column = np.arange(int(length.max()))
        real = column < length
        at = np.where(real, start + column, 0)
        inputs = np.where(real, self.tokens[at].astype(np.int64), self.pad)
        targets = np.where(real, self.tokens[at + real].astype(np.int64), IGNORED)
        return Batch(inputs, targets, real)

    def sweep(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        chosen = spread(self.n_rows, limit)
        for first in range(0, len(chosen), batch_size):
            yield self.padded(chosen[first : first + batch_size])
