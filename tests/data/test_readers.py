"""Kinds of files: compressed, columns of tables, encodings, lines without an end."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Workshop
from test_sources import joined

from gptlite.config.run import DataConfig
from gptlite.data import readers, sources
from gptlite.data.readers import file_kind, read_documents
from gptlite.errors import DataError, UserError


def packed(path: Path, raw: bytes) -> Path:
    """The bytes in a file whose suffix says how they are compressed."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
        with arrow.output_stream(str(path), compression="zstd") as file:
            file.write(raw)
    else:
        path.write_bytes(raw)
    return path


CONTENT = {
    ".txt": "one\ntwo café\n".encode(),
    ".jsonl": b'{"text": "one"}\n{"text": "two caf\\u00e9"}\n',
    ".csv": 'text\none\n"two café"\n'.encode(),
}


@pytest.mark.parametrize("compression", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", CONTENT)
def test_a_compressed_file_is_what_is_in_it(tmp_path: Path, kind: str, compression: str) -> None:
    plain = packed(tmp_path / f"a{kind}", CONTENT[kind])
    small = packed(tmp_path / f"a{kind}{compression.lower()}", CONTENT[kind])
    small = small.rename(tmp_path / f"b{kind}{compression}")
    for layout in ("stream", "documents"):
        assert documents(small, layout) == documents(plain, layout)
    assert [file_kind(path) for path in (plain, small)] == [kind, kind]


def test_a_folder_is_read_with_what_is_compressed_in_it(workshop: Workshop) -> None:
    folder = workshop.folder / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.jsonl.gz", "c.csv.zst"):
        packed(folder / name, CONTENT["." + name.split(".")[1]])
    packed(folder / "d.png.gz", b"x")
    run = workshop.run(data={"source": str(folder)})
    assert [path.name for path in sources.locate(run)] == ["a.txt", "b.jsonl.gz", "c.csv.zst"]
    same = [line for line in ("one\ntwo café\n", "one", "two café", "one", "two café")]
    read = [text for path in sources.locate(run) for text in documents(path, "stream")]
    assert read == same


def documents(path: Path, layout: str) -> list[str]:
    return joined(read_documents(path, DataConfig(source=str(path), layout=layout)))


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".csv.zst"])
def test_a_damaged_compressed_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(97, 123, 200_000, dtype=np.uint8).tobytes()
    whole = packed(tmp_path / f"a{suffix}", b"text\n" + raw).read_bytes()
    for name, bad in {"cut": whole[: len(whole) // 2], "other": b"hello"}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"{name}.*{suffix}") as refused:
            documents(path, "stream")
        assert len(refused.value.problems) == 1


def test_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import parquet

    texts = [f"text {i}" for i in range(600)] + [None, "", "last café"]
    table = arrow.table({"n": list(range(603)), "body": texts})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=100)
    data = DataConfig(source=str(path), text_field="body")
    assert joined(read_documents(path, data)) == [text for text in texts if text]
    for field, told in (("text", "no column 'text'.*columns: n, body"), ("n", "holds int64, not")):
        with pytest.raises(DataError, match=told):
            list(read_documents(path, DataConfig(source=str(path), text_field=field)))
    for name, bad in {"cut": path.read_bytes()[:-100], "other": b"hello", "empty": b""}.items():
        other = tmp_path / f"{name}.parquet"
        other.write_bytes(bad)
        with pytest.raises(DataError, match="not a whole .parquet file"):
            list(read_documents(other, data))


def test_a_missing_package_is_one_line_with_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow"):
            documents(tmp_path / name, "stream")


def test_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16; convert it to UTF-8"):
        documents(path, "stream")


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_one_line_of_many_megabytes_streams(tmp_path: Path, suffix: str) -> None:
    """Memory stays flat: the longest piece is far shorter than the line."""
    path = packed(tmp_path / f"a{suffix}", b"x" * (40 << 20))
    for layout in ("stream", "documents"):
        sizes, ends = [], []
        for text, end in read_documents(path, DataConfig(source=str(path), layout=layout)):
            sizes.append(len(text))
            ends.append(end)
        assert (sum(sizes), max(sizes) <= 1 << 20, sum(ends)) == (40 << 20, True, 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_long_record_is_handed_on_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What comes after a reader holds little of it, however long a document is."""
    monkeypatch.setattr(readers, "CHUNK", 8)
    path, texts = tmp_path / f"a.{kind}", ["x" * 20, "é" * 8, "b"]
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts]))
    elif kind == "csv":
        path.write_text("text,n\n,1\n" + "".join(f"{text},1\n" for text in texts))
    else:
        pytest.importorskip("pyarrow", reason="the data extra is not installed")
        arrow = readers.import_arrow(path)
        arrow.parquet.write_table(arrow.table({"text": ["", None, *texts]}), path)
    chunks = list(read_documents(path, DataConfig(source=str(path))))
    assert max(len(text) for text, _ in chunks) == 8
    assert [ends for _, ends in chunks] == [False, False, True, True, True]
    assert joined(chunks) == texts


def test_half_a_character_of_json_is_replaced_and_whole_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83d\ude00b\ud83dc"}')
    assert joined(list(read_documents(path, DataConfig(source=str(path))))) == ["a😀b?c"]


MISSING = ["one", None, "", "two"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_no_text_is_no_document_in_any_kind(tmp_path: Path, kind: str) -> None:
    """Null, missing and empty are one and the same."""
    path = tmp_path / f"a.{kind}"
    rows = [{"text": text, "n": 1} for text in MISSING]
    if kind == "csv":
        path.write_text("text,n\n" + "".join(f"{text or ''},1\n" for text in MISSING))
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
        readers.import_arrow(path).parquet.write_table(arrow.table({"text": MISSING}), path)
    else:
        written = [json.dumps(row) for row in [*rows, {"n": 1}]]
        path.write_text("\n".join(written) if kind == "jsonl" else f"[{', '.join(written)}]")
    assert documents(path, "stream") == ["one", "two"]


def test_records_that_mostly_lack_the_field_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + '{"body": "b", "id": 1}\n' * 2)
    why = r"a.jsonl: 2 of 3 records have no field 'text' \(data.text_field\); fields: body, id"
    with pytest.raises(DataError, match=why):
        documents(path, "stream")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_json_is_records_and_never_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    path, rows = tmp_path / "a.json", [{"text": "one"}, {"n": [1, {"a": "]"}], "text": "zwö\n"}]
    for written in (
        "\n".join(map(json.dumps, rows)),
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
    ):
        path.write_text(written, encoding="utf-8")
        assert documents(path, "stream") == ["one", "zwö\n"]
    path.write_text(" [ ]")
    assert documents(path, "stream") == []


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ('[{"text": "a"}, {"text": "b"', "a.json: record 2: not JSON"),
        ('[{"text": "a"}, "b"]', "a.json: record 2: no text in field 'text'"),
        ("[" * 100_000, "a.json: record 1: not JSON"),
        ('{\n  "text": "a"\n}\n', "a.json:1: not JSON"),
        ("plain text", "a.json:1: not JSON"),
    ],
)
def test_json_that_is_not_records_is_one_line(tmp_path: Path, written: str, why: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(written)
    with pytest.raises(DataError, match=why) as refused:
        documents(path, "stream")
    assert len(refused.value.problems) == 1


BAD_TABLES = {
    "a row too long": ("text,n\none,1\ntwo, too,2\n", "a.csv:3: has 3 fields, the first row 2"),
    "a row too short": ("n,text\n1,one\n2\n", "a.csv:3: has 1 fields, the first row 2"),
    "an open quote": ('n,text\n1,"one\n2,two\n3,three\n', "a.csv:2: a quote that never ends"),
    "a quote inside": ('n,text\n1,"one" two\n', "a.csv:2: not a table .*quotes .* are doubled"),
    "an open quote and another": ('n,text\n1,"one\n2,"two"\n', "a.csv:2: not a table"),
    "two of one name": ("text,n,text\na,1,b\n", "a.csv: 2 columns are called 'text'; rename"),
    "semicolons": ("n;text\n1;one\n", "columns: n;text; data.delimiter may be ';'"),
    "tabs": ("n\ttext\n1\tone\n", r"no column 'text'.*; data.delimiter may be '\\t'"),
}


@pytest.mark.parametrize(("table", "why"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_is_not_what_it_seems_is_one_line(
    tmp_path: Path, table: str, why: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(table)
    with pytest.raises(DataError, match=why) as refused:
        documents(path, "stream")
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(("name", "sign"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", None)])
def test_a_table_may_have_another_delimiter(tmp_path: Path, name: str, sign: str | None) -> None:
    path = tmp_path / name
    lines = [["n", "text"], ["1", "one, two"], ["2", '"a ""b"""']]
    path.write_text("".join((sign or "\t").join(line) + "\n" for line in lines))
    data = DataConfig(source=str(path), delimiter=sign)
    assert joined(read_documents(path, data)) == ["one, two", 'a "b"']


def test_every_kind_of_text_column_is_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    from pyarrow import parquet

    path, texts = tmp_path / "a.parquet", ["one", None, "zwö", "one"]
    kinds = [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())]
    if hasattr(arrow, "string_view"):
        kinds.append(arrow.string_view())
    for kind in kinds:
        column = arrow.array(texts, arrow.string()).cast(kind)
        parquet.write_table(arrow.table({"text": column}), path)
        assert documents(path, "stream") == ["one", "zwö", "one"]
    twice = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], ["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        documents(path, "stream")


NOT_TEXT = {
    "PDF": (b"%PDF-1.7\nstream", "a.txt: is a PDF"),
    "RTF": (rb"{\rtf1\ansi Some text.}", "a.txt: is RTF"),
    "docx": (b"PK\x03\x04word/document.xml", r"a.txt: is a zip archive \(.docx, .odt and .epub"),
    "old Word": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a.txt: is a document of old Office"),
    "gzip": (gzip.compress(b"text"), "a.txt: is gzip; its name must end in .gz"),
    "UTF-16 LE": ("Some text.".encode("utf-16-le"), "looks like UTF-16 without a mark"),
    "UTF-16 BE": ("Some text.".encode("utf-16-be"), "looks like UTF-16 without a mark"),
    "UTF-16 of Russian": ("Привет, мир".encode("utf-16-le"), "looks like UTF-16 without a mark"),
    "UTF-32": ("Some text.".encode("utf-32-le"), "looks like UTF-16 without a mark"),
}


@pytest.mark.parametrize(("raw", "why"), NOT_TEXT.values(), ids=NOT_TEXT)
def test_what_is_no_text_is_named_for_what_it_is(tmp_path: Path, raw: bytes, why: str) -> None:
    for suffix in (".txt", ".txt.gz", ".jsonl", ".csv"):
        path = packed(tmp_path / f"a{suffix}", raw)
        with pytest.raises(DataError, match=why.replace("a.txt", f"a{suffix}")):
            documents(path, "stream")


SEPARATED = "one\n<|endoftext|>\r\ntwo\nlines\n<|endoftext|>\n<|endoftext|>three<|endoftext|>\n"


@pytest.mark.parametrize("chunk", [1, 5, 13, 1 << 20])
@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_a_separator_parts_the_documents_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, layout: str
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    data = DataConfig(source=str(path), layout=layout, separator="<|endoftext|>")
    path.write_text(SEPARATED, newline="")
    assert joined(read_documents(path, data)) == ["one\n", "two\nlines\n", "three"]
    path.write_text("no end at all\n")
    assert joined(read_documents(path, data)) == ["no end at all\n"]
    path.write_text("\n")
    assert joined(read_documents(path, data)) == []
