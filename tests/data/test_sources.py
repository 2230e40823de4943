"""Any file becomes the same documents however it is read, or one line that says where it is bad."""

import csv
import hashlib
import http.client
import io
import json
import os
import re
import ssl
import urllib.error
from collections.abc import Iterable
from email.message import Message
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptlite.config.run import DataConfig
from gptlite.data import readers, remote, sources
from gptlite.data.prepare import prepare
from gptlite.data.readers import Chunk, read_documents
from gptlite.errors import ConfigError, DataError

URL = "https://example.org/folder/story.txt"
STREAM, DOCUMENTS = DataConfig(), DataConfig(layout="documents")


def joined(chunks: Iterable[Chunk]) -> list[str]:
    """Whole documents from their pieces."""
    documents, held = [], ""
    for text, ends in chunks:
        held += text
        if ends:
            documents.append(held)
            held = ""
    assert not held, "the last document does not end"
    return documents


def read(path: Path, data: DataConfig = STREAM) -> list[str]:
    return joined(read_documents(path, data))


@pytest.fixture
def write(tmp_path):
    """Make a file from text or bytes."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 8)


def problem(caught: pytest.ExceptionInfo[DataError]) -> str:
    """What the user is told: always one line."""
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_a_text_file_is_one_document_in_the_stream_layout(write, suffix, small_chunks):
    text = "# Title\r\n\r\nWörter 漢字 " * 9
    assert read(write("a" + suffix, text)) == [text]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_each_line_is_a_document_in_the_documents_layout(write, suffix):
    assert read(write("a" + suffix, "emma\n\nolivia\n ava\n"), DOCUMENTS) == [
        *("emma", "olivia", " ava")
    ]


def lines_of(text: str) -> list[str]:
    return [line for line in re.split("\r\n|\r|\n", text) if line]


signs = st.sampled_from("ab \r\n\té漢👩")
written = st.text(signs, max_size=9) | st.text(signs, min_size=30, max_size=90)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=written, chunk=st.integers(4, 30), mark=st.booleans())
@example(text="a\r\nb", chunk=4, mark=False)  # the line ends where the piece does
@example(text="abc\r\nb\r\n", chunk=4, mark=False)  # between \r and \n
@example(text="abc\r", chunk=4, mark=False)
@example(text="abc\rdef\r\r\nghi\n\rj", chunk=4, mark=False)  # returns alone and in pairs
@example(text="a" * 50, chunk=4, mark=True)
def test_lines_are_the_same_however_the_file_is_read(tmp_path_factory, text, chunk, mark):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", chunk)
        assert read(path, DOCUMENTS) == lines_of(text)
        assert "".join(read(path, STREAM)) == text


def test_all_kinds_of_line_ends_give_the_same_lines(write):
    unix = "one\ntwo\n\nthree"
    for number, end in enumerate(["\n", "\r\n", "\r"]):
        assert read(write(f"{number}.txt", unix.replace("\n", end)), DOCUMENTS) == unix.split()
        jsonl = end.join(json.dumps({"text": word}) for word in unix.split())
        assert read(write(f"{number}.jsonl", jsonl)) == unix.split()
        assert read(write(f"{number}.csv", f"text{end}{unix}".replace("\n", end))) == unix.split()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "hello"), ("a.jsonl", '{"text": "hello"}\n'), ("a.csv", "text\nhello\n")],
)
def test_a_byte_order_mark_is_no_text(write, name, content):
    for data in (STREAM, DOCUMENTS):
        assert read(write(name, b"\xef\xbb\xbf" + content.encode()), data) == ["hello"]


def test_only_a_mark_at_the_beginning_is_left_out(write, small_chunks):
    path = write("a.txt", "\ufeffabc\ufeff" + "\ufeff" * 9)
    assert read(path) == ["abc" + "\ufeff" * 10]


EMPTY = [("a.txt", b""), ("a.txt", b"\xef\xbb\xbf"), ("a.jsonl", b""), ("a.jsonl", b"\n \r\n")]
EMPTY += [("a.csv", b"text\n"), ("a.csv", b"text\n\n"), ("a.csv", b'id,text\n1,""\n2,\n')]


@pytest.mark.parametrize(("name", "content"), EMPTY)
def test_an_empty_file_has_no_document(write, name, content):
    path = write(name, content)
    assert read(path, STREAM) == read(path, DOCUMENTS) == []


NOT_UTF8 = {
    "at the beginning": (b"\xff", 0),
    "latin-1": (b"caf\xe9 au lait", 3),
    "in a later piece": (("é" * 20).encode() + b"\xff tail", 40),
    "across two pieces": (b"abcdefg\xe6\xbc" + b"x" * 20, 7),
    "half a character at the end": (("漢" * 20).encode() + b"\xe6\xbc", 60),
    "after a byte order mark": (b"\xef\xbb\xbfabc\xff", 6),
}


@pytest.mark.parametrize(("content", "at"), NOT_UTF8.values(), ids=NOT_UTF8)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_bytes_that_are_not_utf8_are_named_by_their_place(write, small_chunks, content, at, suffix):
    path = write("a" + suffix, content)
    with pytest.raises(DataError, match=f"not valid UTF-8 at byte {at};") as caught:
        read(path)
    assert str(path) in problem(caught)


def test_every_record_of_a_jsonl_is_a_document(write):
    records = [{"text": "one\ntwo", "n": 1}, {"text": "漢\u2028字"}, {"text": ""}, {"text": "end"}]
    lines = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path = write("a.jsonl", lines)
    documents = ["one\ntwo", "漢\u2028字", "end"]
    assert read(path) == read(path, DOCUMENTS) == documents


def test_the_field_of_a_record_is_a_setting(write):
    data = DataConfig(text_field="body")
    assert read(write("a.jsonl", '{"body": "yes", "text": "no"}'), data) == ["yes"]
    assert read(write("a.csv", "text,body\nno,yes\n"), data) == ["yes"]


BAD_RECORDS = {
    "not JSON": ('{"text": ', "not JSON"),
    "no object": ('["text"]', "no text in field 'text'"),
    "a number": ('{"text": 3}', "no text in field 'text'"),
    "deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("record", "why"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_named_by_file_and_line(write, record, why):
    path = write("a.jsonl", f'{{"text": "good"}}\n\n{record}\n{{"text": "good"}}\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}:3: {why}" in problem(caught)


def test_a_csv_is_read_with_quotes_and_line_breaks(write):
    rows = [{"id": 1, "text": 'say "hi",\nthen go'}, {"id": 2, "text": ""}, {"id": 3, "text": "é"}]
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, ["id", "text"])
    table.writeheader()
    table.writerows(rows)
    path = write("a.csv", file.getvalue())
    assert read(path) == read(path, DOCUMENTS) == ['say "hi",\nthen go', "é"]


def test_a_field_of_a_csv_may_be_long(write):
    """Python's csv alone stops at 128 KiB."""
    long = "word " * 40_000
    assert read(write("a.csv", f'text\n"{long}"\n')) == [long]


