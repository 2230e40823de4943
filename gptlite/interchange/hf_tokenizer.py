"""Our tokenizers → Hugging Face's files, id for id. No torch.

A byte-level BPE is written as merges (each rank is the merge of two earlier tokens), bytes as a
BPE without merges, characters as a BPE without merges whose letters are all there is. The merges
are found here, as `tokenizers` cannot read ranks, and transformers, which can, is no dependency.
"""

import math
import re
from typing import Any

from gptlite.data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, byte_characters

POSSESSIVE_COUNT = re.compile(r"(\{[0-9]+(?:,[0-9]*)?\})\+")
"""Oniguruma, which Hugging Face's tokenizers run, reads `{1,3}+` as a repeat of repeats."""
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SYMBOLS = byte_characters()


def make_files(
    tokenizer: Tokenizer, context_length: int, begin: int | None = None
) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, by name; `begin` stands before every text."""
    name_of = {number: name for name, number in tokenizer.specials.items()}
    special = {}
    if tokenizer.eot is not None:
        end = name_of[tokenizer.eot]
        special = {"eos_token": end, "pad_token": end, "padding_side": "left"}
    if (first := tokenizer.eot if begin is None else begin) is not None:
        special["bos_token"] = name_of[first]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token types
        "clean_up_tokenization_spaces": False,
        **special,
        **({"gptlite_unknown": tokenizer.unknown} if isinstance(tokenizer, CharTokenizer) else {}),
    }
    whole = tokenizer_json(tokenizer)
    if begin is not None:
        whole["post_processor"] = template(name_of[begin], begin)
    return {"tokenizer.json": whole, "tokenizer_config.json": config}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, without what stands before every text."""
    by_id = sorted(tokenizer.specials.items(), key=lambda item: item[1])
    model: dict[str, Any] = {"type": "BPE", "fuse_unk": False, "byte_fallback": False}
    model |= {"unk_token": None, "ignore_merges": False, "merges": []}
    pre_tokenizer: dict[str, Any] | None = BYTES
    decoder: dict[str, Any] = BYTES
    if isinstance(tokenizer, BPETokenizer):
        by_rank = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
        model["vocab"] = {show_token(token): rank for token, rank in by_rank}
        model["merges"] = [[show_token(a), show_token(b)] for a, b in merges(tokenizer.ranks)]
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
        model["vocab"] = vocabulary
        pre_tokenizer = None
        decoder = {"type": "Fuse"}
    else:
        model["vocab"] = {character: byte for byte, character in enumerate(SYMBOLS)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **PLAIN} for name, i in by_id],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def template(name: str, number: int) -> dict[str, Any]:
    """What puts a special token before every text."""

    def special(row: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": row}}

    def text(which: str, row: int) -> dict[str, Any]:
        return {"Sequence": {"id": which, "type_id": row}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def show_token(token: bytes) -> str:
    """A token as vocabulary files show it."""
    return "".join(SYMBOLS[byte] for byte in token)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one is made of, in the order of ranks."""
    found = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = merged_parts(token, ranks)
            if len(parts) == 2:  # else no merge ever makes it: only `ignore_merges` finds it
                found.append((parts[0], parts[1]))
    return found


def merged_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What merging makes of a token's bytes before it makes the token itself."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(pairs)
        if best == math.inf:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
