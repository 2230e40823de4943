"""Text → ids: what is in it, which of it is for validation, and the files its tokens go to.

Two passes: one counts (and lists characters and documents), one encodes. Both stream, and both can
begin at any file: documents never go on from one file to the next.
"""

import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gptlite import machine
from gptlite.config.run import RunConfig
from gptlite.data import readers, tokenizers
from gptlite.data.readers import Chunk
from gptlite.data.split import choose_documents
from gptlite.data.token_files import token_dtype
from gptlite.data.tokenizers import Tokenizer, UnknownCharacter
from gptlite.data.unknown import count_unknown, error_with_place
from gptlite.data.workers import Advance
from gptlite.errors import DataError
from gptlite.terminal import tell

WAITING_PIECES = 64
"""Pieces of text that are encoded ahead of the one that is written."""
MOST_LEARNED = 1 << 24
"""Bytes of text that a BPE is learned from. Learning takes up to a hundred times as much memory."""
LEARNED_PIECE = 1 << 14
"""Characters of a longer text that are taken, or left out, together."""
WORTH_A_THREAD = 4096
"""Characters; less is encoded at once where it is."""


@dataclass
class Scan:
    """What the first pass over the text finds."""

    n_bytes: int = 0
    n_documents: int = 0
    characters: set[str] = field(default_factory=set)
    documents: "array[int] | NDArray[np.uint64]" = field(default_factory=lambda: array("Q"))
    """Eight bytes of each document's digest, and how many bytes it has, one behind the other; kept
    only to split by document."""
    n_train_bytes: int | None = None
    """Where the text of data.val_source begins; None: there is none."""

    def with_val(self, val: "Scan") -> "Scan":
        """What is in this text and then in one to validate on."""
        n_bytes, n_documents = self.n_bytes + val.n_bytes, self.n_documents + val.n_documents
        characters = self.characters | val.characters
        return Scan(n_bytes, n_documents, characters, self.documents, n_train_bytes=self.n_bytes)


