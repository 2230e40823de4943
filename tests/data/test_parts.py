"""Large corpora in parts: the tokens of one pass, whatever is killed, damaged or at fault.

The parts are made small, so that a few kilobytes are a large corpus.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TINY, Workshop, merged, prose

from gptlite import digests, machine, storage
from gptlite.config.run import RunConfig
from gptlite.data import parts, prepare, tokenizers, workers
from gptlite.data.batches import batch_at, places_of
from gptlite.data.token_files import JoinedTokens, TokenFiles, open_token_files
from gptlite.errors import DataError, StorageError, UserError

EVERY_FILE = {"LARGE_BYTES": 1, "PART_BYTES": 0, "MOST_PARTS": 1 << 20}
WORK = workers.run_jobs
ONE_PASS = {"LARGE_BYTES": 1 << 40}


def here(
    do: workers.DoJob, jobs: Sequence[Any], firsts: Sequence[Path], advance: workers.Advance
) -> list[Any]:
    """Jobs done in this process: as `workers.run_jobs`, but quick and easy to watch."""
    return [do(job, advance) for job in jobs]


class Corpus:
    """Some files of text in a folder, prepared in parts or in one pass."""

    def __init__(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workshop, self.patch = workshop, monkeypatch
        self.folder = workshop.folder / "texts"
        self.folder.mkdir()
        self.tokens = workshop.folder / "cache" / "tokens"
        self.patch.setattr(workers, "run_jobs", here)

    def write(self, *texts: str, suffix: str = ".txt") -> list[Path]:
        for number, text in enumerate(texts):
            (self.folder / f"{number}{suffix}").write_text(text, encoding="utf-8", newline="")
        return sorted(self.folder.iterdir())

    def run(self, **sections: Any) -> RunConfig:
        data = {"source": str(self.folder), **sections.pop("data", {})}
        return self.workshop.run(data=data, **{"tokenizer": {"kind": "byte"}, **sections})

    def prepared(self, limits: dict[str, int] = EVERY_FILE, **sections: Any) -> TokenFiles:
        for name, value in limits.items():
            self.patch.setattr(parts, name, value)
        return prepare.prepare(self.run(**sections))

    def one_pass(self, **sections: Any) -> TokenFiles:
        cache = {"cache_dir": str(self.workshop.folder / "single")}
        data = {**sections.pop("data", {}), **cache}
        return self.prepared(ONE_PASS, data=data, **sections)


@pytest.fixture
def corpus(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(workshop, monkeypatch)


PROSE = [prose(300, seed) for seed in range(5)]
RECORDS = ["".join(json.dumps({"text": line}) + "\n" for line in t.splitlines()) for t in PROSE]
EMPTY_LINES = ["\n\n", *PROSE[:2], "", "one more é\n", "\n"]
CUTS = [
    {"data": {"split_by": by, "val_fraction": fraction, "layout": layout}}
    for by, layout in (("tail", "stream"), ("document", "stream"), ("tail", "documents"))
    for fraction in (0.1, 0.55)
] + [{"data": {"layout": "documents"}}]


def assert_equal(parts: TokenFiles, whole: TokenFiles) -> None:
    for split in ("train", "val"):
        ids, expected = parts.tokens(split), whole.tokens(split)
        assert ids[np.arange(len(ids))].tolist() == expected.tolist()
        assert parts.meta["splits"][split] == whole.meta["splits"][split]
    assert parts.digest == whole.digest
    assert parts.tokenizer.to_json() == whole.tokenizer.to_json()
    assert {k: v for k, v in parts.meta.items() if k != "parts"} == whole.meta


@pytest.mark.parametrize("sections", CUTS, ids=str)
@pytest.mark.parametrize("texts", [PROSE, EMPTY_LINES], ids=["prose", "empty lines"])
def test_parts_are_the_tokens_of_one_pass(corpus, texts, sections):
    corpus.write(*texts)
    parts = corpus.prepared(**sections)
    assert len(parts.meta["parts"]) == len(texts)
    assert_equal(parts, corpus.one_pass(**sections))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_parts_of_records_have_the_vocabulary_of_all(corpus, kind):
    """`Z` is in one part only."""
    corpus.write(*RECORDS[:3], RECORDS[3] + '{"text": "Zoë"}\n', suffix=".jsonl")
    sections = {"tokenizer": {"kind": kind, "vocab_size": 300}, "data": {"split_by": "document"}}
    assert_equal(corpus.prepared(**sections), corpus.one_pass(**sections))


def test_the_tail_may_begin_at_a_part_or_inside_one(corpus):
    for sizes in ((90, 10), (89, 11), (91, 9), (90, 5, 5), (0, 90, 0, 10)):
        for file in corpus.folder.iterdir():
            file.unlink()
        corpus.write(*("é" * (n // 2) + "e" * (n % 2) for n in sizes))
        assert_equal(corpus.prepared(), corpus.one_pass())


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("n_train", [1, 3])
def test_parts_of_two_sources_are_the_tokens_of_one_pass(corpus, layout, n_train):
    """Small files that share a part never stand on both sides."""
    files = [str(file) for file in corpus.write(*PROSE)]
    data = {"source": files[:n_train], "val_source": files[n_train:], "layout": layout}
    for size in (0, 2000):  # a file, or two, by itself
        parts = corpus.prepared({**EVERY_FILE, "PART_BYTES": size}, data=data)
        assert len(parts.meta["parts"]) > 2
        assert_equal(parts, corpus.one_pass(data=data))
        shutil.rmtree(corpus.tokens)


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_processes_make_the_same(corpus, monkeypatch, layout):
    monkeypatch.setattr(workers, "run_jobs", WORK)
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    corpus.write(*PROSE)
    sections = {"data": {"layout": layout}, "tokenizer": {"kind": "bpe", "vocab_size": 300}}
    assert_equal(corpus.prepared(**sections), corpus.one_pass(**sections))


def test_batches_are_those_of_one_pass(corpus):
    corpus.write(*PROSE)
    for layout in ("stream", "documents"):
        data = {"layout": layout}
        ours, theirs = corpus.prepared(data=data), corpus.one_pass(data=data)
        one, other = (files.rows("train", 16) for files in (ours, theirs))
        for step in (0, 7, 100):
            got = batch_at(one, seed=1, step=step, batch_size=8)
            expected = batch_at(other, seed=1, step=step, batch_size=8)
            assert np.array_equal(got.inputs, expected.inputs)
            assert np.array_equal(got.targets, expected.targets)
        both = zip(one.sweep(8), other.sweep(8), strict=True)
        assert all(np.array_equal(a.targets, b.targets) for a, b in both)


def test_small_sources_and_single_files_are_made_as_ever(corpus):
    files = corpus.write(*PROSE)
    assert "parts" not in corpus.prepared({}).meta
    single = corpus.prepared(data={"source": str(files[0])})
    assert "parts" not in single.meta
    assert sorted(p.name for p in single.folder.iterdir()) == [
        *("meta.json", "tokenizer.json", "train.bin", "val.bin")
    ]


def test_small_files_share_a_part_and_large_ones_have_their_own(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 10)
    sizes = [3, 3, 3, 3, 30, 10, 2, 2]
    groups = parts.group_files([{"bytes": size} for size in sizes])
    assert [sizes[group] for group in groups] == [[3, 3, 3, 3], [30], [10], [2, 2]]


def test_there_are_not_more_parts_than_files_may_be_open():
    sizes = [1 << 30] * 5000
    assert len(parts.group_files([{"bytes": size} for size in sizes])) <= parts.MOST_PARTS


def test_train_tokens_may_end_in_any_part(corpus):
    corpus.write(*PROSE)
    whole = corpus.one_pass().tokens("train").tolist()
    for n in (5, len(PROSE[0]) + 1, len(PROSE[0]) + 2, 3 * len(PROSE[0])):
        files = corpus.prepared(data={"train_tokens": n})
        tokens = files.tokens("train")
        assert tokens[0:n].tolist() == whole[:n]
        assert len(tokens) == n


# Reading parts as one array


@pytest.fixture
def joined() -> tuple[JoinedTokens, np.ndarray]:
    parts = [np.arange(n, dtype="<u2") + 100 * i for i, n in enumerate((3, 0, 5, 1, 4))]
    return JoinedTokens(parts), np.concatenate(parts)


def test_joined_arrays_are_read_as_one(joined):
    ours, theirs = joined
    n = len(theirs)
    assert len(ours) == n
    at = np.array([[0, 2, 3], [8, 9, n - 1], [-1, -n, 7]])
    assert np.array_equal(ours[at], theirs[at])
    assert ours[at].dtype == theirs.dtype
    assert [int(ours[i]) for i in range(-n, n)] == [int(theirs[i]) for i in range(-n, n)]
    for start in range(-1, n + 2):
        for stop in range(-1, n + 2):
            assert ours[start:stop].tolist() == theirs[start:stop].tolist()
    assert ours[np.empty((0, 2), int)].shape == (0, 2)


@pytest.mark.parametrize("at", [13, -14, [0, 13]])
def test_beyond_joined_arrays_there_is_nothing(joined, at):
    with pytest.raises(IndexError):
        joined[0][np.array(at)]


def test_places_are_found_in_every_stretch(joined, monkeypatch):
    monkeypatch.setattr("gptlite.data.batches.STRETCH", 2)
    ours, theirs = joined
    ours.parts[1][1] = theirs[4] = ours.parts[3][3] = theirs[12] = 7
    assert places_of(ours, 7).tolist() == places_of(theirs, 7).tolist() == [4, 12]
    assert places_of(theirs, 9999).tolist() == []


def test_looking_for_documents_copies_nothing_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gptlite.data.batches.STRETCH", 1 << 16)
    np.ones(1 << 22, "<u2").tofile(tmp_path / "ids.bin")
    tokens = JoinedTokens([np.memmap(tmp_path / "ids.bin", "<u2", "r")] * 2)
    tracemalloc.start()
    assert not len(places_of(tokens, 7))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, "a mask of all tokens would be 8 MiB"


# Attempts that end early


def interrupted(corpus: Corpus, n_parts: int, **sections: Any) -> Path:
    """An attempt that ends after so many parts; the folder it leaves."""

    def some(do: workers.DoJob, jobs: Sequence[Any], *rest: Any) -> list[Any]:
        if jobs[0].plan is None:
            return here(do, jobs, *rest)
        here(do, jobs[:n_parts], *rest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run_jobs", some)
        with pytest.raises(KeyboardInterrupt):
            corpus.prepared(**sections)
    (work,) = corpus.tokens.glob("*.unfinished")
    return work


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are made from now on."""
    made: list[str] = []
    keep = parts.write_part

    def noting(part: parts.Part, fill: Any) -> Any:
        made.append(part.folder.name)
        return keep(part, fill)

    monkeypatch.setattr(parts, "write_part", noting)
    return made


