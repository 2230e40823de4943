"""Text → token files, streamed: memory stays flat however large the input.

A folder per content in the cache, named by the digest of everything that decides what is in it:

    train.bin, val.bin   token ids, see data.py
    tokenizer.json       the tokenizer, which also travels with every run
    meta.json            written last: layout, counts, bytes, digests

Two passes: one counts (and lists characters and documents), one encodes. A trained tokenizer sees
the training part only.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gptlite import origin, readers, sources, storage, tokenizer
from gptlite.config import RunConfig
from gptlite.data import TokenFiles, check_ids, open_token_files, token_dtype
from gptlite.errors import ConfigError, DataError, StorageError
from gptlite.readers import Chunk
from gptlite.tokenizer import Tokenizer

FORMAT = 2
WAITING_PIECES = 64
"""Pieces of text that are encoded ahead of the one that is written."""
WORTH_A_THREAD = 4096
"""Characters; less is encoded at once where it is."""
FOREIGN_MAGIC = {
    b"\x93NUMPY": "a .npy array",
    (20240520).to_bytes(4, "little"): "llm.c's format (GPT-2)",
    (20240801).to_bytes(4, "little"): "llm.c's format (Llama 3)",
}


@dataclass
class Scan:
    """What the first pass over the text finds."""

    n_bytes: int = 0
    n_documents: int = 0
    characters: set[str] = field(default_factory=set)
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    """Eight bytes of each document's digest, kept only to split by document."""


def prepare(run: RunConfig, own: Tokenizer | None = None) -> TokenFiles:
    """The token files of a run: from the cache, from a folder of .bin files, or made now.

    A run that begins from another has its tokenizer; `own` is that one, if it is at hand.
    """
    if not run.sources[0]:
        raise ConfigError("data.source: this model was imported, without data; give --split FILE")
    if run.init_from is not None:
        own = own or origin.tokenizer_of(run.init_from)
        if run.data.layout == "documents" and own.eot is None:
            raise ConfigError(
                "data.layout: documents need an end-of-text token; the tokenizer of init_from "
                f"{run.init_from} has none"
            )
    else:
        own = None
    return replace(found_or_made(run, own), train_tokens=run.data.train_tokens)


def found_or_made(run: RunConfig, own: Tokenizer | None) -> TokenFiles:
    folder = Path(os.path.expanduser(run.sources[0]))
    if len(run.sources) == 1 and os.path.isfile(folder / "train.bin"):
        return adopt(folder, run, own)
    files = sources.locate(run)
    listing = [described(file) for file in files]
    target = Path(run.data.cache_dir) / "tokens" / cache_key(run, listing, own)
    if not (target / "meta.json").is_file():
        try:
            make(target, files, listing, run, own)
        except OSError as error:
            raise StorageError(f"{error.filename or target}: {error.strerror}") from None
    return open_token_files(target)


def described(file: Path) -> dict[str, Any]:
    try:
        sha256 = storage.file_digest(file, links=True)
        return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256}
    except OSError as error:
        raise StorageError(f"data.source: {file}: {error.strerror}") from None


def cache_key(run: RunConfig, listing: list[dict[str, Any]], own: Tokenizer | None) -> str:
    kind = run.tokenizer.kind
    decides = {"char": ["unknown"], "bpe": ["vocab_size"], "tiktoken": ["name"]}.get(kind, [])
    names: dict[str, Any] = {"format": FORMAT, "sources": listing, "kind": kind}
    if own is None:
        names |= {name: getattr(run.tokenizer, name) for name in decides}
    else:
        names["tokenizer"] = tokenizer.digest(own)
    names |= {"layout": run.data.layout, "split_by": run.split_by}
    names |= {"val_fraction": run.data.val_fraction, "text_field": run.data.text_field}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:16]


def adopt(folder: Path, run: RunConfig, own: Tokenizer | None) -> TokenFiles:
    """Token files made elsewhere: by gptlite, or by nanoGPT (then the config names the tokenizer).

    nanoGPT's meta.pkl is a pickle and is never read.
    """
    if (folder / "meta.json").is_file():
        found = open_token_files(folder, way_out="make it again, or give the text itself")
        if own is not None and found.meta["tokenizer_sha256"] != tokenizer.digest(own):
            raise DataError(
                f"data.source: {folder}: of another tokenizer than init_from {run.init_from}"
            )
        return found
    kind = run.tokenizer.kind
    if own is None and kind not in ("byte", "tiktoken"):
        raise DataError(
            f"data.source: {folder}: has no meta.json, so tokenizer.kind must name the tokenizer "
            f"(byte or tiktoken, got {kind}); or give the text instead of the .bin files"
        )
    built = own or tokenizer.build(run.tokenizer, eot=False, characters="", texts=())
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise DataError(f"data.source: {path}: no such file")
        dtype = token_dtype(built.vocab_size)
        check_format(path, dtype.itemsize)
        size = path.stat().st_size
        tokens = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
        check_ids(path, tokens, built.vocab_size)
        splits[split] = count(tokens, storage.file_digest(path, links=True), built)
    meta = describe(run, built, splits, [{"name": f"{s}.bin", **splits[s]} for s in splits])
    return TokenFiles(folder, meta, built)