def test_a_missing_column_lists_those_there_are(write):
    path = write("a.csv", "id,body\n1,hello\n")
    with pytest.raises(DataError, match="no column 'text'.*columns: id, body") as caught:
        read(path)
    assert str(path) in problem(caught)
    with pytest.raises(DataError, match="columns: none"):
        read(write("b.csv", ""))


def test_a_folder_is_all_its_text_files_in_order(workshop, write):
    names = ["b/z.md", "a.txt", "b/c/d.jsonl", "c.csv"]
    for name in [*names, "image.png", "train.py", "b/e.bin"]:
        write(f"texts/{name}", "x")
    write("texts/folder.txt/inside.txt", "x")
    found = sources.locate(workshop.run(data={"source": str(workshop.folder / "texts")}))
    assert [file.relative_to(workshop.folder / "texts").as_posix() for file in found] == [
        *("a.txt", "b/c/d.jsonl", "b/z.md", "c.csv", "folder.txt/inside.txt")
    ]


def test_a_glob_is_the_files_it_matches_in_order(workshop, write):
    for name in ("2.txt", "10.txt", "1.txt", "3.md", "deep/4.txt"):
        write(f"texts/{name}", "x")
    write("texts/folder.txt/x", "x")

    def names(pattern: str) -> list[str]:
        run = workshop.run(data={"source": str(workshop.folder / "texts" / pattern)})
        return [file.name for file in sources.locate(run)]

    assert names("*.txt") == ["1.txt", "10.txt", "2.txt"]
    assert names("[12].txt") == ["1.txt", "2.txt"]
    assert names("**/*.txt") == ["1.txt", "10.txt", "2.txt", "4.txt"]


def test_a_file_with_the_name_of_a_pattern_is_that_file(workshop, write):
    path = write("a[1].txt", "x")
    assert sources.locate(workshop.run(data={"source": str(path)})) == [path]