def test_what_is_whole_is_taken_up_and_the_rest_is_made(corpus, monkeypatch, capsys):
    corpus.write(*PROSE)
    work = interrupted(corpus, 3)
    (work / ".tmp-part-00003-0123abcd").mkdir()
    (work / ".tmp-part-00003-0123abcd" / "train.bin").write_bytes(b"half")
    assert not [folder for folder in corpus.tokens.iterdir() if (folder / "meta.json").exists()]
    made = noted(monkeypatch)
    files = corpus.prepared()
    assert made == ["part-00003", "part-00004"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "read: 5 of 5 parts are there already",
        "encode: 3 of 5 parts are there already",
    ]
    assert_equal(files, corpus.one_pass())
    assert not list(corpus.tokens.glob("*.unfinished"))
    names = {path.name for path in files.folder.iterdir()}
    assert names == {"meta.json", "tokenizer.json", *(f"part-{n:05d}" for n in range(5))}


HARMS = {
    "a bit": ("train.bin", lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:])),
    "cut": ("val.bin", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    "gone": ("train.bin", lambda path: path.unlink()),
    "not described": ("made.json", lambda path: path.unlink()),
    "described otherwise": ("made.json", lambda path: path.write_text(path.read_text() + " ")),
}


@pytest.mark.parametrize(("name", "harm"), HARMS.values(), ids=HARMS)
def test_a_damaged_part_is_made_anew(corpus, monkeypatch, name, harm):
    corpus.write(*PROSE)
    number = 4 if name == "val.bin" else 1
    harm(interrupted(corpus, 5) / f"part-{number:05d}" / name)
    made = noted(monkeypatch)
    files = corpus.prepared()
    assert made == [f"part-{number:05d}"]
    assert_equal(files, corpus.one_pass())


