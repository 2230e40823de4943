"""One file → its documents, as a stream: what the kinds of files mean. Nothing is held whole.

.txt .md and others    the whole file, every line (layout documents), or what `separator` parts
.jsonl .ndjson .json   a record each, the text in `data.text_field`; .json may be an array of them
.csv .tsv              a row each, the text in the column of that name
.parquet               the column of that name
any with .gz .zst behind
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from gptlite.config.run import DataConfig
from gptlite.errors import DataError, MissingPackages

SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")
"""What a folder is searched for."""
RECORDS = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
"""What parts their columns."""
COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 20
START = 4096
"""Bytes that show what a file is."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CONTROLS = bytes({*range(32)} - set(b"\t\n\r"))
NOT_TEXT = {
    b"%PDF-": "a PDF, not text; convert it (pdftotext)",
    b"{\\rtf": "RTF, not text; convert it (pandoc)",
    b"PK\x03\x04": "a zip archive (.docx, .odt and .epub are), not text; unpack or convert it",
    b"\xd0\xcf\x11\xe0": "a document of old Office, not text; convert it",
    b"\x1f\x8b": "gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; its name must end in .zst",
    b"SQLite format 3": "a database, not text; write its texts to a .csv",
}
"""How they begin; RTF and UTF-16 without a mark would pass for text."""
MARK = re.compile(r"^<\|endoftext\|>\r?$", re.MULTILINE)
PARQUET_ROWS = 256

Chunk = tuple[str, bool]
"""Some text, and whether a document ends with it."""


