"""Characters that a vocabulary lacks: counted as the text has them, named by their place."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workshop
from test_parts import EVERY_FILE, here

from gptlite.core.evaluate import byte_lengths, measure
from gptlite.core.model import GPT
from gptlite.data import parts, readers, workers
from gptlite.data.prepare import open_split
from gptlite.data.tokenizers import CharTokenizer
from gptlite.data.unknown import count_unknown
from gptlite.errors import DataError

LETTERS = "abc \n"
TEXT = "abc жж abc\n" * 40
"""Two of eleven characters and four of thirteen bytes are unknown."""


def tokenizer(policy: str) -> CharTokenizer:
    return CharTokenizer(LETTERS, eot=False, unknown=policy)


def test_unknown_characters_are_counted_in_bytes_of_the_text() -> None:
    of = tokenizer("skip")
    assert count_unknown(of, "abc") == {}
    assert count_unknown(of, "aж漢жb") == {"unknown": 3, "unknown_bytes": 7}
    assert count_unknown(of, "a\ud83d") == {"unknown": 1, "unknown_bytes": 1}


@pytest.mark.parametrize(("policy", "n_tokens"), [("replace", 11 * 40), ("skip", 9 * 40)])
def test_bits_per_byte_are_over_the_bytes_of_the_text(
    workshop: Workshop, policy: str, n_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, of = workshop.run(), tokenizer(policy)
    workshop.text.write_text(TEXT, encoding="utf-8")
    files = open_split(run, of, str(workshop.text))
    assert "30.8% of its bytes are characters that the vocabulary does not" in (
        capsys.readouterr().err
    )
    counts = files.meta["splits"]["val"]
    assert (counts["tokens"], counts["bytes"]) == (n_tokens, 13 * 40)
    assert (counts["unknown"], counts["unknown_bytes"]) == (80, 160)
    model = GPT(run.model, of.vocab_size)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # every id is as likely
    found = measure(model, files.rows("val", 16).sweep(9), run, byte_lengths(of, counts))
    assert found.text_bytes in (13 * 40 - 1, 13 * 40 - 2)  # the first token is no target
    nats = (n_tokens - 1) * math.log(of.vocab_size)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.text_bytes, rel=1e-5)


def test_a_text_that_is_mostly_unknown_is_refused_and_a_little_is_not_worth_a_word(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.text.write_text("привет abc " * 9, encoding="utf-8")
    with pytest.raises(DataError, match=r"--split .*: 70.6% of its bytes are characters that"):
        open_split(workshop.run(), tokenizer("skip"), str(workshop.text))
    workshop.text.write_text("abc " * 100 + "é", encoding="utf-8")
    open_split(workshop.run(), tokenizer("skip"), str(workshop.text))
    assert capsys.readouterr().err == ""


def table(rows: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([["text"], *([row] for row in rows)])
    return out.getvalue()


PLACES: dict[str, tuple[str, str, str]] = {
    "in the first line": ("e.txt", "abж", r"e\.txt:1:3: character 'ж'"),
    "in a table of tabs": (
        "e.tsv",
        "n\ttext\n1\tab\n2\tcж\n",
        r"e\.tsv: document 2, position 2: .*'ж'",
    ),
    "in an array": ("e.json", '[{"text": "ab\\u0436"}]', r"e\.json: document 1, position 3: .*'ж'"),
    "in a later line": ("e.txt", "abc\n" * 30 + "cab a漢b\n", r"e\.txt:31:6: character '漢'"),
    "far into a line": ("e.md", "abc " * 30 + "é", r"e\.md:1:121: character 'é'"),
    "a carriage return": ("e.txt", "abc\r\nab", r"e\.txt:1:4: character '\\r'"),
    "in a record": (
        "e.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in ("abc", "a" * 40 + "ж")),
        r"e\.jsonl: document 2, position 41: character 'ж'",
    ),
    "in a table": ("e.csv", table(["abc", "ca\nb", "bж"]), r"e\.csv: document 3, position 2: c"),
}


@pytest.mark.parametrize(("name", "text", "place"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_an_unknown_character_is_named_by_its_place(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    place: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(readers, "CHUNK", chunk)
    path = workshop.folder / name
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=f"^--split .*{place}.*not in the vocabulary of 5 char"):
        open_split(workshop.run(), tokenizer("error"), str(path))


@pytest.fixture
def two(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files that are a part each."""
    for name, value in EVERY_FILE.items():
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(workers, "run_jobs", here)
    folder = workshop.folder / "two"
    folder.mkdir()
    for name, text in (("a.txt", "abc " * 20), ("b.txt", "cab\nжa")):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_parts_of_a_corpus_count_and_name_the_same(workshop: Workshop, two: Path) -> None:
    counts: Any = open_split(workshop.run(), tokenizer("replace"), str(two)).meta
    assert counts["splits"]["val"]["unknown_bytes"] == 2
    assert len(counts["parts"]) == 2
    with pytest.raises(DataError, match=r"--split .*two/b\.txt:2:1: character 'ж'"):
        open_split(workshop.run(), tokenizer("error"), str(two))
