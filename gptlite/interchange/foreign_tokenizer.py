"""A Hugging Face directory's tokenizer → ours with the same ids, or a refusal by the field's name.

tokenizer.json is read by allow-list: what is not known here may change ids. Whatever passes is
compared at last, on texts of all kinds of characters, with Hugging Face's own library.
"""

import base64
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlite import storage
from gptlite.data.marks import Marks
from gptlite.data.tokenizers import (
    EOT,
    GPT2_PATTERN,
    MOST_BYTES,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from gptlite.errors import ConfigError, DataError
from gptlite.interchange import hf_config
from gptlite.interchange.hf_tokenizer import SYMBOLS, merges, show_token

FILE = "tokenizer.json"
FIELDS = {
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"),
    *("post_processor", "decoder", "model"),
}
"""Truncation and padding are for whom asks for a batch; AutoTokenizer sets both anew."""
ANY = object()
MODEL_FIELDS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE", None),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False, True),
    **{name: (ANY,) for name in ("unk_token", "byte_fallback", "fuse_unk", "vocab", "merges")},
}
"""Of a BPE; values that change no id, where every byte has one."""
STEP_FIELDS = {
    "ByteLevel": {"type", "add_prefix_space", "trim_offsets", "use_regex"},
    "Split": {"type", "pattern", "behavior", "invert"},
    "Sequence": {"type", "pretokenizers"},
}
SETTINGS = {"add_prefix_space": (None, False), "add_eos_token": (None, False)}
"""Of tokenizer_config.json: what would put more into a text."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
PIECES = (
    *("a", "B", "é", "漢", "ſ", "1", "²", "٣", ".", "_", "-", "😀", "e\u0301", "\u00a0", "\u3000"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x00", "\x85", "\u200d", "\ufffd"),
    *("'s", "'LL", "12345", "?!"),
)
WORDS = ("The quick", "brown", "don't", "we'Ll", "1234567", "x = y", "...", "\n\n", "   ", "naïve")


class Refusal(Exception):
    """Fields that no tokenizer here has."""


def import_tokenizer(folder: Path) -> Tokenizer:
    """Raises DataError for what is damaged, ConfigError for what would give other ids."""
    path = folder / FILE
    try:
        text = storage.read_regular(path.resolve(), MOST_BYTES)
        whole = json.loads(text)
        settings = read_settings(folder)
        made = make_tokenizer(whole, settings, hf_config.read_end_tokens(folder))
    except FileNotFoundError:
        raise DataError(explain_missing(folder)) from None
    except (OSError, RecursionError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: not a tokenizer that gptlite can run ({error!r:.100})") from None
    except Refusal as refused:
        raise ConfigError(*(f"{path}: {problem}" for problem in refused.args)) from None
    check_against_library(made, text, whole, path)
    return made


def explain_missing(folder: Path) -> str:
    """What to do where there is no tokenizer.json."""
    others = ("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt")
    beside = [name for name in others if (folder / name).is_file()]
    alone = f"{' and '.join(beside)} alone do not say how text is cut; " if beside else ""
    return (
        f"{folder}: has no {FILE}; {alone}write one with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what older versions keep in files beside it."""
    settings = hf_config.read_mapping(folder / "tokenizer_config.json") or {}
    named = hf_config.read_mapping(folder / "special_tokens_map.json") or {}
    if not settings.get("tokenizer_class"):
        config = hf_config.read_mapping(folder / "config.json") or {}
        default = "GPT2Tokenizer" if config.get("model_type") == "gpt2" else None
        settings["tokenizer_class"] = config.get("tokenizer_class") or default
    return {**settings, **(named if "added_tokens_decoder" not in settings else {})}