def file_kind(path: PurePath) -> str:
    """The suffix that says what is in a file, past the one of its compression."""
    suffix = path.suffix.lower()
    return PurePath(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def is_hidden(name: str) -> bool:
    """Whether a folder is not searched for it: also what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_searched(path: PurePath, data: DataConfig) -> bool:
    """Whether a folder is searched for a file of this name, relative to it."""
    hidden = any(map(is_hidden, path.parts))
    return not hidden and file_kind(path) in (*SUFFIXES, *data.include)


def is_plain(path: Path) -> bool:
    """Whether its text is what stands in its lines."""
    return file_kind(path) not in (*RECORDS, *TABLES, ".parquet")


def has_marks(path: Path) -> bool:
    """Whether the beginning of a text has lines that say <|endoftext|>."""
    return MARK.search(read_start(path, CHUNK).decode(errors="replace")) is not None


def read_documents(path: Path, data: DataConfig) -> Iterator[Chunk]:
    """The documents of one file, in pieces; empty documents are left out."""
    kind = file_kind(path)
    if kind == ".parquet":
        yield from read_parquet(path, data.text_field)
        return
    check_start(path)
    if kind in RECORDS:
        yield from read_records(path, data.text_field)
    elif kind in TABLES:
        yield from read_table(path, data.text_field, data.delimiter or TABLES[kind])
    elif data.separator is not None:
        yield from read_separated(path, data.separator)
    elif data.layout == "documents":
        yield from read_line_documents(path)
    else:
        ends_later = ""
        for text in read_utf8(path):
            if ends_later:
                yield ends_later, False
            ends_later = text
        if ends_later:
            yield ends_later, True


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed as they are read. DataError if it is damaged."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            with import_arrow(path).input_stream(str(path), compression="zstd") as file:
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


def read_start(path: Path, n_bytes: int = START) -> bytes:
    with open_bytes(path) as file:
        start: bytes = file.read(n_bytes)
    return start


def import_arrow(path: Path) -> Any:
    """pyarrow, which the extra `data` brings."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackages(f"data.source: {path}:", "pyarrow") from None
    return pyarrow


def check_start(path: Path) -> None:
    """DataError for what is no text, or none in UTF-8, by how it begins."""
    start = read_start(path)
    for magic, what in NOT_TEXT.items():
        if start.startswith(magic):
            raise DataError(f"data.source: {path}: is {what}")
    if start.startswith(UTF_16):
        raise DataError(f"data.source: {path}: is UTF-16; convert it to UTF-8")
    for half in (start[::2], start[1::2]):
        if len(half) > 3 and len(half.translate(None, CONTROLS)) <= len(half) / 2:
            why = "looks like UTF-16 without a mark (every other byte is a control character)"
            raise DataError(f"data.source: {path}: {why}; convert it to UTF-8")


def read_utf8(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a mebibyte at a time; a byte order mark is left out."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as file:
        at, first = 0, True
        while raw := file.read(CHUNK):
            waiting = len(decoder.getstate()[0])
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


def read_line_documents(path: Path) -> Iterator[Chunk]:
    """Every non-empty line as a document, however long it is; a lone return ends one, too."""
    in_document, carry = False, ""
    for text in read_utf8(path):
        text, carry = carry + text, ""
        if text.endswith("\r"):  # its newline may be in the next piece
            text, carry = text[:-1], "\r"
        *lines, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            if line or in_document:
                yield line, True
            in_document = False
        if rest:
            yield rest, False
            in_document = True
    if in_document:
        yield "", True


def read_separated(path: Path, separator: str) -> Iterator[Chunk]:
    """What stands between separators, without the line break behind one."""
    in_document, carry = False, ""
    for text in read_utf8(path):
        *documents, carry = (carry + text).split(separator)
        for document in documents:
            if not in_document:
                document = document.lstrip("\r\n")
            if document or in_document:
                yield document, True
            in_document = False
        sure = max(0, len(carry) - len(separator))  # in what follows, a separator may have begun
        piece, carry = carry[:sure], carry[sure:]
        if not in_document:
            piece = piece.lstrip("\r\n")
        if piece:
            yield piece, False
            in_document = True
    if not in_document:
        carry = carry.lstrip("\r\n")
    if carry or in_document:
        yield carry, True


def read_records(path: Path, field: str) -> Iterator[Chunk]:
    """The text of each record; those without one are left out, unless it is most of them."""
    n = n_missing = 0
    there: list[str] = []
    for place, record in json_array_items(path) if is_array(path) else json_lines(path):
        text = record.get(field) if isinstance(record, dict) else False
        n += 1
        if text is None and field not in record:
            n_missing, there = n_missing + 1, list(record)
        elif text is not None and not isinstance(text, str):
            raise DataError(f"{place}: no text in field '{field}' (data.text_field)")
        del record  # of a document of a gigabyte there is one copy, not three
        yield from cut_document(text or "")
    if n_missing * 2 > n:
        which = f"{n_missing} of {n} records have no field '{field}' (data.text_field)"
        raise DataError(f"data.source: {path}: {which}; fields: {', '.join(there) or 'none'}")


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line of JSON."""
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig") as file:
        number = 0
        for line in report_bad_utf8(path, file):
            number += 1
            if not line.strip():
                continue
            place = f"data.source: {path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error})") from None
            del line
            yield place, value
            del value


def is_array(path: Path) -> bool:
    """Whether a .json file is one array, and not a record on each line."""
    if file_kind(path) != ".json":
        return False
    return read_start(path).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def json_array_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and the value of each part of a JSON array, which is never held whole."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = (piece for piece in read_utf8(path) if piece)
    begins = next(piece for piece in text if not piece.isspace())
    held, at = begins.lstrip()[1:], 0  # past the bracket, which was seen
    number = 1
    while True:
        if found := gap.match(held, at):
            at = found.end()
        if held.startswith("]", at):
            return
        place = f"data.source: {path}: record {number}"
        try:
            value, at = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            more = "" if isinstance(error, RecursionError) else next(text, "")
            if not more:
                raise DataError(f"{place}: not JSON ({error})") from None
            held, at = held[at:] + more, 0
        else:
            yield place, value
            number += 1


def cut_document(text: str) -> Iterator[Chunk]:
    """A document, CHUNK characters at a time; none if it is empty."""
    for start in range(0, len(text), CHUNK):
        piece = text[start : start + CHUNK]  # JSON spells halves of surrogate pairs, UTF-8 cannot
        yield piece.encode(errors="replace").decode(), start + CHUNK >= len(text)


def read_table(path: Path, field: str, delimiter: str) -> Iterator[Chunk]:
    """The column of that name; DataError for a row with more or fewer fields than the first."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        rows = csv.reader(report_bad_utf8(path, file), delimiter=delimiter, strict=True)
        names, begins = next_row(path, rows), rows.line_num + 1
        check_column(path, field, names, delimiter)
        column = names.index(field)
        while row := next_row(path, rows):
            if len(row) != len(names):
                why = f"has {len(row)} fields, the first row {len(names)}"
                raise DataError(
                    f"data.source: {path}:{begins}: {why}; a text with {delimiter!r} or a line "
                    "break in it needs quotes, and data.delimiter may be another"
                )
            yield from cut_document(row[column])
            begins = rows.line_num + 1


def next_row(path: Path, rows: Any) -> list[str]:
    """Past empty lines; none at the end."""
    begins = rows.line_num + 1
    try:
        return next((row for row in rows if row), [])
    except csv.Error as error:
        open_quote = "unexpected end of data" in str(error)
        why = "a quote that never ends" if open_quote else f"not a table ({error})"
        where = f"data.source: {path}:{begins}"
        raise DataError(f"{where}: {why}; quotes inside a quoted text are doubled") from None


def check_column(path: Path, field: str, names: list[str], delimiter: str = "") -> None:
    """DataError unless there is one of that name."""
    if field in names:
        if names.count(field) > 1:
            n = names.count(field)
            raise DataError(f"data.source: {path}: {n} columns are called '{field}'; rename one")
        return
    columns = ", ".join(names) or "none"
    why = f"no column '{field}' (data.text_field); columns: {columns}"
    others = [sign for sign in ";\t|," if sign != delimiter and len(names) == 1 and sign in columns]
    if others:
        why += f"; data.delimiter may be {others[0]!r}"
    raise DataError(f"data.source: {path}: {why}")


def read_parquet(path: Path, field: str) -> Iterator[Chunk]:
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"data.source: {path}: .parquet is compressed inside; decompress the file")
    pyarrow = import_arrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_column(path, field, schema.names)
            kind = schema.field(field).type
            if not is_text_type(pyarrow.types, kind):
                raise DataError(f"data.source: {path}: column '{field}' holds {kind}, not text")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield from cut_document(text or "")
    except pyarrow.ArrowException as error:
        why = str(error).splitlines()[0]
        raise DataError(f"data.source: {path}: not a whole .parquet file ({why})") from None
    except UnicodeDecodeError:
        raise DataError(f"data.source: {path}: column '{field}' is not valid UTF-8") from None


def is_text_type(types: Any, kind: Any) -> bool:
    """Also where each different text is stored once, or beside its length."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    view = getattr(types, "is_string_view", lambda _: False)  # since pyarrow 16
    return bool(types.is_string(kind) or types.is_large_string(kind) or view(kind))


def report_bad_utf8(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """The lines of a file; DataError with the place of what is no UTF-8."""
    try:
        yield from lines
    except UnicodeDecodeError:
        for _ in read_utf8(path):  # the slow reader knows the place
            pass
        raise