def test_a_list_is_read_in_the_order_given(workshop, write):
    paths = [write(name, name) for name in ("z.txt", "a.md", "m.jsonl")]
    found = sources.locate(workshop.run(data={"source": [str(path) for path in paths]}))
    assert found == paths


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("missing.txt", "No such file"),
        ("*.rst", "matches no file"),
        ("empty", "no .txt .md .jsonl .csv .parquet file in this folder"),
        ("pipe.txt", "not a regular file"),
        ("table.npz", ".npz is not text"),
        ("a.txt/b.txt", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("a\0.txt", "NUL"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line_that_names_it(workshop, write, source, why):
    for name in ("a.txt", "table.npz", "empty/image.png"):
        write(name, "x")
    os.mkfifo(workshop.folder / "pipe.txt")
    path = workshop.folder / source
    with pytest.raises(DataError, match=why) as caught:
        sources.locate(workshop.run(data={"source": str(path)}))
    assert str(path) in problem(caught)


def folder_run(workshop, **data):
    return workshop.run(data={"source": str(workshop.folder / "texts"), **data})


def test_what_is_hidden_is_not_looked_for(workshop, write):
    for name in ("a.txt", ".git/b.txt", "__MACOSX/a.txt", "c/.ipynb/d.md", "c/._a.txt", "c/e.md"):
        write(f"texts/{name}", "x")
    hidden = workshop.folder / ".hidden"
    (workshop.folder / "texts").rename(hidden)
    found = sources.locate(workshop.run(data={"source": str(hidden)}))
    assert [file.name for file in found] == ["a.txt", "e.md"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(workshop, write, monkeypatch):
    write("texts/a.txt", "x")

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(top)))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match="texts: Permission denied"):
        sources.locate(folder_run(workshop))


def test_what_a_folder_has_besides_is_counted_and_may_be_included(workshop, write, capsys):
    for number in range(4):
        write(f"texts/{number}.html", f"<p>text {number}</p>")
    for name in ("a.tex", "b.tex", "c.tex", "d.py", "d/e.py", "README", "f.rst"):
        write(f"texts/{name}", "x")
    with pytest.raises(DataError, match=r"folder \(but .html 4, .tex 3, .py 2, .*; data.include"):
        sources.locate(folder_run(workshop))
    write("texts/a.TXT", "some text " * 20)
    prepare(folder_run(workshop))
    (line,) = capsys.readouterr().err.splitlines()
    assert "texts: 11 of 12 files skipped: .html 4, .tex 3, .py 2, " in line
    assert line.endswith("; data.include takes more endings")
    prepare(folder_run(workshop))
    assert capsys.readouterr().err == "", "it is told once, when the text is read"
    found = sources.locate(folder_run(workshop, include=[".html", ".tex"]))
    assert [file.suffix for file in found] == [".html"] * 4 + [".TXT"] + [".tex"] * 3


