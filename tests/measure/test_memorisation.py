"""What is known by heart is found, and what was seen once is not."""

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import Workshop

from gptlite.core.language_model import LanguageModel
from gptlite.data.token_files import TokenFiles
from gptlite.measure.memorisation import (
    Haystack,
    Windows,
    before_end,
    cut_windows,
    matched_tokens,
    memorisation,
)
from gptlite.runs.start import train
from gptlite.runs.trained import load_trained

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def passage(seed: int, n: int = 64) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=n))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, TokenFiles]:
    """A model whose text has one passage of letters 30 times, and another one once."""
    workshop = Workshop(tmp_path_factory.mktemp("planted"))
    lines = workshop.text.read_text().split("\n")
    for number in range(30):
        lines.insert(8 * number, passage(1))
    lines.insert(len(lines) // 2, passage(2))
    workshop.text.write_text("\n".join(lines))
    run = workshop.run(
        model={"context_length": 64, "n_embd": 48},
        dropout={"rate": 0.1},
        optim={"name": "muon", "lr": 0.01, "weight_decay": 1.0, "warmup_steps": 5},
        train={"max_steps": 240, "batch_size": 16, "eval_interval": 240, "micro_batch_size": 16},
    )
    train(run, workshop.folder / "run")
    return load_trained(workshop.folder / "run", "last"), workshop.files()


def windows_of(of: LanguageModel, text: str) -> Windows:
    ids = np.array([of.tokenizer.encode(text)])
    return Windows(ids[:, :32], ids[:, 32:])


def quietly(work: object, name: str) -> object:
    return work


def test_what_was_seen_30_times_is_found_and_what_was_seen_once_is_not(
    planted: tuple[LanguageModel, TokenFiles],
) -> None:
    of, _ = planted
    often, once, never = (
        matched_tokens(of, windows_of(of, passage(seed)), quietly)[0] for seed in (1, 2, 3)
    )
    assert often == 32
    assert once < 8
    assert never < 8


def test_the_suite_tells_training_text_from_held_out_text(
    planted: tuple[LanguageModel, TokenFiles],
) -> None:
    of, files = planted
    found = memorisation(of, files.tokens("train"), files.tokens("val"), 24, quietly)
    assert found["prompt_tokens"] == found["continued_tokens"] == 32
    assert found["train"]["windows"] == found["val"]["windows"] == 24
    spans = found["spans"]
    assert spans["longest_span"] >= len(spans["longest_text"]) > 0
    train_text = of.tokenizer
    whole = b"".join(map(train_text.token_bytes, files.tokens("train").tolist())).decode()
    assert spans["longest_text"] in whole


def test_the_longest_span_is_what_a_plain_search_finds() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, 400).astype(np.uint16)
    text, ids = Haystack(tokens), np.random.default_rng(1).integers(0, 4, 60)
    whole = "".join(map(str, tokens.tolist()))
    letters = "".join(map(str, ids.tolist()))
    longest = max(
        end - start
        for start in range(60)
        for end in range(start, 61)
        if letters[start:end] in whole
    )
    length, begin = text.longest_span(ids)
    assert length == longest
    assert letters[begin : begin + length] in whole


def test_a_span_does_not_begin_inside_a_token() -> None:
    text = Haystack(np.array([0x0102, 0x0304], dtype=np.uint16))
    assert text.has(np.array([0x0102]))
    assert not text.has(np.array([0x04]))
    assert not text.has(np.array([0x01020000 >> 16 << 8]))


def test_no_window_reaches_into_another_document() -> None:
    tokens = np.array([9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 9, 1, 2, 3, 4, 5, 6], dtype=np.uint16)
    windows = cut_windows(tokens, 100, 3, eot=9)
    rows = np.concatenate([windows.prompts, windows.following], axis=1)
    assert len(rows)
    assert not (rows[:, 1:] == 9).any()
    assert len(cut_windows(tokens[:3], 100, 3, eot=9).prompts) == 0


def test_a_sample_is_read_up_to_its_end() -> None:
    assert before_end(np.array([1, 2, 9, 3]), 9).tolist() == [1, 2]
    assert before_end(np.array([1, 2]), 9).tolist() == [1, 2]
    assert before_end(np.array([1, 2]), None).tolist() == [1, 2]


def test_documents_that_are_too_short_are_a_note(workshop: Workshop, tmp_path: Path) -> None:
    workshop.text.write_text("\n".join(["anna", "bert", "carl", "dora"] * 50))
    run = workshop.run(
        data={"layout": "documents"}, model={"context_length": 64, "position": "rope"}
    )
    train(run, tmp_path / "run")
    files = workshop.files(data={"layout": "documents"})
    of = load_trained(tmp_path / "run", "last")
    found = memorisation(of, files.tokens("train"), files.tokens("val"), 8, quietly)
    assert found["prompt_tokens"] == 32
    assert found["train"] == found["val"] == {"note": "no document of 64 tokens"}
    assert found["spans"]["samples"] == 16
