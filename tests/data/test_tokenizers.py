"""Every text survives its tokens, however it is read and however odd it is."""

import json
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import trainers

from gptlite.config.run import TokenizerConfig
from gptlite.data import bpe, encoding, tokenizers, workers
from gptlite.data.prepare import prepare
from gptlite.data.tokenizers import EOT, ByteTokenizer, CharTokenizer, cut_pieces
from gptlite.errors import ConfigError, DataError

PROSE = "\n\n".join(text for _, text in sorted(topics.items()))
"""The language reference of this Python: some 450 thousand characters."""
TIKTOKEN = Path(__file__).resolve().parents[3] / "shared" / "tiktoken"
# tiktoken names a cached file by the sha1 of its address; these are vocab.bpe and encoder.json.
GPT2_FILES = (
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
)

examples = settings(max_examples=100, deadline=None, derandomize=True)
ODD = [EOT, "<|endoftext", "\r\n", "   ", "\t ", "n't", " 's", "\x85", "\ufeff", "\0", "e\u0301"]
texts = st.lists(st.text(max_size=20) | st.sampled_from([*ODD, "👩‍👩‍👧 ", "漢字 ", "١٢٣"])).map(
    "".join
)


def gpt2() -> tokenizers.BPETokenizer:
    if not all((TIKTOKEN / name).is_file() for name in GPT2_FILES):
        pytest.skip(f"the gpt2 vocabulary is not in {TIKTOKEN}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
        return tokenizers.load_pretrained("gpt2")


MAKERS = {
    "byte": lambda: ByteTokenizer(eot=False),
    "byte with end-of-text": lambda: ByteTokenizer(eot=True),
    "bpe": lambda: tokenizers.train_bpe([PROSE[:100_000], "漢字 👩‍👩‍👧 " * 9], 700),
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=MAKERS)
def built(request):
    """The tokenizers that take any text."""
    return MAKERS[request.param]()


@pytest.fixture(scope="module", params=["bpe", "gpt2"])
def by_words(request):
    """The tokenizers that split text by a pattern first."""
    return MAKERS[request.param]()


def char(text: str, **options: object) -> CharTokenizer:
    return CharTokenizer("".join(sorted(set(text))), **{"eot": True, "unknown": "error", **options})


@examples
@given(text=texts)
def test_every_text_survives_its_tokens(built, text):
    ids = built.encode(text)
    assert built.decode(ids) == text
    assert all(0 <= token < built.vocab_size for token in ids)


@examples
@given(text=texts)
def test_every_text_survives_a_vocabulary_of_its_characters(text):
    built = char(text)
    ids = built.encode(text)
    assert built.decode(ids) == text
    assert len(ids) == len(text)


@examples
@given(text=texts)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(built, text):
    """Bits per byte divide by this sum."""
    for each in (built, char(text)):
        lengths = tokenizers.token_lengths(each)
        assert len(lengths) == each.vocab_size
        assert sum(lengths[token] for token in each.encode(text)) == len(text.encode())


def test_the_end_of_text_token_has_no_bytes_and_is_the_last(built):
    if built.eot is not None:
        assert built.eot == built.vocab_size - 1
        assert built.token_bytes(built.eot) == b""
        assert built.decode([*built.encode("a"), built.eot, *built.encode("b")]) == "ab"


@pytest.mark.parametrize("text", [EOT, f"a{EOT}b", f"{EOT}\n{EOT}", EOT * 3])
def test_the_end_of_text_marker_in_a_text_stays_text(built, text):
    """A document that quotes the marker must not be cut there."""
    for each in (built, char(text)):
        ids = each.encode(text)
        assert each.eot not in ids
        assert each.decode(ids) == text


def test_a_million_spaces_are_no_problem(built):
    """tiktoken alone raises on them (its issue 15)."""
    text = " " * 1_000_000 + "x"
    for each in (built, char(text)):
        assert each.decode(each.encode(text)) == text


@pytest.mark.parametrize("run", ["\n", "a"])
def test_a_million_of_the_same_character_are_encoded(by_words, run):
    text = run * 1_000_000 + "x"
    ids = by_words.encode(text)
    assert by_words.decode(ids) == text


def test_bytes_that_are_no_text_show_as_a_replacement_character():
    assert ByteTokenizer(eot=False).decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def fed(text: str, sizes: list[int]) -> list[str]:
    """The pieces when text arrives in parts of these lengths, and then the rest."""
    pieces, held, at = [], "", 0
    for size in sizes:
        got, held = cut_pieces(held + text[at : at + size], final=False)
        pieces, at = pieces + got, at + size
    return pieces + cut_pieces(held + text[at:], final=True)[0]


small_texts = st.text(st.sampled_from("ab .\n\t\u00a0é漢"), min_size=40, max_size=200)


@examples
@given(text=small_texts, sizes=st.lists(st.integers(0, 60), max_size=12))
def test_where_a_text_is_cut_does_not_depend_on_how_it_was_read(text, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", 16)
        assert fed(text, sizes) == cut_pieces(text, final=True)[0]


@examples
@given(text=small_texts, final=st.booleans())
def test_cutting_loses_nothing_and_leaves_small_pieces(text, final):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", 16)
        pieces, rest = cut_pieces(text, final=final)
    assert "".join(pieces) + rest == text
    assert all(0 < len(piece) <= 17 for piece in pieces)
    assert len(rest) <= 17
    assert not (final and rest)


# Whatever stands between them, a single space between two of these is never far.
visible = st.text(max_size=10).map(str.strip).filter(bool)
odd_clauses = st.sampled_from(["'s", "a  b", "x\n\n y", "1.", "(", "\u0301", "c       d"])
clauses = st.lists(visible | odd_clauses, min_size=10)


@examples
@given(text=clauses.map(" ".join))
def test_pieces_have_the_tokens_of_the_whole(by_words, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", 24)
        pieces = by_words.encode(text)
    assert pieces == by_words.encoding.encode_ordinary(text)


def test_a_long_text_has_the_tokens_of_the_whole(by_words):
    pieces, _ = cut_pieces(PROSE, final=True)
    assert len(pieces) > 2
    assert by_words.encode(PROSE) == by_words.encoding.encode_ordinary(PROSE)


def test_words_found_by_the_grouped_pattern_are_those_of_gpt2():
    """Over all short texts, with a vocabulary in which every word is one token."""
    signs = "'s 1\n.é"
    small = ["".join(letters) for n in range(1, 6) for letters in product(signs, repeat=n)]
    ranks = {word.encode(): rank for rank, word in enumerate(small)}
    built = tokenizers.BPETokenizer("bpe", "bpe", tokenizers.GPT2_PATTERN, ranks, len(ranks))
    plain = tiktoken.Encoding(
        "plain", pat_str=tokenizers.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in small:
        assert built.encode(text) == plain.encode_ordinary(text)
    assert [small[token] for token in built.encode("é's  é")] == ["é", "'s", " ", " é"]


def reference_bpe(training: str, vocab_size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator([training], trainer)
    return reference


@pytest.fixture(scope="module")
def bpe_twice():
    """Our tokenizer, and the same one run by Hugging Face's `tokenizers`."""
    varied = (
        "In 2024 they'll say: 'we've 10 000 (ten thousand)!!'  \t1, 22\n\n  333 -> été\r\n" * 200
    )
    training = PROSE[:40_000] + varied  # a split shows only where tokens would cross it
    return tokenizers.train_bpe([training], 600), reference_bpe(training, 600)


@examples
@given(text=texts)
def test_a_trained_bpe_gives_the_ids_of_hugging_face(bpe_twice, text):
    ours, reference = bpe_twice
    assert ours.encode(text) == reference.encode(text).ids


def test_a_trained_bpe_gives_the_ids_of_hugging_face_for_prose(bpe_twice):
    ours, reference = bpe_twice
    assert ours.encode(PROSE[50_000:]) == reference.encode(PROSE[50_000:]).ids


repetitive = st.text(st.sampled_from("ab "), min_size=20, max_size=120)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(training=repetitive, text=repetitive)
def test_merges_of_a_repetitive_text_are_applied_in_the_order_learned(training, text):
    """tiktoken ranks tokens, `tokenizers` ranks merges; they agree because each token has one."""
    ours, reference = tokenizers.train_bpe([training], 290), reference_bpe(training, 290)
    assert ours.encode(text) == reference.encode(text).ids


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 1000])
def test_a_trained_bpe_has_exactly_the_tokens_asked_for(vocab_size):
    ours = tokenizers.train_bpe([PROSE[:30_000]], vocab_size)
    assert ours.vocab_size == vocab_size
    assert ours.eot == vocab_size - 1
    tokens = [ours.token_bytes(token) for token in range(ours.eot)]
    assert len(set(tokens)) == vocab_size - 1
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


@pytest.mark.parametrize("training", [[], ["hello"]])
def test_a_bpe_of_too_little_text_is_smaller_than_asked(training):
    ours = tokenizers.train_bpe(training, 1000)
    assert 257 <= ours.vocab_size < 270
    assert ours.decode(ours.encode(PROSE[:1000])) == PROSE[:1000]


ALL = {
    **MAKERS,
    "char": lambda: char("hello"),
    "char without end-of-text": lambda: char("hello", eot=False),
    "char skip": lambda: char("hello", unknown="skip"),
    "char replace": lambda: char("hello", unknown="replace"),
    "char of more characters": lambda: char("hello!"),
}


@pytest.mark.parametrize("name", ALL)
def test_a_tokenizer_travels_as_json(name):
    here = ALL[name]()
    there = tokenizers.from_json(json.loads(json.dumps(here.to_json())))
    assert there.to_json() == here.to_json()
    assert tokenizers.digest(there) == tokenizers.digest(here)
    assert (there.kind, there.vocab_size, there.eot) == (here.kind, here.vocab_size, here.eot)
    assert tokenizers.token_lengths(there) == tokenizers.token_lengths(here)
    assert there.encode("hello" * 3) == here.encode("hello" * 3)


def test_different_tokenizers_have_different_digests():
    made = [make() for name, make in ALL.items() if name != "gpt2"]
    assert len({tokenizers.digest(each) for each in made}) == len(made)


@pytest.mark.parametrize(
    "saved",
    [{}, [], None, {"kind": "word"}, {"kind": "byte"}, {"kind": "char", "characters": "ab"}]
    + [{"kind": "bpe", "name": "", "pattern": "a", "eot": 1, "ranks": ranks} for ranks in ("", {})],
)
def test_a_document_that_is_no_tokenizer_is_refused(saved):
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizers.from_json(saved)


def test_a_training_text_learns_the_same_tokenizer_twice():
    first, second = (tokenizers.train_bpe([PROSE[:60_000]], 600) for _ in range(2))
    assert tokenizers.digest(first) == tokenizers.digest(second)


def test_an_unknown_character_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'é' at position 4 .* 3 characters") as caught:
        char("caf").encode("café")
    assert len(caught.value.problems) == 1


def test_an_unknown_character_can_be_skipped():
    built = char("abc", unknown="skip")
    assert built.decode(built.encode("aébéc")) == "abc"


@pytest.mark.parametrize("eot", [True, False])
def test_an_unknown_character_can_be_replaced(eot):
    built = char("abc", unknown="replace", eot=eot)
    ids = built.encode("aébéc")
    assert built.decode(ids) == "a\ufffdb\ufffdc"
    assert built.vocab_size == 4 + eot
    assert built.eot not in ids


def test_build_makes_what_the_config_asks_for():
    def made(**options: object) -> tokenizers.Tokenizer:
        config = TokenizerConfig(**options)
        return tokenizers.from_config(config, eot=True, characters=set("cba"), texts=["abc " * 50])

    assert made(kind="byte").to_json() == ByteTokenizer(eot=True).to_json()
    assert made(kind="char", unknown="skip").to_json() == char("abc", unknown="skip").to_json()
    assert made(kind="bpe", vocab_size=260).vocab_size == 260


def test_an_encoding_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="no encoding 'gpt5'.*gpt2.*cl100k_base"):
        tokenizers.load_pretrained("gpt5")


def refuses(name: str) -> None:
    raise ConnectionError("no network")


def hangs(name: str) -> None:
    time.sleep(2)


@pytest.mark.parametrize("get_encoding", [refuses, hangs])
def test_a_vocabulary_that_cannot_be_fetched_is_one_line(monkeypatch, get_encoding):
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(tokenizers, "DOWNLOAD_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="TIKTOKEN_CACHE_DIR") as caught:
        tokenizers.load_pretrained("gpt2")
    assert len(caught.value.problems) == 1


def test_an_array_of_ids_is_the_list(built):
    for text in ("", "plain", "ä 😀 <|endoftext|>", "half \ud83d a pair", "\x00\n\n  \t"):
        assert built.encode_array(text).tolist() == built.encode(text)


@pytest.mark.parametrize("unknown", ["skip", "replace", "error"])
def test_an_array_of_characters_is_the_list(unknown: str) -> None:
    letters = char("abcä😀", unknown=unknown)
    for text in ("", "cab😀", "äää"):
        assert letters.encode_array(text).tolist() == letters.encode(text)
    for odd in ("axb", "\U0010ffff", "\ud83d"):
        if unknown == "error":
            with pytest.raises(ConfigError, match="is not in the vocabulary"):
                letters.encode_array(odd)
        else:
            assert letters.encode_array(odd).tolist() == letters.encode(odd)
    assert char("").encode_array("").tolist() == []


UNSPACED = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 30_000).tolist()))