def test_a_damaged_scan_is_made_anew(corpus, monkeypatch):
    corpus.write(*PROSE)
    document = {"data": {"layout": "documents"}}
    work = interrupted(corpus, 2, **document)
    digests = work / "scan-00002" / "digests.bin"
    digests.write_bytes(digests.read_bytes()[:-8])
    made = noted(monkeypatch)
    files = corpus.prepared(**document)
    assert made == ["scan-00002", "part-00002", "part-00003", "part-00004"]
    assert_equal(files, corpus.one_pass(**document))


def test_a_tokenizer_is_learned_once(corpus, monkeypatch):
    corpus.write(*PROSE)
    bpe = {"tokenizer": {"kind": "bpe", "vocab_size": 300}}
    interrupted(corpus, 2, **bpe)
    monkeypatch.setattr(tokenizers, "from_config", lambda *_, **__: pytest.fail("learned again"))
    corpus.prepared(**bpe)


def test_parts_of_another_tokenizer_are_made_anew(corpus, monkeypatch):
    corpus.write(*PROSE)
    bpe = {"tokenizer": {"kind": "bpe", "vocab_size": 300}}
    work = interrupted(corpus, 5, **bpe)
    other = tokenizers.train_bpe(["another text"], 280)
    (work / "tokenizer.json").write_text(storage.seal(other.to_json()))
    made = noted(monkeypatch)
    corpus.prepared(**bpe)
    assert len(made) == 5


