"""From text to batches: every token is learned from, none twice an epoch, none in both splits."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlite import locks, machine
from gptlite.data import encoding, parts, prepare, readers, tokenizers, workers
from gptlite.data.batches import IGNORED, Batch, Documents, Layout, Stream, batch_at
from gptlite.data.token_files import TokenFiles, open_token_files, token_dtype
from gptlite.errors import DataError
from gptlite.keys import key, permute, uniform

EOT = 1000
examples = settings(max_examples=100, deadline=None, derandomize=True)


# Keys


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097])
def test_a_permutation_visits_every_number_once(n):
    for name in (0, 1, key("a"), 2**64 - 1):
        assert sorted(permute(np.arange(n), n, name).tolist()) == list(range(n))


@examples
@given(n=st.integers(1, 3000), name=st.integers(0, 2**64 - 1))
def test_a_permutation_visits_every_number_once_whatever_its_name(n, name):
    assert sorted(permute(np.arange(n), n, name).tolist()) == list(range(n))


def test_a_permutation_needs_no_table_however_large():
    n = 2**40 + 7
    some = np.arange(0, n, n // 1000)
    sent = permute(some, n, key("large"))
    assert len(set(sent.tolist())) == len(some)
    assert 0 <= sent.min() < n // 20
    assert n - n // 20 < sent.max() < n


def test_a_permutation_sends_a_number_to_the_same_place_alone_or_with_others():
    whole = permute(np.arange(100), 100, 7)
    assert [int(permute(np.array([i]), 100, 7)[0]) for i in range(100)] == whole.tolist()


def test_permutations_of_other_names_differ():
    orders = {tuple(permute(np.arange(50), 50, key(i)).tolist()) for i in range(200)}
    assert len(orders) == 200


def test_all_orders_of_three_occur_about_as_often():
    orders = Counter(tuple(permute(np.arange(3), 3, key(i)).tolist()) for i in range(1200))
    assert len(orders) == 6
    assert all(120 < times < 280 for times in orders.values())


def test_a_key_depends_on_every_name():
    names = [(), (1,), ("1",), (1, 2), (2, 1), (12,), ("a", 1), ("a1",)]
    assert len({key(*each) for each in names}) == len(names)
    assert key(1337, "order", 0) == 0x70EED8D88D9479, "another key is another run"


def test_uniform_numbers_are_uniform_and_depend_on_the_number_alone():
    drawn = uniform(key("a"), np.arange(10_000))
    assert 0 <= drawn.min() < drawn.max() < 1
    assert np.histogram(drawn, 10, (0, 1))[0].min() > 850
    assert uniform(key("a"), np.array([77]))[0] == drawn[77]
    assert abs(np.corrcoef(drawn, uniform(key("b"), np.arange(10_000)))[0, 1]) < 0.05


# Batches


def stream(n_tokens: int, context_length: int) -> Stream:
    """Tokens that name their own place."""
    return Stream(np.arange(n_tokens, dtype=np.uint16), context_length)


def documents(lengths: Iterable[int], context_length: int) -> Documents:
    """Documents of these lengths; no other token occurs twice."""
    tokens, at = [EOT], 0
    for length in lengths:
        tokens += [*range(at, at + length), EOT]
        at += length
    return Documents(np.array(tokens, dtype=np.uint16), context_length, EOT)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "stream": lambda: stream(403, 16),
    "stream of one row": lambda: stream(20, 16),
    "documents": lambda: documents([3, 1, 40, 7, 16, 2, 5, 17, 31, 4, 6], 16),
}


@pytest.fixture(params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    """Each row as the tokens it reads and then the last it predicts, without padding."""
    rows = []
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        scored = [target for target in targets if target != IGNORED]
        rows.append((*inputs[: len(scored)], scored[-1]))
    return rows


def epochs(layout: Layout, n: int, *, seed: int = 0, batch_size: int = 4) -> list[list[tuple]]:
    """The rows of the first epochs, in order; batches do not end where epochs do."""
    steps = -(-n * layout.n_rows // batch_size)
    drawn = (batch_at(layout, seed=seed, step=i, batch_size=batch_size) for i in range(steps))
    rows = [row for batch in drawn for row in rows_of(batch)]
    return [rows[i * layout.n_rows : (i + 1) * layout.n_rows] for i in range(n)]


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_depends_on_seed_and_step_alone(layout):
    def at(step: int, seed: int = 5) -> Batch:
        return batch_at(layout, seed=seed, step=step, batch_size=4)

    straight = [at(step) for step in range(12)]
    assert all(equal(at(step), straight[step]) for step in reversed(range(12)))
    if layout.n_rows > 1:
        assert not equal(at(0), at(1))
        assert not equal(at(0), at(0, seed=6))


def test_a_batch_is_made_of_the_same_rows_however_many_are_drawn_at_once(layout):
    """Row r of step s is sample s * batch_size + r, so smaller batches continue each other."""
    for size in (1, 3, 12):
        rows = [
            row
            for step in range(24 // size)
            for row in rows_of(batch_at(layout, seed=1, step=step, batch_size=size))
        ]
        assert rows == rows_of(batch_at(layout, seed=1, step=0, batch_size=24))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_epoch_visits_every_row_once(layout, batch_size):
    for rows in epochs(layout, 4, batch_size=batch_size):
        assert len(set(rows)) == layout.n_rows


def test_an_epoch_visits_every_document_once():
    layout = LAYOUTS["documents"]()
    every = rows_of(next(layout.sweep(1000)))
    for rows in epochs(layout, 4):
        assert sorted(rows) == sorted(every)


@examples
@given(n_tokens=st.integers(2, 300), context_length=st.integers(1, 40), epoch=st.integers(0, 3))
def test_an_epoch_of_a_stream_is_windows_side_by_side(n_tokens, context_length, epoch):
    """No window is left out that fits behind the offset, and less than two windows go unread."""
    layout = stream(n_tokens, context_length)
    rows = sorted(epochs(layout, epoch + 1)[epoch])
    for before, after in zip(rows, rows[1:], strict=False):
        assert before[-1] == after[0]
    assert all(row == tuple(range(row[0], row[0] + layout.length + 1)) for row in rows)
    assert len(rows) * layout.length > n_tokens - 1 - 2 * layout.length


def test_every_token_of_a_stream_is_a_target_in_some_epoch():
    layout = stream(403, 16)
    seen = {token for rows in epochs(layout, 60) for row in rows for token in row[1:]}
    assert seen == set(range(1, 403))


@pytest.mark.parametrize("name", ["stream", "documents"])
def test_epochs_differ_in_order(name):
    rows_by_epoch = epochs(LAYOUTS[name](), 8)
    orders = {tuple(np.argsort([row[1] for row in rows])) for rows in rows_by_epoch}
    assert len(orders) == 8


@pytest.mark.parametrize("n_tokens", [403, 20])
def test_epochs_of_a_stream_differ_in_offset(n_tokens):
    layout = stream(n_tokens, 16)
    offsets = {min(rows)[0] for rows in epochs(layout, 200)}
    assert offsets == set(range(layout.spare + 1))
    assert layout.spare > 2


def test_targets_of_a_stream_are_its_inputs_shifted_by_one():
    layout = stream(403, 16)
    for batch in (batch_at(layout, seed=0, step=3, batch_size=5), *layout.sweep(5)):
        scored = batch.targets != IGNORED
        assert np.array_equal(batch.targets[scored], batch.inputs[scored] + 1)
        assert scored[:, 0].all()


def test_batches_are_int64_and_as_wide_as_the_context():
    batch = batch_at(stream(403, 16), seed=0, step=0, batch_size=5)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.inputs.shape == batch.targets.shape == (5, 16)
    assert batch.n_targets == 80
    assert batch.real is None


def scored(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    """(input, target) wherever there is a target."""
    return [
        pair
        for batch in batches
        for pair in zip(batch.inputs.flat, batch.targets.flat, strict=True)
        if pair[1] != IGNORED
    ]


@examples
@given(
    n_tokens=st.integers(2, 120), context_length=st.integers(1, 150), batch_size=st.integers(1, 9)
)
def test_a_sweep_scores_every_target_of_a_stream_once(n_tokens, context_length, batch_size):
    layout = stream(n_tokens, context_length)
    batches = list(layout.sweep(batch_size))
    assert scored(batches) == [(i, i + 1) for i in range(n_tokens - 1)]
    assert sum(batch.n_targets for batch in batches) == n_tokens - 1
    assert all(1 <= len(batch.inputs) <= batch_size for batch in batches)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@examples
@given(lengths=lengths, context_length=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_a_sweep_scores_every_target_of_the_documents_once(lengths, context_length, batch_size):
    layout = documents(lengths, context_length)
    tokens = layout.tokens.tolist()
    batches = list(layout.sweep(batch_size))
    assert scored(batches) == list(zip(tokens, tokens[1:], strict=False))
    assert sum(batch.n_targets for batch in batches) == sum(lengths) + len(lengths)


@pytest.mark.parametrize("limit", [1, 2, 5, 10**6])
def test_a_limited_sweep_is_spread_over_the_split(layout, limit):
    every = [row for batch in layout.sweep(3) for row in rows_of(batch)]
    some = [row for batch in layout.sweep(3, limit) for row in rows_of(batch)]
    assert len(some) == min(limit, len(every))
    assert set(some) <= set(every)
    assert len(set(some)) == len(some)
    if 1 < limit < len(every):
        assert every.index(some[-1]) >= len(every) // 2


@examples
@given(lengths=lengths, context_length=st.integers(1, 40))
def test_rows_rebuild_the_documents(lengths, context_length):
    """A row begins with the end of the document before, or where a row of its own was full."""
    layout = documents(lengths, context_length)
    (batch,) = layout.sweep(layout.n_rows)
    rebuilt, held = [], []
    for row in rows_of(batch):
        assert row[0] == (held[-1] if held else EOT)
        held += row[1:]
        if row[-1] == EOT:
            rebuilt.append(held[:-1])
            held = []
        else:
            assert len(row) == context_length + 1
    assert not held
    assert [len(document) for document in rebuilt] == lengths
    assert [token for document in rebuilt for token in document] == list(range(sum(lengths)))


def test_short_documents_have_a_row_each():
    layout = documents([3, 15, 1], 16)
    (batch,) = layout.sweep(3)
    assert layout.n_rows == 3
    assert rows_of(batch)[0] == (EOT, 0, 1, 2, EOT)


@examples
@given(lengths=lengths, context_length=st.integers(1, 40), seed=st.integers(0, 9))
def test_padding_is_on_the_right_and_has_no_target(lengths, context_length, seed):
    batch = batch_at(documents(lengths, context_length), seed=seed, step=0, batch_size=4)
    assert batch.real is not None
    assert (np.diff(batch.real.astype(int), axis=1) <= 0).all()
    assert batch.real[:, 0].all()
    assert batch.real.any(0).all(), "no wider than its longest row"
    assert (batch.targets[~batch.real] == IGNORED).all()
    assert (batch.targets[batch.real] != IGNORED).all()
    assert (batch.inputs[~batch.real] == EOT).all()


@examples
@given(lengths=lengths, start=st.integers(0, 3), size=st.integers(1, 4))
def test_part_of_a_batch_is_its_rows_without_needless_padding(lengths, start, size):
    batch = batch_at(documents(lengths, 20), seed=0, step=0, batch_size=4)
    part = batch.part(start, start + size)
    assert rows_of(part) == rows_of(batch)[start : start + size]
    assert part.real is not None
    assert part.real.any(0).all()
    assert part.inputs.shape == part.targets.shape == part.real.shape


def test_part_of_a_stream_batch_is_its_rows():
    batch = batch_at(stream(403, 16), seed=0, step=0, batch_size=4)
    assert rows_of(batch.part(1, 3)) == rows_of(batch)[1:3]


def test_a_split_without_a_document_is_refused():
    with pytest.raises(DataError, match="no whole document"):
        Documents(np.array([EOT], dtype=np.uint16), 8, EOT)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "<u2"), (1 << 16, "<u2"), (65537, "<u4")])
def test_ids_are_stored_in_two_bytes_when_they_fit(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


# Token files


def text_of(files: TokenFiles, split: str) -> str:
    ids = np.fromfile(files.folder / f"{split}.bin", token_dtype(files.meta["vocab_size"]))
    raw = b"".join(map(files.tokenizer.token_bytes, ids.tolist()))
    return raw.decode()  # strictly: a character cut in two is an error


def documents_of(files: TokenFiles, split: str) -> list[str]:
    """The texts between end-of-text tokens."""
    ids = files.tokens(split).tolist()
    assert ids[-1] == files.meta["eot"]
    ends = [i for i, token in enumerate(ids) if token == files.meta["eot"]]
    starts = [0, *(end + 1 for end in ends[:-1])]
    parts = [ids[start:end] for start, end in zip(starts, ends, strict=True)]
    return [files.tokenizer.decode(part) for part in parts]


BYTE = {"kind": "byte"}
DOCUMENTS = {"layout": "documents"}


@pytest.fixture
def made(workshop):
    """Write a text and prepare it; sections of the config as keywords."""

    def make(text: str, name: str = "given.txt", **sections) -> TokenFiles:
        path = workshop.folder / name
        path.write_text(text, encoding="utf-8", newline="")
        data = {"source": str(path), **sections.pop("data", {})}
        return workshop.files(data=data, **{"tokenizer": BYTE, **sections})

    return make


def jsonl(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_the_tail_is_cut_at_its_share_of_the_bytes(made, monkeypatch, fraction, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    text = "The quick brown fox. " * 20
    files = made(text, data={"val_fraction": fraction})
    train, val = text_of(files, "train"), text_of(files, "val")
    assert train + val == text
    assert len(train) == int(len(text) * (1 - fraction))


@pytest.mark.parametrize("fraction", np.linspace(0.1, 0.9, 12).tolist())
@pytest.mark.parametrize("chunk", [4, 16, 1 << 20])
def test_the_tail_is_never_cut_inside_a_character(made, monkeypatch, fraction, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    text = "aé漢👩" * 5
    files = made(text, data={"val_fraction": fraction})
    train, val = text_of(files, "train"), text_of(files, "val")
    assert train + val == text
    cut = int(len(text.encode()) * (1 - fraction))
    assert cut - 4 < len(train.encode()) <= cut


def test_a_tail_that_begins_with_a_document_leaves_no_empty_one_behind(made):
    files = made(jsonl(["abcd", "efgh"]), "given.jsonl", data={"val_fraction": 0.5})
    assert documents_of(files, "train") == ["abcd"]
    assert documents_of(files, "val") == ["efgh"]
    assert [files.meta["splits"][s]["documents"] for s in ("train", "val")] == [1, 1]


def test_a_tail_of_documents_is_whole_documents(made):
    texts = [f"document {i}" for i in range(20)]
    data = {"layout": "documents", "split_by": "tail", "val_fraction": 0.3}
    files = made(jsonl(texts), "given.jsonl", data=data)
    train, val = documents_of(files, "train")[1:], documents_of(files, "val")[1:]
    assert train + val == texts
    assert 5 <= len(val) <= 6


@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_equal_documents_are_in_one_split(made, layout, fraction):
    """Even where most are equal, both splits get some: all orders of up to five of two texts."""
    data = {"layout": layout, "split_by": "document", "val_fraction": fraction}
    for texts in product(["ann", "bob"], repeat=5):
        if len(set(texts)) == 1:
            continue
        files = made(jsonl(texts), "given.jsonl", data=data)
        train, val = (list(filter(None, documents_of(files, s))) for s in ("train", "val"))
        assert set(train).isdisjoint(val)
        assert sorted(train + val) == sorted(texts)
        assert train
        assert val


def test_documents_are_split_by_their_share_and_keep_their_order(made):
    texts = [f"name {i}" for i in range(300)]
    data = {"layout": "documents", "val_fraction": 0.2}
    files = made("\n".join(texts), data=data)
    train, val = documents_of(files, "train")[1:], documents_of(files, "val")[1:]
    assert len(val) == 60
    assert not set(train) & set(val)
    assert [text for text in texts if text in set(train)] == train
    assert [text for text in texts if text in set(val)] == val
    assert val != texts[-60:], "chosen by digest, not by place"


def test_a_document_stays_in_its_split_when_others_come_and_go(made):
    """Chosen by its own digest: adding text moves few documents from one side to the other."""
    texts = [f"name {i}" for i in range(200)]
    data = {"layout": "documents", "val_fraction": 0.2}
    before = set(documents_of(made("\n".join(texts), data=data), "val")[1:])
    after = set(documents_of(made("\n".join(reversed(texts[10:])), data=data), "val")[1:])
    assert len(before & after) >= 30


@pytest.mark.parametrize("texts", [["one"], ["same", "same", "same"]])
def test_documents_that_cannot_be_split_are_one_line(made, texts):
    with pytest.raises(DataError) as caught:
        made(jsonl(texts), "given.jsonl", data={"layout": "documents"}).rows("train", 8)
    assert len(caught.value.problems) == 1


KINDS = [BYTE, {"kind": "char"}, {"kind": "bpe", "vocab_size": 300}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("layout", ["stream", "documents"])
@pytest.mark.parametrize("name", ["given.txt", "given.jsonl"])
def test_bytes_and_tokens_are_those_of_the_files(made, kind, layout, name):
    texts = [f"Zeile {i}: ein Wörtchen, 漢字 und 👩‍👩‍👧." for i in range(40)]
    text = jsonl(texts) if name.endswith("jsonl") else "\n".join(texts)
    files = made(text, name, tokenizer=kind, data={"layout": layout, "val_fraction": 0.2})
    rebuilt = text_of(files, "train") + text_of(files, "val")
    whole = text if (name, layout) == ("given.txt", "stream") else "".join(texts)
    assert Counter(rebuilt) == Counter(whole)
    for split, about in files.meta["splits"].items():
        assert about["bytes"] == len(text_of(files, split).encode())
        assert about["tokens"] == len(files.tokens(split))
    assert sum(about["bytes"] for about in files.meta["splits"].values()) == len(whole.encode())


def test_half_a_surrogate_pair_in_a_record_is_counted_as_it_is_written(made):
    """JSON can spell what no UTF-8 holds; it is read as a question mark."""
    text = '{"text": "a\\ud83d and some more"}\n' * 4
    for kind in KINDS:
        files = made(text, "given.jsonl", tokenizer=kind, data={"val_fraction": 0.5})
        assert "\ufffd" not in text_of(files, "train")
        for split, about in files.meta["splits"].items():
            assert about["bytes"] == len(text_of(files, split).encode())


def test_documents_are_told_apart_and_a_single_text_is_not(made):
    single = made("one text, one file")
    assert single.tokenizer.eot is None
    several = made(jsonl(["one", "two", "three"]), "given.jsonl", data={"val_fraction": 0.4})
    assert several.tokenizer.eot == 256
    assert documents_of(several, "train")[0] == "one"


def test_files_of_a_list_follow_each_other(workshop):
    paths = [workshop.folder / name for name in ("b.txt", "a.txt")]
    for path in paths:
        path.write_text(f"This is {path.name}. " * 5)
    data = {"source": [str(path) for path in paths]}
    files = workshop.files(tokenizer=BYTE, data=data)
    whole = text_of(files, "train") + text_of(files, "val")
    assert whole == "".join(path.read_text() for path in paths)
    assert [source["name"] for source in files.meta["sources"]] == ["b.txt", "a.txt"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
def test_one_sentence_of_text_works(made, kind):
    files = made("To be, or not to be, that is the question.", tokenizer=kind)
    for split in ("train", "val"):
        layout = files.rows(split, 64)
        assert batch_at(layout, seed=0, step=0, batch_size=2).inputs.shape[0] == 2
        assert sum(batch.n_targets for batch in layout.sweep(8)) == len(files.tokens(split)) - 1


@pytest.mark.parametrize(("text", "why"), [("", "has no text"), ("\ufeff", "has no text")])
def test_a_file_without_text_is_one_line(made, text, why):
    with pytest.raises(DataError, match=why) as caught:
        made(text)
    assert len(caught.value.problems) == 1


def test_a_text_too_short_to_learn_from_is_one_line_that_names_the_split(made):
    with pytest.raises(DataError, match="val has 1 token, needs >= 2"):
        made("abcdefgh").rows("val", 8)
    with pytest.raises(DataError, match="train has 0 tokens, needs >= 2"):
        made("a", data={"val_fraction": 0.5}).rows("train", 8)


def test_a_bpe_learns_from_the_training_text_only(made):
    text = "abab " * 200 + "zq" * 500
    files = made(text, tokenizer={"kind": "bpe", "vocab_size": 300}, data={"val_fraction": 0.5})
    learned = {files.tokenizer.token_bytes(token) for token in range(files.tokenizer.vocab_size)}
    assert b"abab" in learned
    assert b"zq" not in learned


def test_a_vocabulary_beyond_two_bytes_has_files_of_four(made):
    text = "".join(chr(i) for i in range(0x10000, 0x10000 + 70_000))
    files = made(text, tokenizer={"kind": "char"})
    assert files.meta["dtype"] == "uint32"
    assert text_of(files, "train") + text_of(files, "val") == text
    assert files.tokens("val").max() > 1 << 16


def stamps(files: TokenFiles) -> dict[str, tuple[int, int]]:
    about = {path.name: path.stat() for path in files.folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in about.items()}


def test_the_same_text_is_prepared_once(made, monkeypatch):
    first = made("A text that is read twice. " * 9)
    before = stamps(first)
    monkeypatch.setattr(
        "gptlite.data.prepare.make_token_files", lambda *args: pytest.fail("made again")
    )
    second = made("A text that is read twice. " * 9)
    assert second.folder == first.folder
    assert second.digest == first.digest
    assert stamps(second) == before
    assert set(before) == {"train.bin", "val.bin", "tokenizer.json", "meta.json"}


def test_whatever_decides_the_tokens_names_another_folder(made):
    text = "".join(f"This is line {i}.\n" for i in range(20))
    other = text.replace("line", "verse")
    folders = [
        made(text).folder,
        made(other).folder,
        made(text, "given.md").folder,
        made(text, data={"val_fraction": 0.2}).folder,
        made(text, data={"layout": "documents", "split_by": "tail"}).folder,
        made(text, data={"layout": "documents"}).folder,
        made(text, tokenizer={"kind": "char"}).folder,
        made(text, tokenizer={"kind": "char", "unknown": "skip"}).folder,
        made(text, tokenizer={"kind": "bpe", "vocab_size": 260}).folder,
        made(text, tokenizer={"kind": "bpe", "vocab_size": 261}).folder,
    ]
    assert len(set(folders)) == len(folders)


def test_what_does_not_decide_the_tokens_names_the_same_folder(made):
    text = "One text. And another.\n" * 9
    folder = made(text).folder
    assert made(text, seed=3, model={"context_length": 8}).folder == folder
    assert made(text, tokenizer={**BYTE, "vocab_size": 999, "name": "r50k_base"}).folder == folder


def test_a_text_that_turns_out_bad_leaves_nothing_behind(workshop, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 64)
    workshop.text.write_bytes(b"good text " * 50 + b"\xff")
    with pytest.raises(DataError, match="not valid UTF-8 at byte 500"):
        workshop.files()
    assert list((workshop.folder / "cache" / "tokens").iterdir()) == []


GROWS = {
    "text": ("given.txt", "A line of text.\n" * 20, "And one more.\n", {}),
    "lines": ("given.txt", "".join(f"line {i}\n" for i in range(40)), "late\n" * 9, DOCUMENTS),
    "records": ("given.jsonl", '{"text": "a record"}\n' * 20, '{"text": "half', {}),
}


@pytest.mark.parametrize("phase", ["scan_text", "write_token_files"])
@pytest.mark.parametrize(("name", "text", "more", "data"), GROWS.values(), ids=GROWS)
@pytest.mark.parametrize("way", ["one pass", "parts"])
def test_a_text_that_changes_while_it_is_read_is_one_line_and_not_kept(
    workshop, made, monkeypatch, phase, name, text, more, data, way
):
    """Whatever the change led to, the change is what is told."""
    folder = workshop.folder / "texts"
    folder.mkdir()
    (folder / "other.txt").write_text(text)
    module = prepare
    if way == "parts":
        module = parts
        for limit, value in {"LARGE_BYTES": 1, "PART_BYTES": 0}.items():
            monkeypatch.setattr(parts, limit, value)
        monkeypatch.setattr(
            workers, "run_jobs", lambda do, jobs, _, advance: [do(j, advance) for j in jobs]
        )
    original = getattr(module, phase)

    def while_it_grows(*args, **options):
        with (folder / name).open("a") as file:
            file.write(more)
        return original(*args, **options)

    monkeypatch.setattr(module, phase, while_it_grows)
    source = {"source": str(folder), **data}
    with pytest.raises(DataError, match=f"{name}: changed while it was read") as caught:
        made(text, f"texts/{name}", data=source)
    assert len(caught.value.problems) == 1
    left = [path for path in (workshop.folder / "cache/tokens").iterdir() if path.is_dir()]
    assert left == []


def test_a_text_that_vanishes_while_it_is_read_is_one_line(workshop, monkeypatch):
    original = prepare.write_token_files

    def then_it_goes(*args, **options):
        splits = original(*args, **options)
        workshop.text.unlink()
        return splits

    monkeypatch.setattr(prepare, "write_token_files", then_it_goes)
    with pytest.raises(DataError, match="text.txt: changed while .*it is gone"):
        workshop.files()


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(workshop, made):
    tokens = workshop.folder / "cache" / "tokens"
    left, living = tokens / ".tmp-abc-00000001", tokens / ".tmp-abc-00000002"
    for folder in (left, living):
        folder.mkdir(parents=True)
        (folder / "train.bin").write_bytes(b"half")
    with locks.open_lock(living) as lock:
        assert locks.try_lock(lock)
        files = made("A text that is read. " * 9)
        assert sorted(tokens.iterdir()) == sorted([living, files.folder])
    made("Another text that is read. " * 9)
    assert not living.exists()


def test_what_was_written_can_be_read_however_many_files_there_were(workshop, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_LISTED", 20)
    folder = workshop.folder / "many"
    folder.mkdir()
    for number in range(21):
        (folder / f"{number}.txt").write_text(f"The text of number {number}.")
    files = workshop.files(data={"source": str(folder)})
    (about,) = files.meta["sources"]
    assert about["files"] == 21
    assert about["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    folder.joinpath("0.txt").write_text("Another text here.")
    assert workshop.files(data={"source": str(folder)}).folder != files.folder


@pytest.mark.parametrize("text", ["plain\n", "Ελληνικά\n", "漢字かな\n"])
def test_progress_counts_the_bytes_that_the_total_counts(workshop, text):
    workshop.text.write_text(text * 50, encoding="utf-8")
    run, seen = workshop.run(), []
    scan = encoding.scan_text(
        encoding.read_files([workshop.text], run, lambda _, n: seen.append(n)), run
    )
    assert sum(seen) == scan.n_bytes == workshop.text.stat().st_size


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_short(path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE = {
    "a bit of train": ("train.bin", flip),
    "a bit of val": ("val.bin", flip),
    "train cut short": ("train.bin", cut_short),
    "val missing": ("val.bin", lambda path: path.unlink()),
    "tokenizer cut short": ("tokenizer.json", cut_short),
    "tokenizer missing": ("tokenizer.json", lambda path: path.unlink()),
    "another tokenizer": ("tokenizer.json", lambda path: path.write_text(OTHER_TOKENIZER)),
    "no tokenizer": ("tokenizer.json", lambda path: path.write_text("{}")),
    "meta cut short": ("meta.json", cut_short),
    "meta empty": ("meta.json", lambda path: path.write_text("{}")),
    "meta no mapping": ("meta.json", lambda path: path.write_text("[]")),
    "meta no UTF-8": ("meta.json", lambda path: path.write_bytes(b"\xff")),
}
OTHER_TOKENIZER = json.dumps(tokenizers.ByteTokenizer(eot=True).to_json())


@pytest.mark.parametrize(("name", "harm"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_token_files_are_one_line_that_names_the_folder(made, name, harm):
    files = made("Some text that will be damaged. " * 9)
    harm(files.folder / name)
    with pytest.raises(DataError, match="delete") as caught:
        open_token_files(files.folder)
    (line,) = caught.value.problems
    assert str(files.folder) in line


def test_a_token_file_of_another_size_says_what_was_expected(made):
    files = made("Some text that will be cut short. " * 9)
    cut_short(files.folder / "train.bin")
    n_tokens = files.meta["splits"]["train"]["tokens"]
    expected = f"has {2 * n_tokens - 2} bytes, meta.json says {n_tokens} tokens of 2 bytes"
    with pytest.raises(DataError, match=expected):
        open_token_files(files.folder)


def test_token_files_are_a_source_themselves(made, workshop):
    files = made("Some text that is prepared here and used there. " * 9)
    there = workshop.files(data={"source": str(files.folder)}, tokenizer={"kind": "char"})
    assert there.folder == files.folder
    assert there.meta == files.meta
    assert there.tokenizer.to_json() == files.tokenizer.to_json()


@pytest.fixture
def nanogpt(workshop):
    """A folder as nanoGPT's prepare.py leaves it, here with one token per byte."""
    folder = workshop.folder / "shakespeare"
    folder.mkdir()
    for split, text in (("train", "To be, or not to be. " * 20), ("val", "That is it. ")):
        np.frombuffer(text.encode(), dtype=np.uint8).astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(b"never read")
    return folder


