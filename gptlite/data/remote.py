"""Text that has to be fetched: https, storage that fsspec knows, datasets of Hugging Face's Hub.

Whatever it is, it becomes a file in the cache, whole or not at all, and is fetched once. https goes
through urllib: that of fsspec needs aiohttp, which a plain install has not.

    s3://bucket/folder/*.jsonl           files, globs and folders; each by its own checksum there
    hf://datasets/OWNER/NAME/a.parquet   a file of the Hub, the same way
    hf://OWNER/NAME?split=train&rows=1000   a dataset, streamed; also config= and revision=
"""

import glob
import hashlib
import http.client
import json
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from gptlite import locks, storage
from gptlite.config.run import DataConfig
from gptlite.data.readers import CHUNK, is_searched
from gptlite.errors import ConfigError, DataError, MissingPackages, StorageError, UserError

TIMEOUT_SECONDS = 10
MAX_DOWNLOAD = 1 << 37
PARAMETERS = ("split", "config", "revision", "rows")
"""What may follow the name of a dataset."""


def fetch(url: str, data: DataConfig) -> list[Path]:
    """The files that an address names, in the cache. Raises ConfigError, DataError, UserError."""
    cache = Path(data.cache_dir) / "downloads"
    try:
        if url.startswith("hf://") and not url.startswith("hf://datasets/"):
            return [fetch_dataset(url, data.text_field, cache)]
        return fetch_files(url, data, cache)
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        lacks = error.name or getattr(error.__cause__, "name", None) or str(error)
        raise MissingPackages(f"data.source: {url}:", lacks) from None
    except Exception as error:  # noqa: BLE001 - each kind of storage has errors of its own
        raise fetch_failure(url, error) from None


def fetch_failure(url: str, error: Exception) -> DataError:
    why = (str(error).strip().splitlines() or [""])[0][:200]
    return DataError(f"data.source: {url}: cannot be fetched ({type(error).__name__}: {why})")


def receive(
    parts: Iterator[bytes], url: str, failure: Callable[[str, Exception], DataError] = fetch_failure
) -> Iterator[bytes]:
    """The parts; what fails over there is told from what fails on the disk here."""
    try:
        yield from parts
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        raise failure(url, error) from None


def fetch_files(url: str, data: DataConfig, cache: Path) -> list[Path]:
    """Copies of the files that fsspec finds there."""
    import fsspec

    if url.partition("://")[0] not in fsspec.available_protocols():
        raise ConfigError(f"data.source: {url}: no storage of that name is known to fsspec")
    system, path = fsspec.core.url_to_fs(url)
    if glob.has_magic(path):
        found = system.glob(path)
    elif system.isdir(path):
        inside = ((file, PurePath(file.removeprefix(path))) for file in system.find(path))
        found = [file for file, name in inside if is_searched(name, data)]
    else:
        found = [path]
    if not found:
        raise DataError(f"data.source: {url}: matches no file")
    return [copy_to_cache(system, file, url, cache) for file in sorted(found)]


def copy_to_cache(system: Any, file: str, url: str, cache: Path) -> Path:
    """One file in the cache, named by where it is and what it is there."""
    key = [url.partition("://")[0], file, system.checksum(file)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    target = cache / f"{name}{''.join(Path(file).suffixes[-2:])}"
    if target.is_file():
        return target
    with system.open(file, "rb") as stream:
        parts = iter(lambda: stream.read(CHUNK), b"")
        return save_to_cache(target, receive(parts, url), None, url)


def fetch_dataset(url: str, field: str, cache: Path) -> Path:
    """The texts of a dataset as .jsonl, in the order that it streams them."""
    address = urlsplit(url)
    options = dict(parse_qsl(address.query, keep_blank_values=True))
    if unknown := [name for name in options if name not in PARAMETERS]:
        known = ", ".join(PARAMETERS)
        raise ConfigError(f"data.source: {url}: unknown '{unknown[0]}'; known: {known}")
    rows = options.get("rows")
    if rows is not None and not (rows.isascii() and rows.isdigit() and int(rows) > 0):
        raise ConfigError(f"data.source: {url}: rows must be a positive integer (got {rows!r})")
    name = hashlib.sha256(json.dumps([url, field]).encode()).hexdigest()[:16]
    target = cache / f"{name}.jsonl"
    if target.is_file():
        return target
    try:
        import datasets
    except ImportError:
        raise MissingPackages(f"data.source: {url}:", "datasets") from None
    stream = datasets.load_dataset(
        address.netloc + address.path,
        options.get("config"),
        split=options.get("split", "train"),
        revision=options.get("revision"),
        streaming=True,
    )
    lines = islice(dataset_lines(stream, field, url), None if rows is None else int(rows))
    return save_to_cache(target, receive(lines, url), None, url)


def dataset_lines(stream: Any, field: str, url: str) -> Iterator[bytes]:
    for row in stream:
        text = row.get(field)
        if text is not None and not isinstance(text, str):
            raise DataError(f"data.source: {url}: '{field}' holds {type(text).__name__}, not text")
        if text is None and field not in row:
            columns = ", ".join(row) or "none"
            raise DataError(
                f"data.source: {url}: no column '{field}' (data.text_field); columns: {columns}"
            )
        yield json.dumps({field: text or ""}).encode() + b"\n"


def download(url: str, sha256: str, cache_dir: Path) -> Path:
    """Fetch a file once; what does not have the digest is not kept."""
    suffix = Path(url.split("?")[0]).suffix or ".txt"
    target = cache_dir / "downloads" / f"{sha256[:16]}{suffix}"
    if target.is_file() and storage.file_digest(target, links=True) == sha256:
        return target
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gptlite"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            if not response.url.startswith("https://"):
                raise DataError(f"{url}: redirected to an address that is not https")
            parts = iter(lambda: response.read(CHUNK), b"")
            return save_to_cache(target, receive(parts, url, download_failure), sha256, url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise download_failure(url, getattr(error, "reason", None) or error) from None


def download_failure(url: str, why: object) -> DataError:
    return DataError(
        f"data.source: {url}: cannot be fetched ({why}); download it elsewhere and give the "
        "file: --set data.source=FILE"
    )


def save_to_cache(target: Path, parts: Iterator[bytes], sha256: str | None, name: str) -> Path:
    """Write to a temporary file beside `target`, check, rename. An OSError is taken for the disk's:
    whatever else fails in `parts` must be an error of another kind."""
    part = storage.temporary_path(target)
    got, size = hashlib.sha256(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".tmp-{glob.escape(target.name)}-*"):
            locks.discard_abandoned(left)
        with (
            part.open("wb") as file,
            tqdm(unit="B", unit_scale=True, desc="fetch", disable=None, delay=2) as bar,
        ):
            locks.try_lock(file)  # so that it is not taken for one that was left
            for data in parts:
                size += len(data)
                if size > MAX_DOWNLOAD:
                    raise DataError(f"{name}: larger than {MAX_DOWNLOAD >> 30} GiB")
                got.update(data)
                file.write(data)
                bar.update(len(data))
        if sha256 is not None and got.hexdigest() != sha256:
            raise DataError(f"{name}: sha256 is {got.hexdigest()}, data.sha256 says {sha256}")
        storage.disk.sync(part)
        storage.disk.rename(part, target)
    except OSError as error:
        raise StorageError(f"{target.parent}: {error.strerror}") from None
    finally:
        storage.discard(part)
    return target
