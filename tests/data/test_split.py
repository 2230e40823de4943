"""Which documents are for validation: a share of the bytes, copies together, both sides alive."""

import hashlib
import json
import shutil
from typing import Any

import numpy as np
import pytest
from conftest import Workshop
from hypothesis import given
from hypothesis import strategies as st

from gptlite.config.run import RunConfig
from gptlite.data import encoding, prepare
from gptlite.data.split import choose_documents, is_near
from gptlite.data.tokenizers import BPETokenizer, train_bpe
from gptlite.errors import ConfigError
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained


def split(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The texts for training and those for validation."""
    raw = [text.encode() for text in texts]
    digests = [hashlib.blake2b(one, digest_size=8).digest() for one in raw]
    chosen = choose_documents(
        np.frombuffer(b"".join(digests), np.uint64),
        np.array([len(one) for one in raw], np.uint64),
        fraction,
    )
    sides: tuple[list[str], list[str]] = ([], [])
    for text, for_val in zip(texts, chosen.tolist(), strict=True):
        sides[for_val].append(text)
    return sides


def share(train: list[str], val: list[str]) -> float:
    n_train, n_val = (sum(len(text.encode()) for text in side) for side in (train, val))
    return n_val / (n_train + n_val)


NOTES = [f"note {i:04}" for i in range(500)]
OF_ANY_LENGTH = [f"note {i} " + "x" * i for i in range(100)]
TEXTS = {
    "all differ": NOTES,
    "half are copies": NOTES + ["the same "] * 500,
    "most say ok": ["ok"] * 900 + OF_ANY_LENGTH,
    "one is a third": [*NOTES, "y" * 2000],
    "some are long": NOTES + [f"{i}" * 300 for i in range(9)],
}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_validation_is_a_share_of_the_bytes(texts: list[str], fraction: float) -> None:
    found, val = split(texts, fraction)
    assert is_near(share(found, val), fraction)
    assert len(val) < 0.5 * len(texts)
    assert not set(found) & set(val)


def test_what_most_documents_say_is_not_what_validation_is_made_of() -> None:
    """However little text that is, and whatever its digest."""
    for number in range(50):
        texts = [f"ok {number}"] * 900 + [f"{i} " + "x" * 1000 for i in range(100)]
        found, val = split(texts, 0.1)
        assert len(val) < 20
        assert is_near(share(found, val), 0.1)


def test_one_book_and_some_notes_are_split_alike_whatever_they_say() -> None:
    """By the number of documents the book was in validation as often as its digest was small."""
    for number in range(50):
        book, *notes = (f"{number} the book " * 2000, *(f"note {number} {i}" for i in range(19)))
        found, val = split([book, *notes], 0.1)
        assert found[0] == book
        assert 0 < share(found, val) < 0.1


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9])
def test_two_documents_are_one_for_each_side(fraction: float) -> None:
    for texts in (["a" * 99, "b"], ["a" * 50, "b" * 50], ["ok", "ok", "ok", "b" * 60]):
        found, val = split(texts, fraction)
        assert found
        assert val
        assert not set(found) & set(val)
    small, large = "b" * 40, "a" * 60
    if fraction != 0.5:
        assert split([small, large], fraction)[1] == [small if fraction < 0.5 else large]


sizes = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 9)), min_size=2, max_size=60)


@given(groups=sizes, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_both_sides_have_some_and_the_order_does_not_matter(
    groups: list[tuple[int, int]], fraction: float, seed: int
) -> None:
    texts = [f"{i} " + "x" * n for i, (n, copies) in enumerate(groups) for _ in range(copies)]
    found, val = split(texts, fraction)
    assert val
    assert not set(found) & set(val)
    assert 1 - share(found, val) >= (1 - fraction) / 2 - 1e-9
    mixed = np.random.default_rng(seed).permutation(texts).tolist()
    assert set(split(mixed, fraction)[1]) == set(val)


def test_a_share_that_cannot_be_met_is_said(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the book " * 3000, *(f"note {i}" for i in range(19))]
    path = workshop.folder / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"source": str(path), "split_by": "document"}
    files = workshop.files(data=data, tokenizer={"kind": "byte"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.val_fraction: validation has 0.5% of the bytes instead of 10.0%")
    counts = files.meta["splits"]
    assert counts["val"]["bytes"] / (counts["val"]["bytes"] + counts["train"]["bytes"]) < 0.1


def test_a_run_of_the_earlier_rule_goes_on_with_its_own_documents(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its token files are found by their digest, though the config names others now."""
    run, directory = workshop.run(data={"layout": "documents"}), workshop.folder / "run"

    def every_third(digests: np.ndarray, *_: object) -> np.ndarray:
        return digests % 3 == 0

    key = prepare.cache_key
    with monkeypatch.context() as before:
        before.setattr(encoding, "choose_documents", every_third)
        before.setattr(prepare, "cache_key", lambda *of: key(*of[:3], prepare.EARLIER_FORMAT))
        train(run, directory)
        theirs = prepare.prepare(run)
    assert prepare.prepare(run).digest != theirs.digest
    trained = load_trained(directory, "last")
    capsys.readouterr()
    own = (trained.run, trained.tokenizer, "val", trained.state.data_digest)
    assert prepare.open_split(*own).digest == theirs.digest
    assert capsys.readouterr().err == ""
    longer = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 10})})
    assert train(longer, directory, resume=True)["steps"] == 10
    shutil.rmtree(theirs.folder)
    capsys.readouterr()
    assert prepare.open_split(*own).digest != theirs.digest
    assert "not the text this run was trained on" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the text is not the one this run was trained on"):
        train(longer, directory, resume=True)


def test_a_run_goes_on_with_the_tokens_of_the_tokenizer_that_it_learned(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a text is not split by document: the same config would learn others now."""
    run = workshop.run(tokenizer={"kind": "bpe", "vocab_size": 300})
    directory, key = workshop.folder / "run", prepare.cache_key

    def learn_fewer(run: RunConfig, scan: object, texts: Any) -> BPETokenizer:
        return train_bpe((text for split, (text, _) in texts if split == "train"), 270)

    with monkeypatch.context() as before:
        before.setattr(prepare, "build_tokenizer", learn_fewer)
        before.setattr(prepare, "cache_key", lambda *of: key(*of[:3], prepare.EARLIER_FORMAT))
        train(run, directory)
    assert prepare.prepare(run).meta["vocab_size"] == 300
    longer = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 10})})
    assert train(longer, directory, resume=True)["steps"] == 10
