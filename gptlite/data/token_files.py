"""Token files, opened verified: what `prepare` has made of a text.

train.bin, val.bin   token ids, raw little-endian uint16, or uint32 if the vocabulary needs it
meta.json            layout, dtype, tokenizer digest, counts, sha256 of each file
part-00000/ …        instead: the two files of each part of a large corpus; read as one
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlite import storage
from gptlite.data import tokenizers
from gptlite.data.batches import STRETCH, Documents, Layout, Stream, Tokens
from gptlite.data.tokenizers import Tokenizer
from gptlite.digests import digests_of
from gptlite.errors import DataError
from gptlite.words import count

MOST_META_BYTES = 1 << 26
READ_WHOLE_BYTES = 1 << 26
"""Token files up to here are read at once: a mapped file that someone cuts short kills the run."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def part_folder_name(number: int) -> str:
    return f"part-{number:05d}"


class JoinedTokens:
    """Arrays of ids, one behind the other, read as one; nothing is copied until it is asked for."""

    def __init__(self, parts: list[NDArray[Any]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.dtype = parts[0].dtype
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.read_slice(*at.indices(len(self)))
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

    def read_slice(self, start: int, stop: int, step: int) -> NDArray[Any]:
        assert step == 1, "tokens are read forwards, one by one"
        begins = self.ends - [len(part) for part in self.parts]
        pieces = [
            part[max(0, start - begin) : max(0, stop - begin)]
            for part, begin in zip(self.parts, begins.tolist(), strict=True)
            if begin < stop and start < begin + len(part)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


MOST_COUNTED, COUNTED_AT_ONCE = 200_000_000, 1 << 24
"""Tokens of a training split that are counted, and how many of them at once."""


@dataclass(frozen=True)
class TokenFiles:
    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train_tokens: int | None = None
    """How many of the training split's tokens count; None: all."""
    train_key: int | None = None
    """Says where among the tokens of the training split these begin; None: at the first."""
    test_share: float = 0.0
    """Of the validation split's tokens, the last ones, that are the split `test` instead."""

    def counts(self, split: str) -> dict[str, Any]:
        """What meta.json says of a split, or of the one that `test` is cut from."""
        about: dict[str, Any] = self.meta["splits"]["val" if split == "test" else split]
        return about

    def span(self, split: str) -> tuple[int, int]:
        """Where the tokens of a split begin in its files, and how many there are.

        Raises DataError if there are fewer than asked for. A document that is cut is in no row.
        """
        n: int = self.counts(split)["tokens"]
        if split != "train":
            n_test = round(n * self.test_share)
            return (n - n_test, n_test) if split == "test" else (0, n - n_test)
        wanted = n if self.train_tokens is None else self.train_tokens
        if wanted > n:
            raise DataError(
                f"data.train_tokens: the training split has {count(n, 'token')} "
                f"(got {self.train_tokens})"
            )
        return (0 if self.train_key is None else self.train_key % (n - wanted + 1), wanted)

    def n_tokens(self, split: str) -> int:
        """Tokens of a split that count. Raises DataError if there are fewer than asked for."""
        return self.span(split)[1]

    def files(self, split: str) -> list[tuple[Path, dict[str, Any]]]:
        """The files of a split in their order, with what meta.json says of each."""
        if "parts" not in self.meta:
            return [(self.folder / f"{split}.bin", self.counts(split))]
        return [
            (self.folder / part_folder_name(number) / f"{split}.bin", part[split])
            for number, part in enumerate(self.meta["parts"])
        ]

    def tokens(self, split: str) -> Tokens:
        """The ids of a split, mapped if large. Raises DataError if there are too few to learn."""
        begin, n = self.span(split)
        if n < 2:
            more = "data.val_fraction" if split != "test" else "data.test_share"
            raise DataError(
                f"data.source: {split} has {count(n, 'token')}, needs >= 2; give more text, "
                f"or change {more}"
            )
        dtype, left = token_dtype(self.meta["vocab_size"]), n
        mapped = n * dtype.itemsize > READ_WHOLE_BYTES
        parts = []
        for path, about in self.files("val" if split == "test" else split):
            skipped = min(begin, about["tokens"])
            taken = min(left, about["tokens"] - skipped)
            if taken and mapped:
                parts.append(np.memmap(path, dtype, "r")[skipped : skipped + taken])
            elif taken:
                offset = skipped * dtype.itemsize
                parts.append(np.fromfile(path, dtype, taken, offset=offset))
            begin, left = begin - skipped, left - taken
        return parts[0] if len(parts) == 1 else JoinedTokens(parts)

    @cached_property
    def unseen_tokens(self) -> tuple[int, ...]:
        """Ids that the training split never has; none where counting takes more than a moment."""
        tokens, n = self.tokens("train"), self.meta["vocab_size"]
        if len(tokens) > MOST_COUNTED:
            return ()
        counts = np.zeros(n, dtype=np.int64)
        for at in range(0, len(tokens), COUNTED_AT_ONCE):
            piece = np.asarray(tokens[at : at + COUNTED_AT_ONCE], dtype=np.int64)
            counts += np.bincount(piece, minlength=n)
        if self.meta["layout"] == "documents":
            counts[self.meta["eot"]] += 1  # each row begins with it
        return tuple(np.flatnonzero(counts == 0).tolist())

    def rows(self, split: str, context_length: int) -> Layout:
        tokens = self.tokens(split)
        if self.meta["layout"] == "stream":
            return Stream(tokens, context_length)
        return Documents(tokens, context_length, self.meta["eot"])

    @property
    def digest(self) -> str:
        """Names the content: equal digests mean equal training."""
        splits = self.meta["splits"]
        begin = self.span("train")[0]
        part = "" if self.train_tokens is None else f"-{self.train_tokens}"
        part += f"@{begin}" if begin else ""
        test = f"-{self.test_share:g}" if self.test_share else ""
        sums = f"{splits['train']['sha256']}{part}-{splits['val']['sha256']}{test}"
        return f"{self.meta['layout']}-{sums}"


def open_token_files(
    folder: Path, *, way_out: str = "delete the folder to make it anew"
) -> TokenFiles:
    """Token files with their digests checked; DataError names what is damaged and the way out."""
    path = folder / "meta.json"
    try:
        meta = storage.unseal(storage.read_regular(path, MOST_META_BYTES))
        return verify_token_files(
            folder, meta, tokenizers.read_tokenizer(folder / "tokenizer.json")
        )
    except DataError as error:
        why = str(error)
    except (OSError, ValueError) as error:
        why = f"{path}: {getattr(error, 'strerror', None) or error}"
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{path}: damaged ({error!r})"
    raise DataError(f"{why}; {way_out}")


def verify_token_files(folder: Path, meta: dict[str, Any], built: Tokenizer) -> TokenFiles:
    if tokenizers.digest(built) != meta["tokenizer_sha256"]:
        raise DataError(f"{folder}/tokenizer.json: damaged (sha256 differs from meta.json)")
    ids = (meta["vocab_size"], meta["eot"])
    if ids != (built.vocab_size, built.eot) or meta["layout"] not in ("stream", "documents"):
        raise DataError(f"{folder}/meta.json: damaged (layout or vocabulary)")
    files = TokenFiles(folder, meta, built)
    size_of_one, expected = token_dtype(built.vocab_size).itemsize, {}
    for split in ("train", "val"):
        for path, about in files.files(split):
            size = path.stat().st_size if path.is_file() else 0
            if size != about["tokens"] * size_of_one:
                tokens = f"meta.json says {about['tokens']} tokens of {size_of_one} bytes"
                raise DataError(f"{path}: has {size} bytes, {tokens}")
            expected[path] = about["sha256"]
        n_tokens = sum(about["tokens"] for _, about in files.files(split))
        if n_tokens != meta["splits"][split]["tokens"]:
            raise DataError(f"{folder}/meta.json: damaged (its parts have {n_tokens} tokens)")
    check = partial(digest_and_check_ids, expected=expected, vocab_size=built.vocab_size)
    found = digests_of(list(expected), folder / "verified.json", check)
    for path, sha256 in zip(expected, found, strict=True):
        if sha256 != expected[path]:
            raise DataError(f"{path}: damaged (sha256 differs from meta.json)")
    return files


def digest_and_check_ids(path: Path, expected: dict[Path, str], vocab_size: int) -> str:
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