def adopted(workshop, folder, **sections) -> TokenFiles:
    return workshop.files(data={"source": str(folder)}, **{"tokenizer": BYTE, **sections})


def test_the_token_files_of_nanogpt_are_a_source(workshop, nanogpt):
    files = adopted(workshop, nanogpt)
    assert text_of(files, "val") == "That is it. "
    assert files.meta["splits"]["train"]["bytes"] == files.meta["splits"]["train"]["tokens"] == 420
    assert files.rows("train", 8).n_rows == 420 // 8 - 1
    assert sorted(path.name for path in nanogpt.iterdir()) == ["meta.pkl", "train.bin", "val.bin"]


def test_the_bytes_of_adopted_token_files_are_counted(workshop, nanogpt, monkeypatch):
    bpe = tokenizers.train_bpe(["To be, or not to be. That is it. " * 20], 270)
    monkeypatch.setattr(tokenizers, "load_pretrained", lambda name: bpe)
    for split, text in (("train", "To be, or not to be. " * 20), ("val", "That is it. ")):
        np.array(bpe.encode(text), dtype="<u2").tofile(nanogpt / f"{split}.bin")
    files = adopted(workshop, nanogpt, tokenizer={"kind": "tiktoken", "name": "gpt2"})
    assert text_of(files, "val") == "That is it. "
    assert files.meta["splits"]["train"]["bytes"] == 420
    assert files.meta["splits"]["train"]["tokens"] < 420


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_token_files_alone_do_not_tell_a_learned_vocabulary(workshop, nanogpt, kind):
    with pytest.raises(DataError, match=f"byte or tiktoken, got {kind}"):
        adopted(workshop, nanogpt, tokenizer={"kind": kind})


