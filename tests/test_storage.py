"""Files that appear whole or not at all, and seals that no changed character survives."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlite import storage
from gptlite.errors import StorageError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=10,
)


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.text().filter(lambda name: name != "sha256"), VALUES), st.data())
def test_a_seal_gives_back_what_it_was_given_and_notices_any_change(value, data) -> None:
    text = storage.seal(value)
    assert storage.unseal(text) == value
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda c: c != text[at]))
    for changed in (text[:at] + other + text[at + 1 :], text[:at], text + " "):
        with pytest.raises(ValueError, match=r"damaged|not JSON|no sha256"):
            storage.unseal(changed)


def test_white_space_is_part_of_a_seal() -> None:
    """JSON means the same with a tab for a space; a disk that turns one into the other does not."""
    with pytest.raises(ValueError, match="damaged"):
        storage.unseal(storage.seal({"a": 1}).replace(" ", "\t", 1))


def test_a_file_is_replaced_or_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage.disk, "sync", broken)
    with pytest.raises(StorageError, match=r"a\.txt: Input/output error"):
        storage.write_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_what_is_written_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, path = tmp_path / "secret", tmp_path / "a.txt"
    secret.write_text("untouched")
    monkeypatch.setattr(storage.secrets, "token_hex", lambda n: "00" * n)
    storage.temporary_path(path).symlink_to(secret)
    with pytest.raises(StorageError, match="File exists"):
        storage.write_text(path, "new")
    path.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        storage.disk.append(path, b"more")
    assert secret.read_text() == "untouched"


def test_only_files_are_read(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    file.write_text("text")
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert storage.read_regular(file, 4) == "text"
    assert storage.file_digest(link, links=True) == storage.file_digest(file)
    for path in (link, pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"symbolic link|not a regular file|Is a directory"):
            storage.file_digest(path)
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        storage.read_regular(file, 3)
    file.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="UTF-8 at byte 2"):
        storage.read_regular(file, 4)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours = [
        storage.temporary_path(tmp_path / "a.txt"),
        storage.temporary_path(tmp_path / "b", "old"),
    ]
    for path in ours:
        path.mkdir()
        (path / "inside").write_text("x")
    theirs = [".tmp-mine", "tmp-a-00000000", ".old-b", ".lock", "a.txt"]
    for name in theirs:
        (tmp_path / name).write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    storage.temporary_path(tmp_path / "c").symlink_to(outside)
    storage.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, "outside"])
    assert (outside / "kept").is_file()