def make_tokenizer(
    whole: dict[str, Any], settings: dict[str, Any], ends: hf_config.EndTokens
) -> Tokenizer:
    """Raises Refusal naming every field that would give other ids."""
    if problems := list(tokenizer_problems(whole, settings)):
        raise Refusal(*problems)
    model, pre_tokenizer = whole["model"], whole.get("pre_tokenizer")
    pattern = None if pre_tokenizer is None else pattern_of(pre_tokenizer)
    check_class(settings["tokenizer_class"], model, pre_tokenizer)
    specials = {token["content"]: token["id"] for token in whole["added_tokens"]}
    words = set(SYMBOLS).union("".join(pair) for pair in merged_pairs(model))
    for place, name in [*(("added_tokens", name) for name in specials), *named_specials(settings)]:
        if pattern is not None and name in words:
            raise Refusal(f"{place}: {name!r:.40} is a token of plain text, too")
        if name in model["vocab"] and (pattern is not None or len(name) > 1):
            specials.setdefault(name, model["vocab"][name])
    eot = end_of_text(specials, ends, settings)
    begin = begin_of(whole.get("post_processor"), specials)
    if settings.get("add_bos_token") and begin is None:
        raise Refusal("add_bos_token: true in tokenizer_config.json, but post_processor puts none")
    most = max(*specials.values(), *model["vocab"].values())
    stops = [i for i in ends.ids if 0 <= i <= most and (ends.explicit or i in specials.values())]
    others = {} if specials == {EOT: eot} else specials
    marks = Marks(others, tuple(i for i in stops if i != eot), begin)
    if pre_tokenizer is None:
        return char_tokenizer(model, eot, marks, str(settings.get("gptlite_unknown", "error")))
    if pattern is None or most < 256:  # a word of bytes is its bytes, however it is split
        return byte_tokenizer(model, eot, marks)
    return bpe_tokenizer(model, pattern, eot, marks)


