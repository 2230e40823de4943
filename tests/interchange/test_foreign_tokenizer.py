"""Tokenizers of other makes: the ids that Hugging Face gives, or a refusal by the field's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import prose

from gptlite import storage
from gptlite.core.generate import TextStream, encode_prompt
from gptlite.data.tokenizers import (
    GPT2_PATTERN,
    CharTokenizer,
    Tokenizer,
    from_json,
    train_bpe,
)
from gptlite.errors import ConfigError, DataError
from gptlite.interchange import foreign_tokenizer, hf_tokenizer

LEARNED = train_bpe([prose()], 300)
N = LEARNED.vocab_size - 1
"""How many of its tokens are text; with what follows in a file they are 300 again."""
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Edit = Callable[[dict[str, Any]], None]


def special(number: int, name: str, **more: Any) -> dict[str, Any]:
    return {"id": number, "content": name, "special": True, **hf_tokenizer.PLAIN, **more}


def plain_bpe(*names: str) -> dict[str, Any]:
    """A tokenizer.json as GPT-2's, with these special tokens behind the text's."""
    whole = json.loads(json.dumps(hf_tokenizer.tokenizer_json(LEARNED)))
    whole["pre_tokenizer"] = {**hf_tokenizer.BYTES, "use_regex": True}
    whole["model"]["ignore_merges"] = False
    whole["added_tokens"] = [special(N + i, name) for i, name in enumerate(names)]
    return whole


def write(folder: Path, whole: dict[str, Any], **files: Any) -> None:
    folder.mkdir(exist_ok=True)
    for name, value in {"tokenizer": whole, **files}.items():
        storage.write_json(folder / f"{name}.json", value)


def read(folder: Path, whole: dict[str, Any], **files: Any) -> Tokenizer:
    write(folder, whole, **files)
    made = foreign_tokenizer.import_tokenizer(folder)
    again = from_json(made.to_json())
    assert (again.to_json(), again.specials) == (made.to_json(), made.specials)
    return made


def put(path: str, value: Any) -> Edit:
    """Set a field, by the names and numbers on the way to it."""

    def edit(whole: dict[str, Any]) -> None:
        *way, last = path.split(".")
        inside: Any = whole
        for name in way:
            inside = inside[int(name) if isinstance(inside, list) else name]
        inside[last] = value

    return edit


def template(single: list[Any], **ids: list[int]) -> dict[str, Any]:
    named = {name: {"id": name, "ids": each, "tokens": [name]} for name, each in ids.items()}
    two = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": two, "special_tokens": named}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
END = {"SpecialToken": {"id": "end", "type_id": 0}}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": GPT2_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
REFUSED: dict[str, tuple[Edit, str]] = {
    "wordpiece": (put("model.type", "WordPiece"), "model.type: 'WordPiece'"),
    "dropout": (put("model.dropout", 0.1), "model.dropout: 0.1"),
    "prefix": (put("model.continuing_subword_prefix", "##"), "model.continuing_subword_prefix"),
    "suffix": (put("model.end_of_word_suffix", "</w>"), "model.end_of_word_suffix: '</w>'"),
    "new model field": (put("model.new", 1), "model.new"),
    "new field": (put("new", 1), "new: not known"),
    "lowercase": (put("normalizer", {"type": "Lowercase"}), "normalizer: 'Lowercase'"),
    "nfc": (put("normalizer", {"type": "NFC"}), "normalizer: 'NFC'"),
    "prefixed space": (
        put("pre_tokenizer.add_prefix_space", True),
        "pre_tokenizer.add_prefix_space",
    ),
    "whitespace": (put("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer: Whitespace"),
    "metaspace": (
        put("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}),
        "pre_tokenizer.replacement",
    ),
    "digits": (
        put(
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, hf_tokenizer.BYTES]},
        ),
        "pre_tokenizer: Digits",
    ),
    "removed": (
        put(
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [{**SPLIT, "behavior": "Removed"}, hf_tokenizer.BYTES],
            },
        ),
        "pre_tokenizer: splits words otherwise",
    ),
    "a pattern that loses text": (
        put(
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [{**SPLIT, "pattern": {"Regex": r"\w+|\s+"}}, hf_tokenizer.BYTES],
            },
        ),
        "pre_tokenizer",
    ),
    "a count that Oniguruma reads otherwise": (
        put(
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}+|[^\p{N}]+"}},
                    hf_tokenizer.BYTES,
                ],
            },
        ),
        "pre_tokenizer: cuts",
    ),
    "end behind": (
        put("post_processor", template([TEXT, END], end=[N])),
        "post_processor.single: puts more",
    ),
    "two before": (
        put("post_processor", template([END, END, TEXT], end=[N])),
        "post_processor.single",
    ),
    "one of two": (
        put("post_processor", template([END, TEXT], end=[N, 5])),
        "post_processor.special_tokens",
    ),
    "bert": (put("post_processor", {"type": "BertProcessing"}), "post_processor: BertProcessing"),
    "not special": (put("added_tokens.0.special", False), "added_tokens: '<|endoftext|>'"),
    "another id": (put("added_tokens.0.id", N + 7), "added_tokens: '<|endoftext|>' has another id"),
    "decoder": (put("decoder", {"type": "WordPiece"}), "decoder: 'WordPiece'"),
    "a token of no bytes": (
        put("model.vocab.漢", N + 1),
        "model.vocab: '漢' is no bytes",
    ),
    "a token of no merge": (put("model.vocab.zzz", N + 1), "model.ignore_merges: false"),
    "two tokens of one id": (put("model.vocab.Ġthe", 5), "model."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_other_ids_is_refused_by_name(tmp_path: Path, case: str) -> None:
    whole, (edit, told) = plain_bpe("<|endoftext|>"), REFUSED[case]
    edit(whole)
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, whole)
    assert told in str(refused.value)
    assert all(str(tmp_path / "tokenizer.json") in line for line in refused.value.problems)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"add_prefix_space": True}, "add_prefix_space: True in tokenizer_config.json"),
        ({"add_eos_token": True}, "add_eos_token: True"),
        ({"add_bos_token": True}, "add_bos_token: true"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class: 'Qwen2Tokenizer'"),
        ({"added_tokens_decoder": {"9": {"content": "the", "special": False}}}, "'the' is not"),
        ({"eos_token": "Ġthe"}, "eos_token: 'Ġthe' is a token of plain text"),
    ],
)
def test_so_is_what_stands_beside_it(tmp_path: Path, setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, plain_bpe("<|endoftext|>"), tokenizer_config=setting)
    assert told in str(refused.value)


def test_vocab_and_merges_alone_say_what_to_do(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError) as refused:
        foreign_tokenizer.import_tokenizer(tmp_path)
    told = str(refused.value)
    assert "vocab.json and merges.txt alone do not say how text is cut" in told
    assert f"AutoTokenizer.from_pretrained({str(tmp_path)!r}).save_pretrained" in told


def test_what_changes_no_id_is_read(tmp_path: Path) -> None:
    ours, text = LEARNED.encode, "It's the 12345 café\n\n  of it.  "
    for edit in (
        put("model.dropout", 0.0),
        put("model.continuing_subword_prefix", ""),
        put("model.unk_token", "<|endoftext|>"),
        put("normalizer", {"type": "Sequence", "normalizers": []}),
        put("post_processor", {**hf_tokenizer.BYTES, "trim_offsets": False}),
        put(
            "truncation",
            {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        ),
        put("pre_tokenizer.trim_offsets", False),
    ):
        whole = plain_bpe("<|endoftext|>")
        edit(whole)
        assert read(tmp_path, whole).encode(text) == ours(text)


def test_merges_as_converters_from_tiktoken_write_them_are_read(tmp_path: Path) -> None:
    """Every pair that makes a token, not only the one that is ever met (as Llama 3 has them)."""
    whole = plain_bpe("<|begin_of_text|>", "<|end_of_text|>")
    ranks = LEARNED.ranks
    whole["model"]["merges"] = [
        [hf_tokenizer.show_token(token[:at]), hf_tokenizer.show_token(token[at:])]
        for token, _ in sorted(ranks.items(), key=lambda item: item[1])
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    assert len(whole["model"]["merges"]) > len(hf_tokenizer.merges(ranks))
    split = {**SPLIT, "pattern": {"Regex": LLAMA_3}}
    steps = {"type": "Sequence", "pretokenizers": [split, hf_tokenizer.BYTES]}
    whole["pre_tokenizer"], whole["model"]["ignore_merges"] = steps, True
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    several = [
        {**hf_tokenizer.BYTES},
        template([begin, TEXT], **{"<|begin_of_text|>": [N]}),
    ]
    whole["post_processor"] = {"type": "Sequence", "processors": several}
    made = read(tmp_path, whole, config={"model_type": "llama", "eos_token_id": [N + 1]})
    assert encode_prompt(made, "of it", False) == [N, *made.encode("of it")]
    assert (made.eot, made.vocab_size) == (N + 1, N + 2)


NAMES: dict[str, tuple[list[str], Any, int, set[int]]] = {
    "the last of three": (["<s>", "<pad>", "</s>"], 2, 2, {2}),
    "llama 3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [1, 2], 1, {1, 2}),
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [2, 0], 0, {0, 2}),
    "chatml, one end": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 2, 2, {2}),
    "nothing said": (["<a>", "<|endoftext|>", "<b>"], None, 1, {1}),
    "out of the vocabulary": (["<a>", "<|endoftext|>"], 50256 - N, 1, {1}),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_a_text_ends_where_the_model_says(tmp_path: Path, case: str, file: str) -> None:
    names, said, eot, ends = NAMES[case]
    ids = [N + i for i in said] if isinstance(said, list) else said and N + said
    files: dict[str, Any] = {"config": {"eos_token_id": 3, "model_type": "gpt2"}}
    files[file] = {"eos_token_id": ids, "model_type": "gpt2"}
    if ids is None:
        files["config"] = {"eos_token_id": None, "model_type": "gpt2"}
    made = read(tmp_path, plain_bpe(*names), **files)
    assert (made.eot, made.vocab_size) == (N + eot, N + len(names))
    assert made.specials == {name: N + i for i, name in enumerate(names)}
    assert made.decode(made.specials.values()) == ""
    for number, _ in enumerate(names):
        stream = TextStream(made, [])
        stream.feed(N + number)
        assert (stream.finished == "eot") == (number in ends), number


def test_an_ordinary_token_that_ends_texts_is_kept_as_one(tmp_path: Path) -> None:
    """GPT-2 told to stop at the end of a line."""
    line = LEARNED.encode("\n")[0]
    made = read(tmp_path, plain_bpe("<|endoftext|>"), generation_config={"eos_token_id": [line, N]})
    assert (made.eot, made.marks.ends) == (N, (line,))
    stream = TextStream(made, [])
    assert (stream.feed(line), stream.finished) == ("", "eot")


def test_an_end_that_is_no_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token_id: 'x'"):
        read(tmp_path, plain_bpe("a>"), generation_config={"eos_token_id": "x"})


def test_characters_and_bytes_are_read_as_strictly(tmp_path: Path) -> None:
    whole = json.loads(
        json.dumps(hf_tokenizer.tokenizer_json(CharTokenizer("abc", eot=True, unknown="replace")))
    )
    assert read(tmp_path, whole).encode("abz") == [0, 1, 3]
    for edit, told in (
        (put("model.fuse_unk", True), "model.fuse_unk"),
        (put("model.merges", [["a", "b"]]), "model.merges"),
        (put("model.vocab", {"ab": 0, "c": 1}), "model.vocab: 'ab' is not one character"),
        (put("model.vocab", {"a": 0, "c": 2, "\ufffd": 3}), "model.vocab: its ids"),
        (put("added_tokens", [special(4, "<a>"), special(5, "<b>")]), "added_tokens: '<a>'"),
    ):
        changed = json.loads(json.dumps(whole))
        edit(changed)
        with pytest.raises(ConfigError) as refused:
            read(tmp_path, changed)
        assert told in str(refused.value)
