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
    Scan,
    SplitPlan,
    build_tokenizer,
    divide,
    is_separate,
    plan_split,
    read_files,
    read_to_learn,
    scan_text,
    show_progress,
    write_token_files,
)
from gptlite.data.token_files import part_folder_name
from gptlite.data.tokenizers import Tokenizer
from gptlite.data.workers import Advance
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
    plan: SplitPlan | None = None
    separate: bool = False
    n_threads: int = 1
    tokenizer_sha256: str = ""

    @property
    def key(self) -> str:
        """Of what is made from it here: other parts and the config name the folder around it."""
        return hashlib.sha256(json.dumps([self.sha256, self.tokenizer_sha256]).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        scan = f"scan-{self.number:05d}"
        return self.work / (scan if self.plan is None else part_folder_name(self.number))


def is_worthwhile(listing: list[About]) -> bool:
    n_bytes = sum(source["bytes"] for source in listing)
    return n_bytes >= LARGE_BYTES and len(group_files(listing)) > 1


def group_files(listing: list[About]) -> list[slice]:
    """Which files are each part."""
    enough = max(PART_BYTES, sum(source["bytes"] for source in listing) // MOST_PARTS)
    groups = []
    start = size = 0
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
    waiting = "waiting for another process that makes token files there"
    with locks.hold_folder(target.parent, waiting):
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
    storage.remove_leftovers(work)
    sha256 = [source["sha256"] for source in listing]
    groups = group_files(listing)
    parts = [Part(number, files[g], sha256[g], work) for number, g in enumerate(groups)]
    scans = make_all(parts, partial(scan_part, run), "read", 0)
    whole = merge_scans([part.folder for part in parts], scans)
    if "split" in listing[-1]:
        to_train = ["split" not in listing[g.start] for g in groups]
        whole.n_train_bytes = sum(scan["bytes"] for scan in compress(scans, to_train))
    plan = plan_split(whole, run)
    built = own
    if built is None:
        try:
            built = tokenizers.read_tokenizer(work / "tokenizer.json")  # of an earlier attempt
        except DataError:
            texts = divide(read_to_learn(files, run, whole.n_bytes), plan)
            built = build_tokenizer(run, whole, texts)
    storage.write_text(work / "tokenizer.json", storage.seal(built.to_json()))
    separate = is_separate(whole, run)
    n_threads = max(1, machine.count_cores() // len(parts))
    digest = tokenizers.digest(built)
    to_encode = [
        replace(part, separate=separate, n_threads=n_threads, tokenizer_sha256=digest)
        for part in plan_parts(parts, scans, plan)
    ]
    abouts = make_all(to_encode, partial(encode_part, run), "encode", whole.n_bytes)
    for part in parts:
        storage.remove(part.folder)  # its scan
    return built, [about["splits"] for about in abouts]


def plan_parts(parts: list[Part], scans: list[About], plan: SplitPlan) -> list[Part]:
    """The parts, each with the plan of its own text."""
    planned = []
    n_bytes = n_documents = 0
    for part, scan in zip(parts, scans, strict=True):
        n_after = n_documents + scan["documents"]
        planned.append(replace(part, plan=plan.for_part(n_bytes, slice(n_documents, n_after))))
        n_bytes += scan["bytes"]
        n_documents = n_after
    return planned


def make_all(
    parts: list[Part], make: Callable[[Part, Advance], About], desc: str, n_bytes: int
) -> list[About]:
    """What is in the folder of each part: there from an earlier attempt, or made now."""
    with ThreadPoolExecutor(machine.count_cores()) as threads:
        found = list(threads.map(read_finished, parts))
    todo = [part for part, about in zip(parts, found, strict=True) if about is None]
    if len(todo) < len(parts):
        tell(f"{desc}: {len(parts) - len(todo)} of {len(parts)} parts are there already")
    done = sum(about["bytes"] for about in found if about is not None)
    with show_progress(desc, n_bytes, done) as advance:
        made = iter(workers.run_jobs(make, todo, [part.files[0] for part in todo], advance))
    return [next(made) if about is None else about for about in found]


def read_finished(part: Part) -> About | None:
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


def write_part(part: Part, fill: Callable[[Path], About]) -> About:
    """Make the folder of a part, whole or not at all."""
    unfinished = storage.temporary_path(part.folder)
    storage.make_folders(unfinished)
    try:
        about = {"key": part.key, **fill(unfinished)}
        storage.write_text(unfinished / "made.json", storage.seal(about))
        if part.folder.exists():
            storage.remove(part.folder)
        storage.disk.rename(unfinished, part.folder)
        storage.disk.sync(part.work)
    except BaseException:
        storage.discard(unfinished)
        raise
    return about


def scan_part(run: RunConfig, part: Part, advance: Advance) -> About:
    def fill(folder: Path) -> About:
        scan = scan_text(read_files(part.files, run, advance), run)
        np.asarray(scan.documents, dtype="<u8").tofile(folder / "digests.bin")
        storage.disk.sync(folder / "digests.bin")
        return {
            "bytes": scan.n_bytes,
            "documents": scan.n_documents,
            "characters": "".join(sorted(scan.characters)),
            "files": {"digests.bin": storage.file_digest(folder / "digests.bin")},
        }

    return write_part(part, fill)


def merge_scans(folders: list[Path], scans: list[About]) -> Scan:
    """What one pass over all parts finds."""
    n_bytes = sum(scan["bytes"] for scan in scans)
    n_documents = sum(scan["documents"] for scan in scans)
    characters = set().union(*(scan["characters"] for scan in scans))
    documents = [np.fromfile(folder / "digests.bin", "<u8") for folder in folders]
    return Scan(n_bytes, n_documents, characters, np.concatenate(documents))


@lru_cache(1)
def tokenizer_in(work: Path, sha256: str) -> Tokenizer:
    """A process reads it once."""
    return tokenizers.read_tokenizer(work / "tokenizer.json")


def encode_part(run: RunConfig, part: Part, advance: Advance) -> About:
    def fill(folder: Path) -> About:
        assert part.plan is not None, "scanned, not yet split"
        splits = write_token_files(
            part.files,
            run,
            tokenizer_in(part.work, part.tokenizer_sha256),
            folder,
            plan=part.plan,
            advance=advance,
            separate=part.separate,
            leading=part.number == 0 and run.data.layout == "documents",
            n_threads=part.n_threads,
        )
        n_bytes = sum(splits[split]["bytes"] for split in SPLITS)
        files = {f"{split}.bin": splits[split]["sha256"] for split in SPLITS}
        return {"bytes": n_bytes, "splits": splits, "files": files}

    return write_part(part, fill)


def join_counts(work: Path, parts: list[About]) -> dict[str, Any]:
    """Counts and digest of each split as if it were one file: equal tokens have equal digests."""

    def join_split(split: str) -> About:
        sha256 = hashlib.sha256()
        for number in range(len(parts)):
            with (work / part_folder_name(number) / f"{split}.bin").open("rb") as file:
                while block := file.read(1 << 20):
                    sha256.update(block)
        totals: Counter[str] = Counter()
        for part in parts:
            totals.update({name: n for name, n in part[split].items() if name != "sha256"})
        return {**totals, "sha256": sha256.hexdigest()}

    with ThreadPoolExecutor(len(SPLITS)) as threads:
        return dict(zip(SPLITS, threads.map(join_split, SPLITS), strict=True))
