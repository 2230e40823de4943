"""Text → token files, streamed: memory stays flat however large the input.

A folder per content in the cache, named by the digest of everything that decides what is in it:

    train.bin, val.bin   token ids, see token_files.py
    tokenizer.json       the tokenizer, which also travels with every run
    meta.json            written last: layout, counts, bytes, digests

A trained tokenizer sees the training part only. Several files that are large together go through
several processes, into parts; see parts.py.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptlite import locks, storage
from gptlite.config.run import RunConfig
from gptlite.data import parts, sources, tokenizers
from gptlite.data.encoding import (
    Scan,
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
from gptlite.data.parts import SPLITS
from gptlite.data.split import is_near
from gptlite.data.token_files import TokenFiles, check_ids, open_token_files, token_dtype
from gptlite.data.tokenizers import Tokenizer
from gptlite.data.unknown import tell_lost
from gptlite.digests import FileStates, digests_of, file_states, require_unchanged
from gptlite.errors import ConfigError, DataError, StorageError
from gptlite.keys import key
from gptlite.terminal import tell
from gptlite.words import count

FORMAT, EARLIER_FORMAT = 3, 2
"""Of the earlier one are token files whose validation was a share of the documents, not of the
bytes."""
MOST_LISTED = 1000
"""Sources that meta.json names one by one; of more, their number and a digest of them all."""
FOREIGN_MAGIC = {
    b"\x93NUMPY": "a .npy array",
    (20240520).to_bytes(4, "little"): "llm.c's format (GPT-2)",
    (20240801).to_bytes(4, "little"): "llm.c's format (Llama 3)",
}


def prepare(run: RunConfig, own: Tokenizer | None = None, trained_on: str = "") -> TokenFiles:
    """The token files of a run: from the cache, from a folder of .bin files, or made now.

    `own` is the tokenizer of a run that begins from another.
    `trained_on` is the digest of the token files that a run was trained on.
    """
    if not run.sources[0]:
        raise ConfigError("data.source: this model was imported, without data; give --split FILE")
    if run.init_from is not None:
        assert own is not None
        if run.data.layout == "documents" and own.eot is None:
            raise ConfigError(
                "data.layout: documents need an end-of-text token; the tokenizer of init_from "
                f"{run.init_from} has none"
            )
    else:
        own = None
    return take_asked(find_or_make(run, own, trained_on), run)


def take_asked(files: TokenFiles, run: RunConfig) -> TokenFiles:
    """Of the tokens, those that the run asks for."""
    data, seed = run.data, key(run.seed, "train_from")
    return replace(
        files,
        train_tokens=data.train_tokens,
        train_key=seed if data.train_from == "seed" and data.train_tokens is not None else None,
        test_share=data.test_share,
    )


def open_split(run: RunConfig, built: Tokenizer, split: str, trained_on: str = "") -> TokenFiles:
    """What `gptlite eval --split` measures a model with this tokenizer on.

    `val` and `train` are of the run's own data. Whatever else data.source may name becomes token
    files in the same way, with all of it in the validation split.
    """
    if split == "test" and not run.data.test_share:
        raise ConfigError(
            "--split test: this run keeps none; data.test_share says how much to keep"
        )
    if split in (*SPLITS, "test"):
        files = prepare(run, built, trained_on)
        if trained_on and files.digest != trained_on:
            tell("data.source: not the text this run was trained on: val may have been seen")
        return files
    if not split or split.startswith("https://"):
        raise ConfigError(f"--split {split}: expected val, train, test, a file, a folder or a glob")
    all_of_it = {"val_source": None, "val_fraction": 1.0, "split_by": "tail", "train_tokens": None}
    data = run.data.model_copy(update={"source": split, "sha256": None, **all_of_it})
    try:
        files = find_or_make(run.model_copy(update={"data": data}), built)
        if (n := files.n_tokens("val")) < 2:
            raise DataError(f"{split}: has {count(n, 'token')}, needs >= 2")
        return files
    except (ConfigError, DataError) as error:
        lines = [problem.removeprefix("data.source: ") for problem in error.problems]
        lines = [line if line.startswith(split) else f"{split}: {line}" for line in lines]
        raise DataError(*(f"--split {line}" for line in lines)) from None


def find_or_make(run: RunConfig, own: Tokenizer | None, trained_on: str = "") -> TokenFiles:
    folder = Path(os.path.expanduser(run.sources[0]))
    if len(run.sources) == 1 and os.path.isfile(folder / "train.bin"):
        return adopt_token_files(folder, run, own)
    storage.require_folder("data.cache_dir:", Path(run.data.cache_dir))
    to_train, to_validate = sources.locate(run), sources.locate_val(run)
    files = [*to_train, *to_validate]
    before = file_states(files)
    listing = describe_sources(files, run)
    cache = Path(run.data.cache_dir) / "tokens"
    earlier = cache / cache_key(run, listing, own, EARLIER_FORMAT)
    if trained_on and (earlier / "meta.json").is_file():
        found = open_token_files(earlier)
        if take_asked(found, run).digest == trained_on:
            return found
    for about in listing[len(to_train) :]:
        about["split"] = "val"
    target = cache / cache_key(run, listing, own)
    if not (target / "meta.json").is_file():
        try:
            for remark in sources.remarks(run, files, listing):
                tell(remark)
            in_parts = parts.is_worthwhile(listing)
            make = make_token_files_in_parts if in_parts else make_token_files
            make(target, files, listing, run, own, before)
        except OSError as error:
            raise StorageError(f"{error.filename or target}: {error.strerror}") from None
    return open_token_files(target)


def describe_sources(files: list[Path], run: RunConfig) -> list[dict[str, Any]]:
    """Name, size and digest of each source."""
    try:
        ledger = Path(run.data.cache_dir) / "digests.json"
        digests = digests_of(files, ledger, partial(storage.file_digest, links=True))
        about = zip(files, digests, strict=True)
        return [{"name": f.name, "bytes": f.stat().st_size, "sha256": d} for f, d in about]
    except OSError as error:
        where = f"data.source: {error.filename}"
        raise StorageError(f"{where}: {error.strerror}") from None


def cache_key(
    run: RunConfig, listing: list[dict[str, Any]], own: Tokenizer | None, format: int = FORMAT
) -> str:
    """Names token files."""
    kind = run.tokenizer.kind
    decides = {"char": ["unknown"], "bpe": ["vocab_size"], "tiktoken": ["name"]}.get(kind, [])
    names: dict[str, Any] = {"format": format, "sources": listing, "kind": kind}
    if own is None:
        names |= {name: getattr(run.tokenizer, name) for name in decides}
    else:
        names["tokenizer"] = tokenizers.digest(own)
    names |= {"layout": run.data.layout, "split_by": run.split_by}
    names |= {"val_fraction": run.data.val_fraction, "text_field": run.data.text_field}
    for name in ("delimiter", "separator"):
        if (value := getattr(run.data, name)) is not None:
            names[name] = value
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:16]


def adopt_token_files(folder: Path, run: RunConfig, own: Tokenizer | None) -> TokenFiles:
    """Token files made elsewhere: by gptlite, or by nanoGPT (then the config names the tokenizer).

    nanoGPT's meta.pkl is a pickle and is never read.
    """
    if run.val_sources:
        raise DataError(f"data.val_source: {folder} holds train.bin and val.bin; leave it out")
    if (folder / "meta.json").is_file():
        found = open_token_files(folder, way_out="make it again, or give the text itself")
        if own is not None and found.meta["tokenizer_sha256"] != tokenizers.digest(own):
            raise DataError(f"data.source: {folder}: of another tokenizer than the model's")
        return found
    kind = run.tokenizer.kind
    if own is None and kind not in ("byte", "tiktoken"):
        raise DataError(
            f"data.source: {folder}: has no meta.json, so tokenizer.kind must name the tokenizer "
            f"(byte or tiktoken, got {kind}); or give the text instead of the .bin files"
        )
    built = own or tokenizers.from_config(run.tokenizer, eot=False, characters="", texts=())
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
        splits[split] = count_tokens(tokens, storage.file_digest(path, links=True), built)
    meta = make_meta(run, built, splits, [{"name": f"{s}.bin", **splits[s]} for s in splits])
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


def count_tokens(tokens: np.ndarray, sha256: str, built: Tokenizer) -> dict[str, Any]:
    """What meta.json says of a split."""
    lengths = np.array(tokenizers.token_lengths(built), dtype=np.int64)
    starts = range(0, len(tokens), 1 << 24)
    n_bytes = sum(int(lengths[tokens[start : start + (1 << 24)]].sum()) for start in starts)
    ends = 0 if built.eot is None else int(np.count_nonzero(tokens == built.eot))
    return {"tokens": len(tokens), "documents": max(1, ends), "bytes": n_bytes, "sha256": sha256}


def make_meta(
    run: RunConfig, built: Tokenizer, splits: dict[str, Any], listing: list[dict[str, Any]]
) -> dict[str, Any]:
    """meta.json: all that a reader of the token files needs to know."""
    n_bytes = sum(split["bytes"] for split in splits.values())
    n_tokens = sum(split["tokens"] for split in splits.values())
    return {
        "format": FORMAT,
        "layout": run.data.layout,
        "dtype": token_dtype(built.vocab_size).name,
        "tokenizer": built.kind,
        "tokenizer_sha256": tokenizers.digest(built),
        "vocab_size": built.vocab_size,
        "eot": built.eot,
        "bytes_per_token": n_bytes / max(1, n_tokens),
        "splits": splits,
        "sources": shorten_listing(listing),
    }


def shorten_listing(listing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources as meta.json has them, which must stay small enough to be read again."""
    if len(listing) <= MOST_LISTED:
        return listing
    n_bytes = sum(about["bytes"] for about in listing)
    sha256 = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return [{"files": len(listing), "bytes": n_bytes, "sha256": sha256}]