def test_who_waited_for_another_process_makes_nothing(corpus, monkeypatch):
    corpus.write(*PROSE)
    files = corpus.prepared()
    made = noted(monkeypatch)
    listing = files.meta["sources"]
    args = (files.folder, [], listing, corpus.run(), None, [])
    prepare.make_token_files_in_parts(*args)
    assert not made
    assert not list(corpus.tokens.glob("*.unfinished"))


@pytest.mark.parametrize("name", ["part-00004/val.bin", "part-00000/train.bin"])
def test_damage_to_parts_is_one_line_that_names_the_file(corpus, name):
    corpus.write(*PROSE)
    folder = corpus.prepared().folder
    path = folder / name
    for harm in (HARMS["a bit"], HARMS["cut"], HARMS["gone"]):
        whole = path.read_bytes()
        harm[1](path)
        with pytest.raises(DataError, match="delete the folder") as caught:
            open_token_files(folder)
        (line,) = caught.value.problems
        assert str(path) in line
        path.write_bytes(whole)


def test_parts_that_are_not_all_there_are_found(corpus):
    corpus.write(*PROSE)
    folder = corpus.prepared().folder
    meta = storage.unseal((folder / "meta.json").read_text())
    meta["parts"].pop(1)
    (folder / "meta.json").write_text(storage.seal(meta))
    with pytest.raises(DataError, match="part-00001|its parts have"):
        open_token_files(folder)


# What goes wrong in a process


@pytest.fixture
def pool(corpus, monkeypatch) -> Corpus:
    """With real processes, two of them."""
    monkeypatch.setattr(workers, "run_jobs", WORK)
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    return corpus


def test_bad_text_in_one_of_many_is_the_usual_line_and_leaves_nothing(pool):
    files = pool.write(*PROSE)
    files[2].write_bytes(PROSE[2].encode() + b"\xff")
    where = f"data.source: {files[2]}: not valid UTF-8 at byte {len(PROSE[2])}; convert it to UTF-8"
    with pytest.raises(DataError) as caught:
        pool.prepared()
    assert caught.value.problems == (where,)
    assert [path.name for path in pool.tokens.iterdir()] == [".lock"]


def test_a_damaged_record_is_named_by_its_line(pool):
    files = pool.write(*RECORDS, suffix=".jsonl")
    files[3].write_text(RECORDS[3] + "{]\n")
    place = f"data.source: {files[3]}:{len(RECORDS[3].splitlines()) + 1}: not JSON"
    with pytest.raises(DataError) as caught:
        pool.prepared()
    assert caught.value.problems[0].startswith(place)


def unreadable(file: Path, advance: workers.Advance) -> str:
    advance(file, 1)
    return file.read_text()


def deadly(file: Path, advance: workers.Advance) -> str:
    advance(file, 1)
    if file.name == "1.txt":
        os.kill(os.getpid(), signal.SIGKILL)
    return file.name


def buggy(file: Path, advance: workers.Advance) -> None:
    raise ZeroDivisionError("of ours")


def silent(*_: Any) -> None:
    pass


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("text")
    with pytest.raises(FileNotFoundError) as caught:
        WORK(unreadable, files, files, silent)
    assert caught.value.filename == str(files[1])


def test_an_error_of_the_disk_in_a_process_is_one_of_storage(pool, monkeypatch):
    """A link that leads nowhere by the time a process opens it."""
    files = pool.write(*PROSE)
    described = prepare.describe_sources

    def then_gone(*args: Any) -> Any:
        listing = described(*args)
        files[3].unlink()
        return listing

    monkeypatch.setattr(prepare, "describe_sources", then_gone)
    monkeypatch.setattr(prepare.sources, "remarks", lambda *_: [])
    with pytest.raises(StorageError, match=f"^{files[3]}: No such file"):
        pool.prepared()


