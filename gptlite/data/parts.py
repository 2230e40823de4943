"""A large corpus of several files → token files in parts, made by several processes.

    KEY.unfinished/scan-00000/   what a part holds: counts, characters, digests of documents
    KEY.unfinished/part-00000/   its train.bin and val.bin
    KEY/                         the same folder, renamed when every part is there

Each is a folder, whole or absent, with a made.json that names what it was made from and the sha256
of its files, so that an attempt that was killed is gone on with. The parts, read one behind the
other, are the tokens that one process would write.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from gptlite import locks, machine, storage
from gptlite.config.run import RunConfig
from gptlite.data import tokenizers, workers
from gptlite.data.encoding import (
    Cut,
    Moved,
    Scan,
    build_tokenizer,
    cut_of,
    divide,
    encode,
    first_pass,
    is_separate,
    progress,
    read,
    with_progress,
)
from gptlite.data.token_files import part_name
from gptlite.data.tokenizers import Tokenizer
from gptlite.errors import DataError
from gptlite.terminal import tell

LARGE_BYTES = 1 << 26
"""Files that are smaller together go through one process."""
PART_BYTES = 1 << 25
"""Small files that follow each other are one part, until it is this large."""
MOST_PARTS = 256
"""Or as large as makes no more parts than this: each mapped file is an open one, of which systems
allow a process about 1000."""
MOST_MADE_BYTES = 1 << 26
SPLITS = ("train", "val")
About = dict[str, Any]
"""What made.json says of a folder: `key`, `files` with their sha256, and what was counted."""


@dataclass(frozen=True)
class Part:
    """Some files of the source, and what a process needs to know to scan or encode them."""

    number: int
    files: list[Path]
    sha256: list[str]
    work: Path
    cut: Cut | None = None
    separate: bool = False
    n_threads: int = 1
    tokenizer_sha256: str = ""

    @property
    def key(self) -> str:
        """Of what is made from it here: other parts and the config name the folder around it."""
        return hashlib.sha256(json.dumps([self.sha256, self.tokenizer_sha256]).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        name = f"scan-{self.number:05d}" if self.cut is None else part_name(self.number)
        return self.work / name


def worth_it(listing: list[About]) -> bool:
    n_bytes = sum(source["bytes"] for source in listing)
    return n_bytes >= LARGE_BYTES and len(group_files(listing)) > 1


def group_files(listing: list[About]) -> list[slice]:
    """Which files are each part."""
    enough = max(PART_BYTES, sum(source["bytes"] for source in listing) // MOST_PARTS)
    groups, start, size = [], 0, 0
    for number, source in enumerate(listing, 1):
        size += source["bytes"]
        last = number == len(listing) or "split" in listing[number] and "split" not in source
        if size >= enough or last:
            groups.append(slice(start, number))
            start, size = number, 0
    return groups


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """The folder where token files come together; one process at a time makes such files.

    What is whole there stays for the next attempt, but for a text that is itself at fault: mended,
    it has another name.
    """
    work = target.with_name(f"{target.name}.unfinished")
    storage.make_folders(target.parent)
    with locks.held(target.parent, "waiting for another process that makes token files there"):
        try:
            yield work
        except DataError:
            storage.discard(work)
            raise


def tokenize(
    files: list[Path], listing: list[About], run: RunConfig, own: Tokenizer | None, work: Path
) -> tuple[Tokenizer, list[About]]:
    """Make all parts; the tokenizer, and for each part the counts and digests of its splits."""
    storage.make_folders(work)
    storage.clean(work)
    sha256 = [source["sha256"] for source in listing]
    groups = group_files(listing)
    parts = [Part(number, files[g], sha256[g], work) for number, g in enumerate(groups)]
    scans = make_all(parts, partial(scan_part, run), "read", 0)
    whole = merge_scans([part.folder for part in parts], scans)
    if "split" in listing[-1]:
        to_train = ["split" not in listing[g.start] for g in groups]
        whole.n_train_bytes = sum(scan["bytes"] for scan in compress(scans, to_train))
    cut = cut_of(whole, run)
    built = own or kept_tokenizer(work)
    if built is None:
        texts = divide(with_progress(files, run, "learn", whole.n_bytes), cut)
        built = build_tokenizer(run, whole, texts)
    storage.write_text(work / "tokenizer.json", storage.seal(built.to_json()))
    made = partial(
        replace,
        separate=is_separate(whole, run),
        n_threads=max(1, machine.count_cores() // len(parts)),
        tokenizer_sha256=tokenizers.digest(built),
    )
    to_encode, n_bytes, n_documents = [], 0, 0
    for part, scan in zip(parts, scans, strict=True):
        of_part = cut.part(n_bytes, slice(n_documents, n_documents + scan["documents"]))
        to_encode.append(made(part, cut=of_part))
        n_bytes, n_documents = n_bytes + scan["bytes"], n_documents + scan["documents"]
    abouts = make_all(to_encode, partial(encode_part, run), "encode", n_bytes)
    for part in parts:
        storage.remove(part.folder)  # its scan
    return built, [about["splits"] for about in abouts]


def kept_tokenizer(work: Path) -> Tokenizer | None:
    """What an earlier attempt learned."""
    try:
        return tokenizers.read(work / "tokenizer.json")
    except DataError:
        return None


def make_all(
    parts: list[Part], make: Callable[[Part, Moved], About], desc: str, n_bytes: int
) -> list[About]:
    """What is in the folder of each part: there from an earlier attempt, or made now."""
    with ThreadPoolExecutor(machine.count_cores()) as threads:
        found = list(threads.map(read_kept, parts))
    todo = [part for part, about in zip(parts, found, strict=True) if about is None]
    if len(todo) < len(parts):
        tell(f"{desc}: {len(parts) - len(todo)} of {len(parts)} parts are there already")
    done = sum(about["bytes"] for about in found if about is not None)
    with progress(desc, n_bytes, done) as moved:
        made = iter(workers.work(make, todo, [part.files[0] for part in todo], moved))
    return [next(made) if about is None else about for about in found]


def read_kept(part: Part) -> About | None:
    """What is whole in its folder and made from the same; None if that is not so."""
    try:
        path = part.folder / "made.json"
        about = storage.unseal(storage.read_regular(path, MOST_MADE_BYTES))
        whole = all(
            storage.file_digest(part.folder / name) == sha256
            for name, sha256 in about["files"].items()
        )
        return about if whole and about["key"] == part.key else None
    except (OSError, ValueError):
        return None


def keep(part: Part, fill: Callable[[Path], About]) -> About:
    """Make the folder of a part, whole or not at all."""
    begun = storage.temporary(part.folder)
    storage.make_folders(begun)
    try:
        about = {"key": part.key, **fill(begun)}
        storage.write_text(begun / "made.json", storage.seal(about))
        if part.folder.exists():
            storage.remove(part.folder)
        storage.disk.rename(begun, part.folder)
        storage.disk.sync(part.work)
    except BaseException:
        storage.discard(begun)
        raise
    return about


def scan_part(run: RunConfig, part: Part, moved: Moved) -> About:
    def fill(folder: Path) -> About:
        scan = first_pass(read(part.files, run, moved), run)
        np.asarray(scan.documents, dtype="<u8").tofile(folder / "digests.bin")
        storage.disk.sync(folder / "digests.bin")
        return {
            "bytes": scan.n_bytes,
            "documents": scan.n_documents,
            "characters": "".join(sorted(scan.characters)),
            "files": {"digests.bin": storage.file_digest(folder / "digests.bin")},
        }

    return keep(part, fill)


def merge_scans(folders: list[Path], scans: list[About]) -> Scan:
    """What one pass over all parts finds."""
    n_bytes, n_documents = (sum(scan[name] for scan in scans) for name in ("bytes", "documents"))
    characters = set().union(*(scan["characters"] for scan in scans))
    documents = [np.fromfile(folder / "digests.bin", "<u8") for folder in folders]
    return Scan(n_bytes, n_documents, characters, np.concatenate(documents))


@lru_cache(1)
def tokenizer_in(work: Path, sha256: str) -> Tokenizer:
    """A process reads it once."""
    return tokenizers.read(work / "tokenizer.json")


def encode_part(run: RunConfig, part: Part, moved: Moved) -> About:
    def fill(folder: Path) -> About:
        assert part.cut is not None, "scanned, not yet cut"
        splits = encode(
            part.files,
            run,
            tokenizer_in(part.work, part.tokenizer_sha256),
            folder,
            cut=part.cut,
            moved=moved,
            separate=part.separate,
            leading=part.number == 0 and run.data.layout == "documents",
            n_threads=part.n_threads,
        )
        n_bytes = sum(splits[split]["bytes"] for split in SPLITS)
        files = {f"{split}.bin": splits[split]["sha256"] for split in SPLITS}
        return {"bytes": n_bytes, "splits": splits, "files": files}

    return keep(part, fill)


def join_counts(work: Path, parts: list[About]) -> dict[str, Any]:
    """Counts and digest of each split as if it were one file: equal tokens have equal digests."""

    def of_split(split: str) -> About:
        sha256 = hashlib.sha256()
        for number in range(len(parts)):
            with (work / part_name(number) / f"{split}.bin").open("rb") as file:
                while block := file.read(1 << 20):
                    sha256.update(block)
        totals: Counter[str] = Counter()
        for part in parts:
            totals.update({name: n for name, n in part[split].items() if name != "sha256"})
        return {**totals, "sha256": sha256.hexdigest()}

    with ThreadPoolExecutor(len(SPLITS)) as threads:
        return dict(zip(SPLITS, threads.map(of_split, SPLITS), strict=True))
