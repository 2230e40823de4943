"""Kinds of files: compressed, columns of tables, encodings, lines without an end."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Workshop
from test_sources import joined

from gptlite import readers, sources
from gptlite.config import DataConfig
from gptlite.errors import DataError, UserError
from gptlite.readers import kind_of, read_file


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
    assert [kind_of(path) for path in (plain, small)] == [kind, kind]


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
    return joined(read_file(path, DataConfig(source=str(path), layout=layout)))


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
    assert joined(read_file(path, data)) == [text for text in texts if text]
    for field, told in (("text", "no column 'text'.*columns: n, body"), ("n", "holds int64, not")):
        with pytest.raises(DataError, match=told):
            list(read_file(path, DataConfig(source=str(path), text_field=field)))
    for name, bad in {"cut": path.read_bytes()[:-100], "other": b"hello", "empty": b""}.items():
        other = tmp_path / f"{name}.parquet"
        other.write_bytes(bad)
        with pytest.raises(DataError, match="not a whole .parquet file"):
            list(read_file(other, data))


def test_a_missing_package_is_one_line_with_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=r"needs pyarrow: pip install 'gptlite\[data\]'"):
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
        for text, end in read_file(path, DataConfig(source=str(path), layout=layout)):
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
        arrow = readers.arrow(path)
        arrow.parquet.write_table(arrow.table({"text": ["", None, *texts]}), path)
    chunks = list(read_file(path, DataConfig(source=str(path))))
    assert max(len(text) for text, _ in chunks) == 8
    assert [ends for _, ends in chunks] == [False, False, True, True, True]
    assert joined(chunks) == texts


def test_half_a_character_of_json_is_replaced_and_whole_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud83d\ude00b\ud83dc"}')
    assert joined(list(read_file(path, DataConfig(source=str(path))))) == ["a😀b?c"]