def test_a_process_that_is_killed_is_one_line_that_names_its_file(tmp_path):
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    line = f"{files[1]}: the process that read it was killed by signal 9"
    with pytest.raises(UserError, match=line) as caught:
        WORK(deadly, files, files, silent)
    assert len(caught.value.problems) == 1
    assert caught.value.exit_code == 1


def deadly_later(files: tuple[Path, Path], advance: workers.Advance) -> None:
    for file in files:
        advance(file, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_names_the_file_it_was_at(tmp_path):
    files = tmp_path / "first.txt", tmp_path / "second.txt"
    with pytest.raises(UserError, match=f"^data.source: {files[1]}: "):
        WORK(deadly_later, [files], [files[0]], silent)


def test_a_bug_in_a_process_says_where(tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError: of ours") as caught:
        WORK(buggy, [tmp_path], [tmp_path], silent)
    assert "in buggy" in caught.value.__notes__[0]


def test_a_process_whose_parent_is_gone_leaves_without_a_word(monkeypatch):
    monkeypatch.setattr(workers, "leave_with_parent", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    theirs.send("never read")  # so that the end is no end of file but a reset
    ours.close()
    workers.serve(buggy, theirs)

    ours, theirs = multiprocessing.Pipe()
    ours.send(Path("a.md"))
    workers.serve(lambda file, advance: ours.close(), theirs)


def test_results_are_in_the_order_of_the_jobs(tmp_path):
    files = [tmp_path / f"{n}.md" for n in range(7)]
    told: list[tuple[Path, int]] = []
    results = WORK(deadly, files, files, lambda *what: told.append(what))
    assert results == [file.name for file in files]
    assert {file: sum(n for f, n in told if f == file) for file in files} == dict.fromkeys(files, 1)


# The command, killed


COMMAND = """
import os
from gptlite import machine
from gptlite.data import parts
from gptlite.data import workers
parts.LARGE_BYTES, parts.PART_BYTES = 1, 1 << 20
machine.count_cores = lambda: 2
from gptlite.cli.main import main
main()
"""


class Attempt:
    """`gptlite prepare` in a process group of its own."""

    def __init__(self, corpus: Corpus) -> None:
        config = corpus.workshop.folder / "run.yaml"
        data = {"source": str(corpus.folder), "cache_dir": str(corpus.workshop.folder / "cache")}
        sections = {"data": data, "tokenizer": {"kind": "byte"}}
        config.write_text(yaml.safe_dump(merged(TINY, sections)))
        self.tokens = corpus.tokens
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "prepare", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def parts(self) -> list[Path]:
        return sorted(self.tokens.glob("*/part-*"))

    def children(self) -> list[int]:
        """The processes that do the work."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(word) for word in path.read_text().split()]
        return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def until_some_parts(self, n: int = 2) -> list[int]:
        """Wait; whom it had at work then."""
        while len(self.parts()) < n:
            assert self.process.poll() is None, "too quick, or failed"
            time.sleep(0.005)
        return self.children()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err
        return self.process.returncode, out, err


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.01)


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


@pytest.fixture
def large(corpus: Corpus) -> Corpus:
    corpus.write(*(prose(200_000, seed) * 3 for seed in range(10)))
    return corpus


@linux
def test_a_command_that_is_killed_leaves_no_process_and_is_gone_on_with(large):
    attempt = Attempt(large)
    at_work = attempt.until_some_parts()
    assert len(at_work) == 2
    attempt.process.kill()
    attempt.end()
    assert_gone(at_work)
    assert not list(large.tokens.glob("*/meta.json"))
    there = {path: path.stat().st_mtime_ns for path in attempt.parts()}
    again = Attempt(large)
    code, _, err = again.end()
    assert code == 0, err
    lines = err.splitlines()
    assert lines == [
        "read: 10 of 10 parts are there already",
        f"encode: {len(there)} of 10 parts are there already",
    ]
    kept = {path.name: path.stat().st_mtime_ns for path in again.parts()}
    assert kept.items() >= {path.name: at for path, at in there.items()}.items()
    (folder,) = {path.parent for path in large.tokens.glob("*/meta.json")}
    assert_equal(open_token_files(folder), large.one_pass())


@linux
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_command_that_is_told_to_leave_takes_its_processes_along(large, number, code):
    """All processes get it, as from a terminal or `timeout`."""
    attempt = Attempt(large)
    at_work = attempt.until_some_parts()
    os.killpg(attempt.process.pid, number)
    assert attempt.end() == (code, "", "gptlite: interrupted\n")
    assert_gone(at_work)
    assert not list(large.tokens.glob("*/meta.json"))
    assert not list(large.tokens.glob("*.unfinished/.tmp-part*/made.json"))


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_are_for_the_command_and_not_for_its_processes(large, number):
    """A Ctrl-C reaches all of them; if one of them acted first, the user would read of a crash."""
    attempt = Attempt(large)
    for pid in attempt.until_some_parts(1):
        os.kill(pid, number)
    code, out, err = attempt.end()
    assert (code, err) == (0, "")
    assert out.startswith("train: ")


@linux
def test_a_command_whose_process_is_killed_says_which_file_and_goes_on_later(large):
    attempt = Attempt(large)
    at_work = attempt.until_some_parts()
    os.kill(at_work[0], signal.SIGKILL)
    code, out, err = attempt.end()
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert "killed by signal 9 (out of memory?)" in line
    assert line.startswith(f"data.source: {large.folder}/")
    assert_gone(at_work)
    code, _, err = Attempt(large).end()
    assert code == 0
    assert "of 10 parts are there already" in err


# Digests that are kept


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Digests by way of a ledger; says which files were hashed."""
    monkeypatch.setattr(digests, "LARGE_BYTES", 100)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    hashed: list[str] = []

    def digest(file: Path) -> str:
        hashed.append(file.name)
        return storage.file_digest(file)

    def ask(*files: Path) -> tuple[list[str], list[str]]:
        hashed.clear()
        found = digests.digests_of(list(files), tmp_path / "ledger.json", digest)
        assert found == [storage.file_digest(file) for file in files]
        return found, sorted(hashed)

    return ask


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{n}.bin" for n in range(3)]
    for file in files:
        file.write_bytes(file.name.encode() * 20)
    time.sleep(0.02)
    return files


def test_large_files_are_hashed_once(kept, three):
    assert kept(*three)[1] == ["0.bin", "1.bin", "2.bin"]
    assert kept(*three)[1] == []
    assert kept(*three[1:])[1] == []


def test_a_file_that_changed_is_hashed_again_even_with_its_old_time(kept, three):
    kept(*three)
    before = three[1].stat()
    three[1].write_bytes(b"X" * before.st_size)
    os.utime(three[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)
    assert kept(*three)[1] == ["1.bin"]
    assert kept(*three)[1] == []


def test_a_file_that_was_just_written_is_not_remembered(kept, three, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    kept(*three)
    assert kept(*three)[1] == ["0.bin", "1.bin", "2.bin"]


def test_small_files_are_always_hashed(kept, three, monkeypatch):
    monkeypatch.setattr(digests, "LARGE_BYTES", 1000)
    kept(*three)
    assert len(kept(*three)[1]) == 3


@pytest.mark.parametrize("content", ["", "{}", '{"files": []}', "\udcff"])
def test_a_damaged_ledger_is_none(kept, three, tmp_path, content):
    kept(*three)
    (tmp_path / "ledger.json").write_text(content, errors="surrogateescape")
    assert len(kept(*three)[1]) == 3
    assert kept(*three)[1] == []


def test_a_ledger_forgets_files_that_are_gone(kept, three, tmp_path):
    kept(*three)
    three[0].unlink()
    three[1].write_bytes(b"other" * 30)
    time.sleep(0.02)
    kept(*three[1:])
    files = storage.unseal((tmp_path / "ledger.json").read_text())["files"]
    assert sorted(files) == sorted(map(str, three[1:]))


def test_token_files_that_were_verified_open_without_hashing(corpus, monkeypatch):
    corpus.write(*PROSE)
    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    files = corpus.prepared()
    time.sleep(0.02)
    open_token_files(files.folder)
    monkeypatch.setattr(storage, "file_digest", lambda *_, **__: pytest.fail("hashed again"))
    assert open_token_files(files.folder).digest == files.digest
    assert corpus.prepared().digest == files.digest, "nor the sources"


def test_a_link_in_the_place_of_a_token_file_is_refused_all_the_same(corpus, monkeypatch):
    corpus.write(*PROSE)
    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    files = corpus.prepared()
    path = files.folder / "part-00000" / "train.bin"
    path.rename(corpus.folder / "elsewhere")
    path.symlink_to(corpus.folder / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        open_token_files(files.folder)
