"""What is not on this machine becomes a file of the cache, once, or one line that says why not."""

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import Workshop, prose

from gptlite.data import prepare, sources
from gptlite.errors import DataError, UserError


@pytest.fixture
def bucket() -> Any:
    """Storage that fsspec knows and that is in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def located(workshop: Workshop, source: str, **data: Any) -> list[Path]:
    return sources.locate(workshop.run(data={"source": source, **data}))


def test_files_globs_and_folders_of_a_storage(workshop: Workshop, bucket: Any) -> None:
    texts = {"/b/one.txt": b"one", "/b/two.txt": b"two", "/b/c/three.jsonl": b'{"text": "3"}\n'}
    for name, raw in {**texts, "/b/picture.png": b"x"}.items():
        bucket.pipe(name, raw)
    read = [path.read_bytes() for path in located(workshop, "memory://b/one.txt")]
    assert read == [b"one"]
    found = located(workshop, "memory://b/*.txt")
    assert [path.read_bytes() for path in found] == [b"one", b"two"]
    found = located(workshop, "memory://b")
    assert [path.suffix for path in found] == [".jsonl", ".txt", ".txt"]
    assert found == located(workshop, "memory://b")


def test_a_file_is_fetched_once_and_again_when_it_changes(
    workshop: Workshop, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/b/one.txt", b"one")
    (first,) = located(workshop, "memory://b/one.txt")
    stamp = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "open", lambda *_: pytest.fail("fetched again"))
        assert located(workshop, "memory://b/one.txt") == [first]
    assert first.stat().st_mtime_ns == stamp
    bucket.pipe("/b/one.txt", b"another")
    (second,) = located(workshop, "memory://b/one.txt")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"another")


def test_a_run_trains_on_what_is_elsewhere(workshop: Workshop, bucket: Any) -> None:
    bucket.pipe("/b/text.txt", prose().encode())
    digest = hashlib.sha256(prose().encode()).hexdigest()
    run = workshop.run(data={"source": "memory://b/text.txt", "sha256": digest})
    here = prepare.prepare(workshop.run())
    assert prepare.prepare(run).meta["splits"] == here.meta["splits"]
    with pytest.raises(DataError, match=r"data\.sha256 says"):
        located(workshop, "memory://b/text.txt", sha256="0" * 64)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("memory://b/none.txt", "cannot be fetched .FileNotFoundError"),
        ("memory://b/*.md", "matches no file"),
        ("nonsense://b/a.txt", "no storage of that name is known to fsspec"),
        ("hf://owner/name?splitt=train", "unknown 'splitt'; known: split, config, revision, rows"),
        ("hf://owner/name?rows=-1", "rows must be a positive integer"),
    ],
)
def test_what_is_not_there_is_one_line(
    workshop: Workshop, bucket: Any, source: str, told: str
) -> None:
    with pytest.raises(UserError, match=told) as refused:
        located(workshop, source)
    assert len(refused.value.problems) == 1
    assert source in str(refused.value)
    downloads = workshop.folder / "cache" / "downloads"
    assert not downloads.exists() or not list(downloads.iterdir())


def test_a_transfer_that_breaks_leaves_nothing(
    workshop: Workshop, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/b/one.txt", b"one")

    class Broken:
        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def read(self, _: int) -> bytes:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(bucket), "open", lambda *_, **__: Broken())
    with pytest.raises(UserError, match="memory://b/one.txt: cannot be fetched .*reset by peer"):
        located(workshop, "memory://b/one.txt")
    downloads = workshop.folder / "cache" / "downloads"
    assert not list(downloads.iterdir())


def test_a_dataset_is_streamed_into_the_cache(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="the data extra is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = workshop.folder / "set"
    folder.mkdir()
    rows = [{"body": f"text {i} \u00e9", "n": i} for i in range(50)] + [{"body": None, "n": 1}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path,) = located(workshop, f"hf://{folder}?rows=20", text_field="body")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["body"] for line in lines] == [row["body"] for row in rows[:20]]
    (path,) = located(workshop, f"hf://{folder}", text_field="body")
    assert len(path.read_text().splitlines()) == 51
    with pytest.raises(DataError, match=r"no column 'text' .*columns: body, n"):
        located(workshop, f"hf://{folder}")
    with pytest.raises(DataError, match="'n' holds int, not text"):
        located(workshop, f"hf://{folder}", text_field="n")
    with pytest.raises(DataError, match="cannot be fetched"):
        located(workshop, f"hf://{folder}?split=test", text_field="body")


def test_what_a_killed_download_left_is_removed(workshop: Workshop, bucket: Any) -> None:
    bucket.pipe("/b/one.txt", b"one")
    (path,) = located(workshop, "memory://b/one.txt")
    left, other = (path.with_name(f".tmp-{name}-0000000a") for name in (path.name, "other.txt"))
    for file in (left, other):
        file.write_bytes(b"half")
    path.unlink()
    located(workshop, "memory://b/one.txt")
    assert sorted(path.parent.iterdir()) == sorted([path, other])


def test_a_remote_folder_is_searched_as_one_here(workshop: Workshop, bucket: Any) -> None:
    for name in ("a.txt", ".b/c.txt", "__MACOSX/a.txt", "d.html"):
        bucket.pipe(f"/.b/{name}", name.encode())
    read = [path.read_bytes() for path in located(workshop, "memory://.b", include=[".html"])]
    assert read == [b"a.txt", b"d.html"]