def test_the_same_content_twice_is_told(workshop, write, capsys):
    """A copy, a link beside its target, a file that is named twice; not what is empty."""
    for name, content in {"a.txt": "some text " * 20, "b.txt": "other text " * 20}.items():
        write(f"texts/{name}", content)
    for name in ("d.txt", "e.txt"):
        write(f"texts/{name}", "")
    prepare(folder_run(workshop))
    assert capsys.readouterr().err == ""
    (workshop.folder / "texts" / "c.txt").symlink_to("a.txt")
    prepare(folder_run(workshop))
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 5 files have the content of another one (" in line
    assert "c.txt that of " in line
    twice = [str(workshop.folder / "texts" / "b.txt")] * 2
    prepare(workshop.run(data={"source": twice}))
    assert "1 of 2 files have the content of another" in capsys.readouterr().err


def test_lines_that_say_endoftext_are_noticed_and_can_be_separators(workshop, write, capsys):
    stories = ["one story, " * 9, "another\n" * 9, "a third. " * 9]
    path = write("stories.txt", "\n<|endoftext|>\n".join(stories))
    plain = prepare(workshop.run(data={"source": str(path)}))
    (line,) = capsys.readouterr().err.splitlines()
    assert "stories.txt: has lines that say <|endoftext|>" in line
    assert 'data.separator: "<|endoftext|>"' in line
    run = workshop.run(data={"source": str(path), "separator": "<|endoftext|>"})
    parted = prepare(run)
    assert capsys.readouterr().err == ""
    n_documents = [
        sum(split["documents"] for split in files.meta["splits"].values())
        for files in (plain, parted)
    ]
    assert n_documents == [2, 4], "the tail begins inside one"
    assert parted.meta["eot"] is not None
    assert "|" not in parted.tokenizer.to_json()["characters"]


def test_text_to_validate_on_may_be_another(workshop, write):
    """All of one is trained on, and all of the other is not."""
    train, val = write("t.txt", "to train on " * 30), write("v/v.txt", "validate " * 20)
    for layout in ("stream", "documents"):
        data = {"source": str(train), "val_source": str(val.parent), "layout": layout}
        files = prepare(workshop.run(data=data, tokenizer={"kind": "byte"}))
        for split, path in (("train", train), ("val", val)):
            ids = [token for token in files.tokens(split).tolist() if token != files.meta["eot"]]
            assert bytes(ids) == path.read_bytes()
        assert files.meta["sources"][1]["split"] == "val"
    other = prepare(workshop.run(data={"source": [str(train), str(val)]}))
    assert other.folder != files.folder


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"val_source": "none.txt"}, "data.val_source: none.txt: No such file"),
        ({"val_source": "empty.txt"}, "data.val_source: empty.txt: has no text"),
        ({"source": "empty.txt", "val_source": "text.txt"}, "data.source: empty.txt: has no text"),
        ({"source": "ids", "val_source": "text.txt"}, "data.val_source: ids holds train.bin and"),
    ],
)
def test_text_to_validate_on_that_cannot_be_is_one_line(workshop, write, monkeypatch, data, why):
    monkeypatch.chdir(workshop.folder)
    write("empty.txt", "")
    write("ids/train.bin", b"a\0b\0")
    with pytest.raises(DataError, match=why) as caught:
        prepare(workshop.run(data=data))
    problem(caught)


def test_a_split_beside_its_own_text_is_refused(workshop):
    with pytest.raises(ConfigError, match="data.split_by: nothing is split beside data.val_source"):
        workshop.run(data={"val_source": "v.txt", "split_by": "document"})
    with pytest.raises(ConfigError, match="data.val_source: a download needs a digest"):
        workshop.run(data={"val_source": URL})
    with pytest.raises(ConfigError, match="data.val_source: is empty"):
        workshop.run(data={"val_source": ""})


def test_the_home_of_nobody_is_a_missing_file(workshop):
    with pytest.raises(DataError, match="~no-such-user/a.txt: No such file"):
        sources.locate(workshop.run(data={"source": "~no-such-user/a.txt"}))