def make_token_files(
    target: Path,
    files: list[Path],
    listing: list[dict[str, Any]],
    run: RunConfig,
    own: Tokenizer | None,
    before: FileStates,
) -> None:
    """Tokenize into a temporary folder and rename it: a cache folder is whole or absent."""
    with workbench(target) as work:
        with require_unchanged(before):
            scan = scan_sources(files, listing, run)
            plan = plan_split(scan, run)
            built = own
            if built is None:
                texts = divide(read_to_learn(files, run, scan.n_bytes), plan)
                built = build_tokenizer(run, scan, texts)
            with show_progress("encode", scan.n_bytes) as advance:
                splits = write_token_files(
                    files,
                    run,
                    built,
                    work,
                    plan=plan,
                    advance=advance,
                    separate=is_separate(scan, run),
                    leading=run.data.layout == "documents",
                )
        check_splits(splits, run)
        finish(work, make_meta(run, built, splits, listing), built)
        (work / locks.LOCK).unlink()
        with suppress(OSError):  # another process may have made the same folder meanwhile
            os.rename(work, target)


def scan_sources(files: list[Path], listing: list[dict[str, Any]], run: RunConfig) -> Scan:
    """What the first pass finds: in what is trained on, and then in what is validated on."""
    n_train = sum("split" not in about for about in listing)
    with show_progress("read", 0) as advance:
        scan = scan_text(read_files(files[:n_train], run, advance), run)
        if files[n_train:]:
            scan = scan.with_val(scan_text(read_files(files[n_train:], run, advance), run))
    return scan