@contextmanager
def show_progress(desc: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar over the bytes of a pass; `done` are those of an earlier attempt."""
    with tqdm(
        total=total or None,
        initial=done,
        unit="B",
        unit_scale=True,
        desc=desc,
        disable=None,
        delay=2,
    ) as bar:

        def advance(_: Path, n: int) -> None:
            bar.update(n)

        yield advance


def read_files(files: list[Path], run: RunConfig, advance: Advance) -> Iterator[Chunk]:
    for file in files:
        for text, ends in readers.read_documents(file, run.data):
            advance(file, len(text.encode("utf-8", errors="replace")))
            yield text, ends


def read_to_learn(files: list[Path], run: RunConfig, n_bytes: int) -> Iterator[Chunk]:
    """The text for a tokenizer that is trained, with a bar; nothing is read for another one."""
    with show_progress("learn", n_bytes) as advance:
        yield from read_files(files, run, advance)


def scan_text(chunks: Iterator[Chunk], run: RunConfig) -> Scan:
    """The first pass."""
    documents = array("Q")
    scan = Scan(documents=documents)
    by_document, characters = run.split_by == "document", run.tokenizer.kind == "char"
    hashed, began = hashlib.blake2b(digest_size=8), 0
    for text, ends in chunks:
        raw = text.encode("utf-8", errors="replace")
        scan.n_bytes += len(raw)
        if characters:
            scan.characters.update(text)
        if by_document:
            hashed.update(raw)
        if ends:
            scan.n_documents += 1
            if by_document:
                documents.append(int.from_bytes(hashed.digest(), "little"))
                documents.append(scan.n_bytes - began)
                hashed, began = hashlib.blake2b(digest_size=8), scan.n_bytes
    return scan


@dataclass(frozen=True)
class SplitPlan:
    """Which of a text is for validation: some of its documents, or its tail."""

    documents: NDArray[np.bool_] | None
    """Whether each one is; None: the tail is."""
    tail: int
    """Where the tail begins, in bytes; below 0: before this text."""
    whole_documents: bool

    def for_part(self, n_bytes: int, documents: slice) -> "SplitPlan":
        """The plan of a part which stands behind so many bytes and has these documents."""
        chosen = None if self.documents is None else self.documents[documents]
        return SplitPlan(chosen, self.tail - n_bytes, self.whole_documents)


def plan_split(scan: Scan, run: RunConfig) -> SplitPlan:
    """Equal documents stay on one side."""
    if scan.n_train_bytes is not None:
        require_text("source", run.sources, scan.n_train_bytes)
        require_text("val_source", run.val_sources, scan.n_bytes - scan.n_train_bytes)
        return SplitPlan(None, scan.n_train_bytes, whole_documents=True)
    require_text("source", run.sources, scan.n_bytes)
    fraction, whole_documents = run.data.val_fraction, run.data.layout == "documents"
    tail = int(scan.n_bytes * (1 - fraction))
    if run.split_by == "tail":
        return SplitPlan(None, tail, whole_documents)
    digests, n_bytes = np.asarray(scan.documents, dtype=np.uint64).reshape(-1, 2).T
    n_distinct = len(np.unique(digests))
    if n_distinct < 2:
        raise DataError(
            f"data.source: has {n_distinct} distinct document, needs >= 2 to split by document; "
            "set data.split_by: tail"
        )
    return SplitPlan(choose_documents(digests, n_bytes, fraction), tail, whole_documents)


def require_text(name: str, sources: Sequence[str], n_bytes: int) -> None:
    if not n_bytes:
        raise DataError(f"data.{name}: {', '.join(sources)}: has no text (0 bytes)")


def divide(chunks: Iterator[Chunk], plan: SplitPlan) -> Iterator[tuple[str, Chunk]]:
    """Each piece of text with its split; a text cut by its tail is cut between characters."""
    by_tail = plan.documents is None
    at = number = 0
    split, fresh = "val" if by_tail and plan.tail < 0 else "train", True
    for text, ends in chunks:
        raw = text.encode("utf-8", errors="replace")
        if fresh and plan.documents is not None:
            split = "val" if plan.documents[number] else "train"
        elif fresh and plan.whole_documents and at >= plan.tail:
            split = "val"
        if by_tail and not plan.whole_documents and split == "train" and at + len(raw) > plan.tail:
            head = raw[: plan.tail - at].decode(errors="ignore")
            if head or not fresh:  # else the document before has ended just here
                yield "train", (head, True)
            split, text = "val", text[len(head) :]
        yield split, (text, ends)
        at, fresh = at + len(raw), ends
        number += ends


def is_separate(scan: Scan, run: RunConfig) -> bool:
    """Whether documents are told apart by an end-of-text token."""
    return run.data.layout == "documents" or scan.n_documents > 1


def build_tokenizer(run: RunConfig, scan: Scan, texts: Iterator[tuple[str, Chunk]]) -> Tokenizer:
    """The tokenizer that the config asks for; one that is trained sees the training text only."""
    to_learn: Iterator[str] = (text for split, (text, _) in texts if split == "train")
    if run.tokenizer.kind == "bpe" and scan.n_bytes > MOST_LEARNED:
        how = f"learned from {MOST_LEARNED >> 20} MiB, spread evenly over the training text"
        tell(f"tokenizer: {how}")
        to_learn = sample_evenly(to_learn, MOST_LEARNED / scan.n_bytes)
    return tokenizers.from_config(
        run.tokenizer, eot=is_separate(scan, run), characters=scan.characters, texts=to_learn
    )


def sample_evenly(texts: Iterator[str], share: float) -> Iterator[str]:
    """A share of the texts, in pieces from all of them."""
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), LEARNED_PIECE):
            piece = text[start : start + LEARNED_PIECE]
            seen += len(piece)
            if taken + len(piece) <= share * seen + LEARNED_PIECE:
                taken += len(piece)
                yield piece


class TokenWriter:
    """One token file, hashed as it is written; pieces are encoded in threads, written in order."""

    def __init__(
        self, path: Path, built: Tokenizer, threads: ThreadPoolExecutor, *, separate: bool
    ) -> None:
        self.built, self.threads = built, threads
        self.separate = separate
        self.file, self.sha256 = path.open("wb"), hashlib.sha256()
        self.dtype = token_dtype(built.vocab_size)
        self.counts = Counter(tokens=0, documents=0, bytes=0)
        self.carry = ""
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
        self.counts.update(count_unknown(self.built, text))
        pieces, self.carry = tokenizers.cut_pieces(self.carry + text, final=ends)
        encode = self.built.encode_array
        for piece in pieces:
            here = len(piece) < WORTH_A_THREAD
            self.write(encode(piece) if here else self.threads.submit(encode, piece))
        if ends:
            self.counts["documents"] += 1
            if self.separate:
                self.add_end_of_text()

    def add_end_of_text(self) -> None:
        if self.built.eot is not None:
            self.write(np.array([self.built.eot]))

    def close(self) -> dict[str, Any]:
        while self.waiting:
            self.write_first()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {**self.counts, "sha256": self.sha256.hexdigest()}


def write_token_files(
    files: list[Path],
    run: RunConfig,
    built: Tokenizer,
    work: Path,
    *,
    plan: SplitPlan,
    advance: Advance,
    separate: bool,
    leading: bool,
    n_threads: int | None = None,
) -> dict[str, Any]:
    """Write both token files. Raises DataError with the place of an unknown character.

    The end-of-text token stands behind each document if there are several (`separate`); in the
    documents layout also at the beginning of all text (`leading`), so that every document has
    something to be predicted from.
    """
    with ThreadPoolExecutor(n_threads or machine.count_cores()) as threads, ExitStack() as stack:
        writers = {
            split: TokenWriter(work / f"{split}.bin", built, threads, separate=separate)
            for split in ("train", "val")
        }
        for writer in writers.values():
            stack.callback(writer.file.close)
            if leading:
                writer.add_end_of_text()
        try:
            for split, (text, ends) in divide(read_files(files, run, advance), plan):
                writers[split].add(text, ends)
            return {split: writer.close() for split, writer in writers.items()}
        except UnknownCharacter as unknown:
            raise error_with_place(unknown, files, run.data) from None
