"""Token files and the batches drawn from them. Nothing here knows about models or text.

    train.bin, val.bin   token ids, raw little-endian uint16, or uint32 if the vocabulary needs it
    meta.json            layout, dtype, tokenizer digest, counts, sha256 of each file
    part-00000/ …        instead: the two files of each part of a large corpus; read as one

A batch is a pure function of (seed, step): resuming at step 1000 needs the number 1000 and nothing
else. B rows, T positions; `row` is a sequence's index in the update's batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gptlite import digests, storage
from gptlite.data import tokenizers
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import DataError
from gptlite.keys import key, permuted

IGNORED = -1
"""Target of a position that is not scored."""
ORDER_BLOCK = 4096
MOST_META_BYTES = 1 << 26
READ_WHOLE_BYTES = 1 << 26
"""Token files up to here are read at once: a mapped file that someone cuts short kills the run."""
STRETCH = 1 << 24
"""Tokens that are looked through at a time."""
Ids = NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Joined:
    """Arrays of ids, one behind the other, read as one; nothing is copied until it is asked for."""

    def __init__(self, parts: list[NDArray[Any]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.dtype = parts[0].dtype
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.between(*at.indices(len(self)))
        places = np.asarray(at)
        if places.size and not -len(self) <= places.min() <= places.max() < len(self):
            raise IndexError(f"tokens {places.min()} to {places.max()} of {len(self)}")
        places = np.where(places < 0, places + len(self), places)
        which = np.searchsorted(self.ends, places, side="right")
        ids = np.empty(places.shape, self.dtype)
        for one in np.unique(which).tolist():
            inside, part = which == one, self.parts[one]
            ids[inside] = part[places[inside] - (self.ends[one] - len(part))]
        return ids if ids.ndim else ids[()]

    def between(self, start: int, stop: int, step: int) -> NDArray[Any]:
        assert step == 1, "tokens are read forwards, one by one"
        begins = self.ends - [len(part) for part in self.parts]
        pieces = [
            part[max(0, start - begin) : max(0, stop - begin)]
            for part, begin in zip(self.parts, begins.tolist(), strict=True)
            if begin < stop and start < begin + len(part)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


Tokens = NDArray[Any] | Joined


def part_name(number: int) -> str:
    return f"part-{number:05d}"


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

    def files(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """The files of a split in their order, with what meta.json says of each."""
        if "parts" not in self.meta:
            return [(self.folder / f"{split}.bin", self.meta["splits"][split])]
        return [
            (self.folder / part_name(number) / f"{split}.bin", part[split])
            for number, part in enumerate(self.meta["parts"])
        ]

    def tokens(self, split: str) -> Tokens:
        """The ids of a split, mapped if large. Raises DataError if there are too few to learn."""
        n = self.n_tokens(split)
        if n < 2:
            raise DataError(
                f"data.source: {split} has {n} tokens, needs >= 2; give more text, or change "
                f"data.val_fraction"
            )
        dtype, left = token_dtype(self.meta["vocab_size"]), n
        mapped = n * dtype.itemsize > READ_WHOLE_BYTES
        parts = []
        for path, about in self.files(split):
            count = min(left, about["tokens"])
            if count:
                whole = np.memmap(path, dtype, "r")[:count] if mapped else None
                parts.append(np.fromfile(path, dtype, count) if whole is None else whole)
            left -= count
        return parts[0] if len(parts) == 1 else Joined(parts)

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
        return checked(folder, meta, tokenizers.read(folder / "tokenizer.json"))
    except DataError as error:
        why = str(error)
    except (OSError, ValueError) as error:
        why = f"{path}: {getattr(error, 'strerror', None) or error}"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{path}: damaged ({error!r})"
    raise DataError(f"{why}; {way_out}")


def checked(folder: Path, meta: dict[str, Any], built: Tokenizer) -> TokenFiles:
    if tokenizers.digest(built) != meta["tokenizer_sha256"]:
        raise DataError(f"{folder}/tokenizer.json: damaged (sha256 differs from meta.json)")
    ids = (meta["vocab_size"], meta["eot"])
    if ids != (built.vocab_size, built.eot) or meta["layout"] not in ("stream", "documents"):
        raise DataError(f"{folder}/meta.json: damaged (layout or vocabulary)")
    files = TokenFiles(folder, meta, built)
    expected = {}
    for split in ("train", "val"):
        for path, about in files.files(split):
            check_size(path, about["tokens"], token_dtype(built.vocab_size).itemsize)
            expected[path] = about["sha256"]
        n_tokens = sum(about["tokens"] for _, about in files.files(split))
        if n_tokens != meta["splits"][split]["tokens"]:
            raise DataError(f"{folder}/meta.json: damaged (its parts have {n_tokens} tokens)")
    check = partial(checked_digest, expected=expected, vocab_size=built.vocab_size)
    found = digests.digests(list(expected), folder / "verified.json", check)
    for path, sha256 in zip(expected, found, strict=True):
        if sha256 != expected[path]:
            raise DataError(f"{path}: damaged (sha256 differs from meta.json)")
    return files


def check_size(path: Path, n_tokens: int, size_of_one: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != n_tokens * size_of_one:
        tokens = f"meta.json says {n_tokens} tokens of {size_of_one} bytes"
        raise DataError(f"{path}: has {size} bytes, {tokens}")


def checked_digest(path: Path, expected: dict[Path, str], vocab_size: int) -> str:
    """sha256 of a token file; DataError for an id too large in one that is as it was made."""
    sha256 = storage.file_digest(path)
    if sha256 == expected[path] and path.stat().st_size:
        check_ids(path, np.memmap(path, token_dtype(vocab_size), "r"), vocab_size)
    return sha256


def check_ids(path: Path, tokens: NDArray[Any], vocab_size: int) -> None:
    """DataError for an id that the vocabulary does not have."""
    for start in range(0, len(tokens), STRETCH):
        part = tokens[start : start + STRETCH]
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
    return permuted(places, n_rows, key(seed, "order", epoch))


def spread(n_rows: int, limit: int | None) -> Ids:
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
        starts = spread(self.n_swept, limit) * self.length
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
