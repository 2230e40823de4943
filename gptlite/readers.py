"""One file → its documents, as a stream: what the kinds of files mean. Nothing is held whole.

.txt .md       the whole file, or every line (layout documents)
.jsonl .csv    a record each, the text in `data.text_field`
.parquet       the column of that name
any with .gz .zst behind
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptlite.config import DataConfig
from gptlite.errors import DataError, UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 20
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PARQUET_ROWS = 256

Chunk = tuple[str, bool]
"""Some text, and whether a document ends with it."""


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, past the one of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def read_file(path: Path, data: DataConfig) -> Iterator[Chunk]:
    """The documents of one file, in pieces; empty documents are left out."""
    kind = kind_of(path)
    if kind == ".jsonl":
        yield from read_jsonl(path, data.text_field)
    elif kind == ".csv":
        yield from read_csv(path, data.text_field)
    elif kind == ".parquet":
        yield from read_parquet(path, data.text_field)
    elif data.layout == "documents":
        yield from read_lines(path)
    else:
        ends_later = ""
        for text in decoded(path):
            if ends_later:
                yield ends_later, False
            ends_later = text
        if ends_later:
            yield ends_later, True


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed as they are read. DataError if it is damaged."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            with arrow(path).input_stream(str(path), compression="zstd") as file:
                yield file
        else:
            with gzip.open(path) if suffix == ".gz" else path.open("rb") as file:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data.source: {path}: damaged ({error})") from None
    except OSError as error:
        if suffix != ".zst" or error.errno is not None:
            raise
        raise DataError(f"data.source: {path}: damaged ({error})") from None


def arrow(path: Path) -> Any:
    """pyarrow, which the extra `data` brings."""
    try:
        import pyarrow.parquet
    except ImportError:
        needs = "needs pyarrow: pip install 'gptlite[data]'"
        raise UserError(f"data.source: {path}: {needs}") from None
    return pyarrow


def decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a mebibyte at a time; a byte order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as file:
        at, first = 0, True
        while raw := file.read(CHUNK):
            waiting = len(decoder.getstate()[0])
            if first and raw.startswith(UTF_16):
                raise DataError(f"data.source: {path}: is UTF-16; convert it to UTF-8")
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise not_utf8(path, at - waiting + error.start) from None
            yield text.removeprefix("\ufeff") if first else text
            at, first = at + len(raw), False
        left = len(decoder.getstate()[0])
        if left:
            raise not_utf8(path, at - left)


def not_utf8(path: Path, at: int) -> DataError:
    return DataError(f"data.source: {path}: not valid UTF-8 at byte {at}; convert it to UTF-8")


def read_lines(path: Path) -> Iterator[Chunk]:
    """Every non-empty line as a document, however long it is."""
    begun, held = False, ""
    for text in decoded(path):
        text, held = held + text, ""
        if text.endswith("\r"):  # its newline may be in the next piece
            text, held = text[:-1], "\r"
        *lines, rest = text.split("\n")
        for line in lines:
            line = line.removesuffix("\r")
            if line or begun:
                yield line, True
            begun = False
        if rest:
            yield rest, False
            begun = True
    if begun or held:
        yield held, True


def read_jsonl(path: Path, field: str) -> Iterator[Chunk]:
    with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="\n") as file:
        number = 0
        for line in records(path, file):
            number += 1
            if not line.strip():
                continue
            place = f"data.source: {path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error})") from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{place}: no text in field '{field}' (data.text_field)")
            del line, record  # of a document of a gigabyte there is one copy, not three
            yield from pieces(text)


def pieces(text: str) -> Iterator[Chunk]:
    """A document, CHUNK characters at a time; none if it is empty."""
    for start in range(0, len(text), CHUNK):
        piece = text[start : start + CHUNK]  # JSON spells halves of surrogate pairs, UTF-8 cannot
        yield piece.encode(errors="replace").decode(), start + CHUNK >= len(text)


def read_csv(path: Path, field: str) -> Iterator[Chunk]:
    csv.field_size_limit(sys.maxsize)
    with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        rows = csv.DictReader(records(path, file))
        if field not in (rows.fieldnames or ()):
            raise no_column(path, field, rows.fieldnames)
        for row in rows:
            yield from pieces(row[field] or "")


def read_parquet(path: Path, field: str) -> Iterator[Chunk]:
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"data.source: {path}: .parquet is compressed inside; decompress the file")
    pyarrow = arrow(path)
    types = pyarrow.types
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise no_column(path, field, names)
            kind = file.schema_arrow.field(field).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise DataError(f"data.source: {path}: column '{field}' holds {kind}, not text")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield from pieces(text or "")
    except pyarrow.ArrowException as error:
        why = str(error).splitlines()[0]
        raise DataError(f"data.source: {path}: not a whole .parquet file ({why})") from None


def no_column(path: Path, field: str, names: Any) -> DataError:
    columns = ", ".join(names or ()) or "none"
    return DataError(
        f"data.source: {path}: no column '{field}' (data.text_field); columns: {columns}"
    )


def records(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError:
        for _ in decoded(path):  # the slow reader knows the place
            pass
        raise