def test_an_id_beyond_the_vocabulary_is_named_by_its_place(workshop, nanogpt):
    np.array([5, 6, 256, 7], dtype="<u2").tofile(nanogpt / "val.bin")
    with pytest.raises(DataError, match="val.bin: token 256 at offset 2 >= vocab_size 256"):
        adopted(workshop, nanogpt)


def test_token_files_that_are_none_are_one_line(workshop, nanogpt):
    (nanogpt / "val.bin").write_bytes(b"odd")
    with pytest.raises(DataError, match="val.bin: not a token file: 3 bytes"):
        adopted(workshop, nanogpt)
    (nanogpt / "val.bin").unlink()
    with pytest.raises(DataError, match="val.bin: no such file"):
        adopted(workshop, nanogpt)


def peak_bytes(workshop, n_bytes: int, *, to_evaluate: bool) -> int:
    line = "The memory this takes must not depend on how much of it there is.\n"
    workshop.text.write_text(line * (n_bytes // len(line)))
    run = workshop.run(tokenizer=BYTE)
    tracemalloc.start()
    try:
        if to_evaluate:
            prepare.open_split(run, tokenizers.ByteTokenizer(eot=False), str(workshop.text))
        else:
            prepare.prepare(run)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("to_evaluate", [False, True])
def test_memory_does_not_grow_with_the_text(workshop, monkeypatch, to_evaluate):
    monkeypatch.setattr(readers, "CHUNK", 1 << 18)
    monkeypatch.setattr(encoding, "WAITING_PIECES", 4)
    small, large = (
        peak_bytes(workshop, n, to_evaluate=to_evaluate) for n in (2_000_000, 12_000_000)
    )
    assert large < 2 * small  # six times the text; how many pieces wait depends on the threads


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_threads_write_what_one_piece_after_the_other_gives(workshop, monkeypatch, kind):
    monkeypatch.setattr(tokenizers, "PIECE", 64)
    monkeypatch.setattr(encoding, "WAITING_PIECES", 3)
    folder = workshop.folder / "texts"
    folder.mkdir()
    for number, text in enumerate(
        ["Ä long one. " * 300 + "😀", "short", f"{tokenizers.EOT} " * 40]
    ):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    written = []
    for threads, worth in ((1, 1 << 30), (3, 16)):
        monkeypatch.setattr(machine, "count_cores", lambda threads=threads: threads)
        monkeypatch.setattr(encoding, "WORTH_A_THREAD", worth)
        data = {"source": str(folder), "cache_dir": str(workshop.folder / str(threads))}
        made = workshop.files(data=data, tokenizer={"kind": kind})
        written.append([made.tokens(split).tolist() for split in ("train", "val")])
    assert written[0] == written[1]


def test_an_error_in_a_thread_is_the_same_one_line_and_leaves_nothing(workshop, monkeypatch):
    monkeypatch.setattr(encoding, "WORTH_A_THREAD", 1)

    def refuse(self, text: str) -> None:
        raise DataError("cannot encode this")

    monkeypatch.setattr(tokenizers.ByteTokenizer, "encode_array", refuse)
    with pytest.raises(DataError, match="^cannot encode this$"):
        workshop.files(tokenizer=BYTE)
    assert not [*(workshop.folder / "cache" / "tokens").iterdir()]


@pytest.mark.parametrize("layout", ["stream", "documents"])
def test_train_tokens_takes_the_first_of_the_training_split_and_nothing_else_changes(
    workshop, layout
):
    whole = workshop.files(data={"layout": layout})
    part = workshop.files(data={"layout": layout, "train_tokens": 500})
    assert part.folder == whole.folder  # nothing is tokenized twice
    assert np.array_equal(part.tokens("train"), whole.tokens("train")[:500])
    assert np.array_equal(part.tokens("val"), whole.tokens("val"))
    assert part.rows("train", 16).n_rows < whole.rows("train", 16).n_rows
    assert part.digest != whole.digest
    assert part.n_tokens("train") == 500


def test_more_train_tokens_than_there_are_is_one_line(workshop):
    with pytest.raises(DataError, match=r"data.train_tokens: .* has [\d,]+ tokens \(got 1000000\)"):
        workshop.files(data={"train_tokens": 1_000_000}).rows("train", 16)
