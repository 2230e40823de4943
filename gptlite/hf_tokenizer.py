"""Hugging Face's tokenizer files ↔ our tokenizers, id for id. No torch.

A byte-level BPE is written as merges (each rank is the merge of two earlier tokens), bytes as a
BPE without merges, characters as a BPE without merges whose letters are all there is.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from gptlite import storage
from gptlite.errors import ConfigError, DataError
from gptlite.tokenizer import (
    EOT,
    GPT2_PATTERN,
    MOST_BYTES,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_characters,
)

POSSESSIVE_COUNT = re.compile(r"(\{[0-9]+(?:,[0-9]*)?\})\+")
"""Oniguruma, which Hugging Face's tokenizers run, reads `{1,3}+` as a repeat of repeats."""


def written(tokenizer: Tokenizer, context_length: int) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, by name."""
    special = {"eos_token": EOT, "bos_token": EOT} if tokenizer.eot is not None else {}
    unknown = getattr(tokenizer, "unknown", "error")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **special,
        **({"gptlite_unknown": unknown} if tokenizer.kind == "char" else {}),
    }
    return {"tokenizer.json": document(tokenizer), "tokenizer_config.json": config}


def document(tokenizer: Tokenizer) -> dict[str, Any]:
    eot = tokenizer.eot
    added = [] if eot is None else [{"id": eot, "content": EOT, "special": True, **PLAIN}]
    model: dict[str, Any] = {"type": "BPE", "fuse_unk": False, "byte_fallback": False}
    model |= {"unk_token": None, "ignore_merges": False, "merges": []}
    pre_tokenizer: dict[str, Any] | None = BYTES
    decoder: dict[str, Any] = BYTES
    if isinstance(tokenizer, BPETokenizer):
        by_rank = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
        model["vocab"] = {shown(token): rank for token, rank in by_rank}
        model["merges"] = [[shown(a), shown(b)] for a, b in merges(tokenizer.ranks)]
        model["ignore_merges"] = True  # a word that is a token is that token, as in tiktoken
        pattern = POSSESSIVE_COUNT.sub(r"\1", tokenizer.pattern)
        split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": pattern}}
        split |= {"behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, BYTES]}
    elif isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        if tokenizer.replacement is not None:
            model["unk_token"] = "\ufffd" if "\ufffd" not in vocabulary else "<|unknown|>"
            vocabulary[model["unk_token"]] = tokenizer.replacement
        model["vocab"], pre_tokenizer, decoder = vocabulary, None, {"type": "Fuse"}
    else:
        model["vocab"] = {character: byte for byte, character in enumerate(byte_characters())}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


SYMBOLS = byte_characters()


def shown(token: bytes) -> str:
    """A token as vocabulary files show it."""
    return "".join(SYMBOLS[byte] for byte in token)


def merges_of(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """The merges of a file, whose pairs are lists or, in older ones, words with a space between."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one is made of, in the order of ranks."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merged_below(token, ranks, rank)
            if len(parts) == 2:  # else no merge ever makes it: only `ignore_merges` finds it
                found.append((parts[0], parts[1]))
    return found


def merged_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """What merging by ranks below `limit` makes of a token's bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(pairs)
        if best >= limit:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def read(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises DataError, ConfigError."""
    path = folder / "tokenizer.json"
    try:
        whole = json.loads(storage.read_regular(path.resolve(), MOST_BYTES))
        return tokenizer_of(whole, unknown_policy(folder), str(path))
    except (OSError, RecursionError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer that gptlite can run ({error!r:.100})") from None


def unknown_policy(folder: Path) -> str:
    try:
        path = folder / "tokenizer_config.json"
        policy = json.loads(storage.read_regular(path.resolve(), MOST_BYTES))["gptlite_unknown"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "error"
    return str(policy)


def tokenizer_of(whole: dict[str, Any], unknown: str, place: str) -> Tokenizer:
    model = whole["model"]
    if model.get("type", "BPE") != "BPE" or whole.get("normalizer") is not None:
        raise ConfigError(f"{place}: gptlite reads byte-level BPE without a normalizer")
    eot = end_of_text(whole["added_tokens"])
    if whole.get("pre_tokenizer") is None:
        return characters_of(model, eot, unknown)
    pattern = pattern_of(whole["pre_tokenizer"], place)
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    ranks: dict[bytes, int] = {}
    for token, rank in model["vocab"].items():
        if rank != eot and all(character in to_byte for character in token):
            ranks[bytes(to_byte[character] for character in token)] = rank
    if pattern is None:
        if sorted(ranks.items()) != [(bytes([byte]), byte) for byte in range(256)]:
            raise ConfigError(f"{place}: a byte-level model without a pattern that splits words")
        return ByteTokenizer(eot=eot is not None)
    if eot is None:
        raise ConfigError(f"{place}: has no end-of-text token")
    if merges_of(model) != [(shown(a), shown(b)) for a, b in merges(ranks)]:
        raise ConfigError(f"{place}: its merges are not in the order of its ids, as tiktoken's are")
    saved: dict[str, Any] = {"kind": "bpe", "name": "imported", "pattern": pattern, "eot": eot}
    saved["ranks"] = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
    return BPETokenizer.from_json(saved)


def end_of_text(added: list[dict[str, Any]]) -> int | None:
    """The id of the one special token that a model of plain text has."""
    special = [token for token in added if token.get("special")]
    named = [token for token in special if token["content"] == EOT] or special
    return int(named[0]["id"]) if named else None


def characters_of(model: dict[str, Any], eot: int | None, unknown: str) -> CharTokenizer:
    if model.get("merges"):
        raise ValueError("merges of characters")
    replacement = model["vocab"].get(model["unk_token"]) if model.get("unk_token") else None
    letters = {
        rank: token for token, rank in model["vocab"].items() if rank not in (eot, replacement)
    }
    characters = "".join(letters[rank] for rank in range(len(letters)))
    if replacement is not None:
        unknown = "replace"
    saved = {"characters": characters, "eot": eot is not None, "unknown": unknown}
    made = CharTokenizer.from_json(saved)
    if (made.eot, made.replacement) != (eot, replacement):
        raise ValueError("ids in another order")
    return made


def pattern_of(pre_tokenizer: dict[str, Any], place: str) -> str | None:
    """The regular expression that splits text into words; None if nothing does."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *splits, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise ConfigError(f"{place}: gptlite reads byte-level BPE without a prefixed space")
    if not splits:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    split = splits[0]
    regex = split.get("pattern", {}).get("Regex")
    plain = split["type"] == "Split" and split.get("behavior") == "Isolated"
    if len(splits) > 1 or not plain or split.get("invert") or regex is None or last["use_regex"]:
        raise ConfigError(f"{place}: splits words in steps that gptlite has no pattern for")
    return str(regex)