@contextmanager
def workbench(target: Path) -> Iterator[Path]:
    """A folder beside the target that goes when it is left, and with it what killed ones left."""
    for left in target.parent.glob(".tmp-*"):
        locks.discard_abandoned(left)
    lock = None
    while lock is None:  # else another process took the new folder for one that was left
        work = storage.temporary_path(target)
        work.mkdir(parents=True)
        lock = locks.lock_new_folder(work)
    try:
        yield work
    finally:
        lock.close()
        shutil.rmtree(work, ignore_errors=True)


def make_token_files_in_parts(
    target: Path,
    files: list[Path],
    listing: list[dict[str, Any]],
    run: RunConfig,
    own: Tokenizer | None,
    before: FileStates,
) -> None:
    """The same in parts, by several processes; parts that a killed attempt left are taken up."""
    with parts.workplace(target) as work:
        if (target / "meta.json").is_file():  # made by another process, for which we waited
            return
        with require_unchanged(before):
            built, made = parts.tokenize(files, listing, run, own, work)
        splits = parts.join_counts(work, made)
        check_splits(splits, run)
        finish(work, {**make_meta(run, built, splits, listing), "parts": made}, built)
        storage.discard(target)  # one that has lost its meta.json
        os.rename(work, target)


def check_splits(splits: dict[str, Any], run: RunConfig) -> None:
    """Say what is lost, and where validation is not what was asked for. Raises DataError."""
    tell_lost(splits, ", ".join(run.sources))
    if run.val_sources:
        return
    share = splits["val"]["bytes"] / sum(splits[split]["bytes"] for split in SPLITS)
    fraction, whole = run.data.val_fraction, run.data.layout == "documents"
    if (whole or run.split_by == "document") and not is_near(share, fraction):
        tell(
            f"data.val_fraction: validation has {share:.1%} of the bytes instead of "
            f"{fraction:.1%}: documents are not cut, copies stay together, and some are too large"
        )


def finish(work: Path, meta: dict[str, Any], built: Tokenizer) -> None:
    storage.write_text(work / "tokenizer.json", storage.seal(built.to_json()))
    storage.write_text(work / "meta.json", storage.seal(meta))