def check_format(path: Path, size_of_one: int) -> None:
    with path.open("rb") as file:
        start = file.read(6)
    for magic, what in FOREIGN_MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path}: not a token file but {what}; ids alone are read")
    if path.stat().st_size % size_of_one:
        why = f"{path.stat().st_size} bytes, not a multiple of {size_of_one}"
        raise DataError(f"{path}: not a token file: {why}")


def count(tokens: np.ndarray, sha256: str, built: Tokenizer) -> dict[str, Any]:
    lengths = np.array(tokenizer.token_lengths(built), dtype=np.int64)
    parts = range(0, len(tokens), 1 << 24)
    n_bytes = sum(int(lengths[tokens[start : start + (1 << 24)]].sum()) for start in parts)
    ends = 0 if built.eot is None else int(np.count_nonzero(tokens == built.eot))
    return {"tokens": len(tokens), "documents": max(1, ends), "bytes": n_bytes, "sha256": sha256}


def describe(
    run: RunConfig, built: Tokenizer, splits: dict[str, Any], listing: list[dict[str, Any]]
) -> dict[str, Any]:
    """meta.json: all that a reader of the token files needs to know."""
    n_bytes, n_tokens = (sum(s[k] for s in splits.values()) for k in ("bytes", "tokens"))
    return {
        "format": FORMAT,
        "layout": run.data.layout,
        "dtype": token_dtype(built.vocab_size).name,
        "tokenizer": built.kind,
        "tokenizer_sha256": tokenizer.digest(built),
        "vocab_size": built.vocab_size,
        "eot": built.eot,
        "bytes_per_token": n_bytes / max(1, n_tokens),
        "splits": splits,
        "sources": listing,
    }


def make(
    target: Path,
    files: list[Path],
    listing: list[dict[str, Any]],
    run: RunConfig,
    own: Tokenizer | None,
) -> None:
    """Tokenize into a temporary folder and rename it: a cache folder is whole or absent."""
    work = storage.temporary(target)
    work.mkdir(parents=True, exist_ok=True)
    try:
        scan = first_pass(files, run)
        if not scan.n_bytes:
            raise DataError(f"data.source: {', '.join(run.sources)}: has no text (0 bytes)")
        is_val = splitter(scan, run)

        def split_text(desc: str) -> Iterator[tuple[str, Chunk]]:
            return divide(with_progress(files, run, desc, scan.n_bytes), is_val, scan, run)

        separate = run.data.layout == "documents" or scan.n_documents > 1
        built = own or tokenizer.build(
            run.tokenizer,
            eot=separate,
            characters=scan.characters,
            texts=(text for split, (text, _) in split_text("learn") if split == "train"),
        )
        splits = encode(split_text("encode"), built, work, run, separate=separate)
        meta = describe(run, built, splits, listing)
        storage.write_text(work / "tokenizer.json", storage.sealed(built.to_json()))
        storage.write_text(work / "meta.json", storage.sealed(meta))
        with suppress(OSError):  # another process may have made the same folder meanwhile
            os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def with_progress(files: list[Path], run: RunConfig, desc: str, total: int) -> Iterator[Chunk]:
    with tqdm(
        total=total or None, unit="B", unit_scale=True, desc=desc, disable=None, delay=2
    ) as bar:
        for file in files:
            for text, ends in readers.read_file(file, run.data):
                bar.update(len(text))
                yield text, ends


def first_pass(files: list[Path], run: RunConfig) -> Scan:
    scan = Scan()
    by_document, characters = run.split_by == "document", run.tokenizer.kind == "char"
    hashed = hashlib.blake2b(digest_size=8)
    for text, ends in with_progress(files, run, "read", 0):
        raw = text.encode("utf-8", errors="replace")
        scan.n_bytes += len(raw)
        if characters:
            scan.characters.update(text)
        if by_document:
            hashed.update(raw)
        if ends:
            scan.n_documents += 1
            if by_document:
                scan.digests.append(int.from_bytes(hashed.digest(), "little"))
                hashed = hashlib.blake2b(digest_size=8)
    return scan