def tokenizer_problems(whole: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """What changes a text or its ids in a way that no tokenizer here has."""
    model, normalizer = whole["model"], whole.get("normalizer")
    if model.get("type", "BPE") != "BPE":
        yield f"model.type: {model['type']!r:.40}; gptlite reads byte-level BPE"
        return
    yield from (f"{name}: not known to gptlite" for name in sorted(whole.keys() - FIELDS))
    for name, value in model.items():
        values = MODEL_FIELDS.get(name, ())
        if ANY not in values and value not in values:
            yield f"model.{name}: {value!r:.40} gives other ids than plain byte-level BPE"
    if normalizer is not None and normalizer.get("normalizers") != []:
        yield f"normalizer: {normalizer['type']!r:.40} changes texts before they are cut"
    decoder = whole.get("decoder") or {}
    for step in decoder.get("decoders", [decoder]):
        if step and step["type"] not in ("ByteLevel", "Fuse"):
            yield f"decoder: {step['type']!r:.40} makes other texts of ids"
    for name, harmless in SETTINGS.items():
        if settings.get(name) not in harmless:
            yield f"{name}: {settings[name]!r:.40} in tokenizer_config.json puts more into texts"
    own = {token["content"] for token in whole["added_tokens"]}
    later = list((settings.get("added_tokens_decoder") or {}).values())
    for token in [*whole["added_tokens"], *(t for t in later if t["content"] not in own)]:
        if not token.get("special"):
            yield f"added_tokens: {token['content']!r:.40} is not special: cut out of every text"


def pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regular expression that splits text into words; None if nothing does."""
    sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if sequence else [pre_tokenizer]
    for step in steps:
        if odd := sorted(step.keys() - STEP_FIELDS.get(step["type"], {"type"})):
            raise Refusal(f"pre_tokenizer.{odd[0]}: not known to gptlite in {step['type']!r:.40}")
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise Refusal(f"pre_tokenizer: {', '.join(kinds):.80}; gptlite reads Split and ByteLevel")
    last, words = steps[-1], steps[-1].get("use_regex", True)
    if last.get("add_prefix_space"):
        raise Refusal("pre_tokenizer.add_prefix_space: true puts a space before every text")
    if len(steps) == 1:
        return GPT2_PATTERN if words else None
    split = steps[0]
    regex = split["pattern"].get("Regex")
    if split.get("behavior") != "Isolated" or split.get("invert") or regex is None or words:
        raise Refusal("pre_tokenizer: splits words otherwise than by one regular expression")
    return str(regex)


def check_class(name: str | None, model: dict[str, Any], pre_tokenizer: Any) -> None:
    """Some classes of transformers make a pre_tokenizer of their own."""
    kind = (pre_tokenizer or {}).get("type")
    fits = {
        "PreTrainedTokenizer": True,
        "TokenizersBackend": True,
        "LlamaTokenizer": kind is not None,
        "GPT2Tokenizer": kind == "ByteLevel" and not model.get("ignore_merges"),
    }
    if name is not None and not fits.get(name.removesuffix("Fast"), False):
        raise Refusal(
            f"tokenizer_class: {name!r:.40} cuts words otherwise than this file; if the file is "
            "right, write PreTrainedTokenizerFast into tokenizer_config.json"
        )


def named_specials(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The special tokens that are named outside of tokenizer.json, and where."""
    named: list[tuple[str, Any]] = [(name, settings.get(name)) for name in NAMED]
    for place in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        more = settings.get(place) or []
        named += ((place, token) for token in (more.values() if isinstance(more, dict) else more))
    for place, token in named:
        if name := content_of(token):
            yield place, name


def content_of(token: Any) -> str | None:
    """A token's text, given alone or with how it is looked for."""
    return token["content"] if isinstance(token, dict) else token


def end_of_text(
    specials: dict[str, int], ends: hf_config.EndTokens, settings: dict[str, Any]
) -> int | None:
    """The token between documents: of those that end a text GPT-2's by name, else the first."""
    found = [i for i in ends.ids if i in specials.values()]
    plain = specials.get(EOT)
    if plain in found:
        return plain
    return found[0] if found else specials.get(content_of(settings.get("eos_token")) or EOT, plain)


def begin_of(processor: dict[str, Any] | None, specials: dict[str, int]) -> int | None:
    """The token that is put before every text; None where nothing is."""
    steps = [] if processor is None else processor.get("processors", [processor])
    templates = [step for step in steps if step["type"] != "ByteLevel"]
    if not templates:
        return None
    template = templates[0]
    if len(templates) > 1 or template["type"] != "TemplateProcessing":
        kinds = ", ".join(step["type"] for step in templates)
        raise Refusal(f"post_processor: {kinds:.40}; gptlite reads ByteLevel, TemplateProcessing")
    parts = [(*part.items(),) for part in template["single"]]
    names = [about["id"] for ((kind, about),) in parts if kind == "SpecialToken"]
    if [kind for ((kind, _),) in parts] not in (["Sequence"], ["SpecialToken", "Sequence"]):
        raise Refusal("post_processor.single: puts more around a text than one token before it")
    if not names:
        return None
    ids = template["special_tokens"][names[0]]["ids"]
    if len(ids) != 1 or ids[0] not in specials.values():
        raise Refusal(f"post_processor.special_tokens: {ids!r:.40} is not one special token")
    return int(ids[0])


def char_tokenizer(
    model: dict[str, Any], eot: int | None, marks: Marks, unknown: str
) -> CharTokenizer:
    vocab, sign = model["vocab"], model.get("unk_token")
    if model.get("merges"):
        raise Refusal("model.merges: none without a pre_tokenizer of bytes")
    if sign and model.get("fuse_unk"):
        raise Refusal("model.fuse_unk: true makes one of several characters that are not known")
    replacement = vocab.get(sign) if sign else None
    letters = {i: token for token, i in vocab.items() if i not in (eot, replacement)}
    if odd := [token for token in letters.values() if len(token) != 1]:
        raise Refusal(f"model.vocab: {odd[0]!r:.40} is not one character")
    if replacement is not None:
        unknown = "replace"
    characters = "".join(letters[i] for i in sorted(letters))
    saved = {"characters": characters, "eot": eot is not None, "unknown": unknown}
    made = CharTokenizer.from_json(saved | marks.to_json())
    gaps = sorted(letters) != list(range(len(letters)))
    if gaps or (made.eot, made.replacement) != (eot, replacement):
        raise Refusal("model.vocab: its ids are not characters, then unknown, then end of text")
    check_specials(made, replacement)
    return made


def byte_tokenizer(model: dict[str, Any], eot: int | None, marks: Marks) -> ByteTokenizer:
    letters = sorted((i, token) for token, i in model["vocab"].items() if i != eot)
    if letters != list(enumerate(SYMBOLS)) or model.get("merges") or eot not in (None, 256):
        raise Refusal(
            "model.vocab: not the 256 bytes in their order; others need a pre_tokenizer that "
            "splits words"
        )
    made = ByteTokenizer(eot=eot is not None, marks=marks)
    check_specials(made, None)
    return made


def check_specials(made: Tokenizer, replacement: int | None) -> None:
    """Bytes and characters have no other token beside what ends a text."""
    for name, number in made.specials.items():
        if number not in (made.eot, replacement):
            raise Refusal(f"added_tokens: {name!r:.40} is one too many for bytes or characters")


def bpe_tokenizer(
    model: dict[str, Any], pattern: str, eot: int | None, marks: Marks
) -> BPETokenizer:
    to_byte = {character: byte for byte, character in enumerate(SYMBOLS)}
    specials = marks.named_specials(EOT, eot)
    ranks: dict[bytes, int] = {}
    for token, rank in model["vocab"].items():
        if token not in specials:
            if not all(character in to_byte for character in token):
                raise Refusal(f"model.vocab: {token!r:.40} is no bytes, as pre_tokenizer makes")
            ranks[bytes(to_byte[character] for character in token)] = rank
    check_merges(model, ranks)
    saved: dict[str, Any] = {"kind": "bpe", "name": "imported", "pattern": pattern, "eot": eot}
    saved["ranks"] = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
    try:
        return BPETokenizer.from_json(saved | marks.to_json())
    except (ValueError, DataError) as error:
        raise Refusal(f"model.vocab, pre_tokenizer: {error}") from None


def merged_pairs(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """The merges of a file, whose pairs are lists or, in older ones, words with a space between."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def check_merges(model: dict[str, Any], ranks: dict[bytes, int]) -> None:
    """tiktoken merges two tokens wherever that makes a token, the lowest id first."""
    pairs, needed = merged_pairs(model), merges(ranks)
    ids = [model["vocab"].get("".join(pair), -1) for pair in pairs]
    if (
        ids != sorted(ids)
        or -1 in ids
        or {(show_token(a), show_token(b)) for a, b in needed} - set(pairs)
    ):
        raise Refusal("model.merges: not in the order of its ids, as tiktoken's are")
    made = {a + b for a, b in needed}
    whole = [token for token in ranks if len(token) > 1 and token not in made]
    if whole and not model.get("ignore_merges"):
        raise Refusal(
            f"model.ignore_merges: false, and no merge makes {show_token(whole[0])!r:.40}"
        )


def check_against_library(ours: Tokenizer, text: str, whole: dict[str, Any], path: Path) -> None:
    """Raises ConfigError where Hugging Face's own library gives other ids."""
    from tokenizers import Tokenizer as Theirs

    texts = [" ".join(WORDS), *map("".join, itertools.product(PIECES, WORDS))]
    texts += map("".join, itertools.product(PIECES, repeat=2))
    if isinstance(ours, CharTokenizer):
        texts = ["".join(c for c in words if c in ours.ids) for words in texts]
    first = [] if ours.marks.begin is None else [ours.marks.begin]
    try:
        theirs = Theirs.from_str(text)
        theirs.no_truncation()
        theirs.no_padding()
        if odd := [t for t in whole["added_tokens"] if theirs.token_to_id(t["content"]) != t["id"]]:
            raise Refusal(f"added_tokens: {odd[0]['content']!r:.40} has another id there")
        if isinstance(ours, BPETokenizer):
            check_words(ours.pattern, theirs, texts)
        for words in texts:
            if theirs.encode(words).ids != first + ours.encode(words):
                raise Refusal(f"model: makes other ids of {words!r:.40}")
    except Refusal as refused:
        raise ConfigError(f"{path}: {refused}") from None
    except BaseException as error:  # noqa: BLE001 - a panic of theirs is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = f"Hugging Face's tokenizers do not run it ({error!r:.100})"
        raise DataError(f"{path}: {why}") from None


def check_words(pattern: str, theirs: Any, texts: list[str]) -> None:
    """Raises Refusal where words are cut otherwise, whatever tokens this vocabulary has for them.

    Every word of theirs is a token of its own here, and so are any two that a pattern of ours
    might take together.
    """
    to_byte = {character: byte for byte, character in enumerate(SYMBOLS)}
    cut = [theirs.pre_tokenizer.pre_tokenize_str(words) for words in texts]
    rows = [[bytes(to_byte[c] for c in word) for word, _ in row] for row in cut]
    pairs = [a + b for row in rows for a, b in itertools.pairwise(row)]
    tokens = dict.fromkeys([bytes([byte]) for byte in range(256)])
    tokens |= dict.fromkeys(itertools.chain(*rows, pairs))
    ours = BPETokenizer("bpe", "words", pattern, {token: i for i, token in enumerate(tokens)}, None)
    for words, row in zip(texts, rows, strict=True):
        if [ours.token_bytes(i) for i in ours.encode(words)] != row:
            raise Refusal(f"pre_tokenizer: cuts {words!r:.40} otherwise")