def test_a_bpe_is_learned_from_a_sample_of_a_long_text(workshop, monkeypatch, capsys):
    """From all of it, and that is told; a text below the bound is learned from whole."""
    learned, train = [], bpe.learn_vocabulary

    def watched(texts, vocab_size):
        learned.append(list(texts))
        return train(learned[-1], vocab_size)

    monkeypatch.setattr(bpe, "learn_vocabulary", watched)
    monkeypatch.setattr(encoding, "LEARNED_PIECE", 100)
    workshop.text.write_text(PROSE[:20_000] + UNSPACED, encoding="utf-8")
    run = workshop.run(tokenizer={"kind": "bpe", "vocab_size": 300})
    prepare(run)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(encoding, "MOST_LEARNED", 20_000)
    shutil.rmtree(run.data.cache_dir)
    files = prepare(run)
    assert "tokenizer: learned from 0 MiB, spread evenly" in capsys.readouterr().err
    whole, some = ("".join(texts) for texts in learned)
    assert len(whole.encode()) > 90_000
    assert 10_000 < len(some.encode()) < 22_000
    assert some[-100:] in whole[-1000:]
    shutil.rmtree(run.data.cache_dir)
    assert prepare(run).digest == files.digest


def test_a_process_learns_the_same_bpe(monkeypatch, capsys):
    here = tokenizers.train_bpe([PROSE[:60_000], UNSPACED], 600)
    monkeypatch.setattr(bpe, "WORTH_A_PROCESS", 1)
    told, work = [], workers.run_jobs

    def watched(do, jobs, firsts, advance):
        return work(do, jobs, firsts, lambda _, n: told.append(n))

    monkeypatch.setattr(workers, "run_jobs", watched)
    apart = tokenizers.train_bpe([PROSE[:60_000], UNSPACED], 600)
    assert apart.to_json() == here.to_json()
    assert capsys.readouterr().err == ""
    if hasattr(trainers.BpeTrainer, "progress_format"):
        assert sum(told) == bpe.WHOLE
        assert len(told) > 20


INTERRUPTED = """
import _thread, sys, threading, time
from gptlite.data import bpe; from gptlite.data import workers

def begin(worker, *job):
    hand_over(worker, *job)
    threading.Timer(0.2, _thread.interrupt_main).start()

hand_over, workers.Worker.begin = workers.Worker.begin, begin
numbers = [range(n, n + (1 << 32), 1 << 16) for n in range(64)]
texts = ["".join(chr(0x4e00 + i * i // 7919 % 20000) for i in some) for some in numbers]
bpe.WORTH_A_PROCESS = 1
try:
    bpe.learn_vocabulary(texts, 60_000)
except KeyboardInterrupt:
    sys.exit(13)
"""


def test_learning_a_bpe_is_left_when_asked():
    """It would go on for a minute, and the library answers to nothing meanwhile."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.returncode == 13, done.stderr
    assert done.stderr == ""