def splitter(scan: Scan, run: RunConfig) -> Callable[[int], bool]:
    """Whether a document, by number, is for validation. Equal documents stay on one side."""
    if run.split_by == "tail":
        return lambda number: False  # `divide` goes by bytes
    n, digests = scan.n_documents, np.array(scan.digests, dtype=np.uint64)
    n_distinct = len(np.unique(digests))
    if n_distinct < 2:
        raise DataError(
            f"data.source: has {n_distinct} distinct document, needs >= 2 to split by document; "
            "set data.split_by: tail"
        )
    n_val = min(max(1, round(n * run.data.val_fraction)), n - 1)
    last = np.partition(digests, n_val - 1)[n_val - 1]
    chosen = digests < last if last == digests.max() else digests <= last  # leave some to train on
    return lambda number: bool(chosen[number])


def divide(
    chunks: Iterator[Chunk], is_val: Callable[[int], bool], scan: Scan, run: RunConfig
) -> Iterator[tuple[str, Chunk]]:
    """Each piece of text with its split; a text cut by its tail is cut between characters."""
    tail = run.split_by == "tail"
    first_of_tail = int(scan.n_bytes * (1 - run.data.val_fraction))
    whole_documents = run.data.layout == "documents"
    at = number = 0
    split, fresh = "train", True
    for text, ends in chunks:
        raw = text.encode("utf-8", errors="replace")
        if fresh and (is_val(number) or (tail and whole_documents and at >= first_of_tail)):
            split = "val"
        elif fresh and not tail:
            split = "train"
        if tail and not whole_documents and split == "train" and at + len(raw) > first_of_tail:
            head = raw[: first_of_tail - at].decode(errors="ignore")
            if head or not fresh:  # else the document before has ended just here
                yield "train", (head, True)
            split, text = "val", text[len(head) :]
        yield split, (text, ends)
        at, fresh = at + len(raw), ends
        number += ends


class TokenWriter:
    """One token file, hashed as it is written; pieces are encoded in threads, written in order."""

    def __init__(
        self, path: Path, built: Tokenizer, threads: ThreadPoolExecutor, *, separate: bool
    ) -> None:
        self.built, self.threads, self.separate = built, threads, separate
        self.file, self.sha256 = path.open("wb"), hashlib.sha256()
        self.dtype = token_dtype(built.vocab_size)
        self.counts = {"tokens": 0, "documents": 0, "bytes": 0}
        self.held = ""
        self.waiting: deque[Future[np.ndarray] | np.ndarray] = deque()

    def write(self, ids: Future[np.ndarray] | np.ndarray) -> None:
        """Write these when all before are written."""
        self.waiting.append(ids)
        while len(self.waiting) > WAITING_PIECES:
            self.write_first()

    def write_first(self) -> None:
        ids = self.waiting.popleft()
        ids = ids.result() if isinstance(ids, Future) else ids
        raw = ids.astype(self.dtype, copy=False).tobytes()
        self.file.write(raw)
        self.sha256.update(raw)
        self.counts["tokens"] += len(ids)

    def add(self, text: str, ends: bool) -> None:
        self.counts["bytes"] += len(text.encode("utf-8", errors="replace"))
        pieces, self.held = tokenizer.cut(self.held + text, final=ends)
        encode = self.built.encode_array
        for piece in pieces:
            here = len(piece) < WORTH_A_THREAD
            self.write(encode(piece) if here else self.threads.submit(encode, piece))
        if ends:
            self.counts["documents"] += 1
            if self.separate:
                self.end_of_text()

    def end_of_text(self) -> None:
        if self.built.eot is not None:
            self.write(np.array([self.built.eot]))

    def close(self) -> dict[str, Any]:
        while self.waiting:
            self.write_first()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {**self.counts, "sha256": self.sha256.hexdigest()}


def encode(
    parts: Iterator[tuple[str, Chunk]],
    built: Tokenizer,
    work: Path,
    run: RunConfig,
    *,
    separate: bool,
) -> dict[str, Any]:
    """Write both token files.

    The end-of-text token stands behind each document if there are several; in the documents layout
    also at the beginning, so that every document has something to be predicted from.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads, ExitStack() as stack:
        writers = {
            split: TokenWriter(work / f"{split}.bin", built, threads, separate=separate)
            for split in ("train", "val")
        }
        for writer in writers.values():
            stack.callback(writer.file.close)
            if run.data.layout == "documents":
                writer.end_of_text()
        for split, (text, ends) in parts:
            writers[split].add(text, ends)
        return {split: writer.close() for split, writer in writers.items()}