def test_a_file_must_have_the_digest_given_for_it(workshop, write):
    path = write("a.txt", "hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    run = workshop.run(data={"source": str(path), "sha256": digest})
    assert sources.locate(run) == [path]
    path.write_text("hallo")
    with pytest.raises(DataError, match=f"sha256 is .* data.sha256 says {digest}") as caught:
        sources.locate(run)
    assert hashlib.sha256(b"hallo").hexdigest() in problem(caught)


class Response(io.BytesIO):
    """What urlopen returns: bytes from an address."""

    url = URL


class Internet:
    """Stands in for urlopen: one answer, or one failure, for every address."""

    def __init__(self) -> None:
        self.answer: Response | Exception = urllib.error.URLError("Name or service not known")
        self.asked: list[str] = []

    def urlopen(self, request, timeout):
        assert timeout <= 30
        self.asked.append(request.full_url)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def internet(monkeypatch):
    fake = Internet()
    monkeypatch.setattr("urllib.request.urlopen", fake.urlopen)
    return fake


def kept(workshop) -> list[str]:
    """All files of the download folder, left-overs included."""
    return sorted(path.name for path in (workshop.folder / "cache").rglob("*") if path.is_file())


def url_run(workshop, content: bytes, url: str = URL):
    return workshop.run(data={"source": url, "sha256": hashlib.sha256(content).hexdigest()})


def test_a_download_with_the_right_digest_is_kept_and_not_fetched_again(
    workshop, internet, small_chunks
):
    content = b"It was a dark and stormy night; " * 3
    run, internet.answer = url_run(workshop, content), Response(content)
    first = sources.locate(run)
    assert [file.read_bytes() for file in first] == [content]
    assert first[0].suffix == ".txt"
    internet.answer = urllib.error.URLError("gone")
    assert sources.locate(run) == first
    assert internet.asked == [URL]
    assert kept(workshop) == [first[0].name]


def test_a_damaged_download_is_fetched_again(workshop, internet):
    run, internet.answer = url_run(workshop, b"good"), Response(b"good")
    (path,) = sources.locate(run)
    path.write_bytes(b"bad!")
    internet.answer = Response(b"good")
    assert [file.read_bytes() for file in sources.locate(run)] == [b"good"]
    assert len(internet.asked) == 2


def test_a_download_with_another_digest_is_not_kept(workshop, internet):
    internet.answer = Response(b"<html>please log in</html>")
    with pytest.raises(DataError, match="sha256 is .* data.sha256 says") as caught:
        sources.locate(url_run(workshop, b"a story"))
    assert URL in problem(caught)
    assert kept(workshop) == []


def test_a_download_larger_than_any_text_is_not_kept(workshop, internet, monkeypatch):
    monkeypatch.setattr(remote, "MAX_DOWNLOAD", 1 << 10)
    internet.answer = Response(b"x" * 2000)
    with pytest.raises(DataError, match="larger than"):
        sources.locate(url_run(workshop, b"x" * 2000))
    assert kept(workshop) == []


def test_a_download_that_leaves_https_is_refused(workshop, internet):
    internet.answer = Response(b"a story")
    internet.answer.url = "http://example.org/story.txt"
    with pytest.raises(DataError, match="not https") as caught:
        sources.locate(url_run(workshop, b"a story"))
    assert URL in problem(caught)
    assert kept(workshop) == []


class Broken(Response):
    """A connection that fails when half is there."""

    def __init__(self, content: bytes, failure: Exception) -> None:
        super().__init__(content)
        self.failure = failure

    def read(self, size=-1):
        part = super().read(4)
        if not part:
            raise self.failure
        return part


FAILURES = [
    urllib.error.URLError("Name or service not known"),
    urllib.error.HTTPError(URL, 404, "Not Found", Message(), None),
    TimeoutError("timed out"),
    ConnectionResetError(104, "Connection reset by peer"),
    http.client.IncompleteRead(b"half", 100),
    ssl.SSLError(1, "bad record mac"),
    OSError(113, "No route to host"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("when", ["at once", "half way"])
def test_a_download_that_fails_is_one_line_with_the_way_out(workshop, internet, failure, when):
    internet.answer = failure if when == "at once" else Broken(b"half of", failure)
    with pytest.raises(DataError, match="cannot be fetched .*--set data.source=FILE") as caught:
        sources.locate(url_run(workshop, b"half of it all"))
    assert URL in problem(caught)
    assert kept(workshop) == []


@pytest.mark.parametrize("url", ["https://", "https://[1/a.txt", "https://a b/c", "https://a..b/"])
def test_an_address_that_cannot_be_is_one_line(workshop, url):
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        sources.locate(url_run(workshop, b"a story", url))
    assert url in problem(caught)


@pytest.fixture(scope="session")
def documentation(tmp_path_factory) -> Path:
    return sources.python_docs(tmp_path_factory.mktemp("docs"))


def test_the_documentation_of_python_is_english_prose(documentation):
    text = "\n".join(read(documentation)).lower()
    assert len(text) > 1_000_000
    words = text.split()
    for word, at_least in {"the": 0.03, "of": 0.01, "is": 0.01, "return": 0.001}.items():
        assert words.count(word) > at_least * len(words)
    assert "the standard type hierarchy" in text


def test_the_documentation_of_python_does_not_depend_on_the_order_of_a_disk(
    documentation, monkeypatch
):
    listed = os.walk

    def backwards(top):
        for folder, inside, names in listed(top):
            yield folder, inside, names[::-1]
            inside.reverse()

    monkeypatch.setattr(os, "walk", backwards)
    again = list(islice(sources.documentation(), 120))
    assert again == read(documentation)[:120]


def test_the_documentation_of_python_is_made_once(documentation, monkeypatch):
    monkeypatch.setattr(sources, "documentation", lambda: pytest.fail("made again"))
    made = documentation.stat().st_mtime_ns
    assert sources.python_docs(documentation.parents[1]) == documentation
    assert documentation.stat().st_mtime_ns == made


def test_the_verses_are_short_and_plain() -> None:
    (file,) = sources.locate_one("verses", STREAM)
    text = file.read_text(encoding="ascii")
    assert 6_000 < len(text) < 10_000
    assert text.startswith("'Twas brillig")
    assert "\n\n\n" not in text
