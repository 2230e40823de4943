"""Our tokenizers → the fields of a GGUF file from which llama.cpp makes the same ids. No torch.

llama.cpp knows the ways to cut a text into words by name, not by their regular expressions, and
its byte-level BPE takes token 11 for the end of a text where a file names none.
"""

from typing import Any, NamedTuple

from gptlite.data.tokenizers import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
)
from gptlite.errors import ConfigError
from gptlite.interchange.hf_tokenizer import SYMBOLS, merges, show_token

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    GPT2_PATTERN: "gpt-2",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}": "qwen2",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
}
"""Regular expression → llama.cpp's name. tiktoken's later ones end otherwise than Llama 3's."""
WHOLE_WORDS = ("llama-bpe",)
"""Where a word that is a token is that token, whatever its merges say."""
NO_MERGES = ["<|none|> <|none|>"]
"""Of tokens that there are not: a list of merges must be there, and not empty."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""After each of them generation stops."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


class Vocabulary(NamedTuple):
    """`tokenizer.ggml.*` of a file."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str]
    unknown: int | None
    ends: list[int]
    """At least one, but where llama.cpp needs none."""


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Raises ConfigError where llama.cpp would make other ids."""
    if isinstance(tokenizer, BPETokenizer):
        made = words(tokenizer)
    elif isinstance(tokenizer, CharTokenizer):
        made = characters(tokenizer)
    else:
        made = Vocabulary("gpt2", "gpt-2", [*SYMBOLS], [NORMAL] * 256, NO_MERGES, None, [255])
    return with_specials(made, tokenizer)


def words(tokenizer: BPETokenizer) -> Vocabulary:
    """Byte-level BPE. Byte 255 is in no text, so where nothing else ends one it does no harm."""
    pre = PRE_TOKENIZERS.get(tokenizer.pattern)
    if pre is None:
        raise ConfigError(
            f"tokenizer: {tokenizer.name} cuts words in a way that llama.cpp has no name for; "
            "--to hf exports it, and so does --to gguf with tokenizer.kind bpe or byte"
        )
    pairs = merges(tokenizer.ranks)
    made = {a + b for a, b in pairs}
    whole = [token for token in tokenizer.ranks if len(token) > 1 and token not in made]
    if whole and pre not in WHOLE_WORDS:
        raise ConfigError(
            f"tokenizer: no merge makes {show_token(whole[0])!r}, so llama.cpp would not find it; "
            "--to hf exports it"
        )
    tokens = [f"<|unused {i}|>" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * len(tokens)
    for token, rank in tokenizer.ranks.items():
        tokens[rank], types[rank] = show_token(token), NORMAL
    shown = [f"{show_token(a)} {show_token(b)}" for a, b in pairs]
    return Vocabulary(
        "gpt2", pre, tokens, types, shown or NO_MERGES, None, [tokenizer.ranks[b"\xff"]]
    )


def characters(tokenizer: CharTokenizer) -> Vocabulary:
    """With an end of text each character is looked for as it is, and the others are left out;
    without one llama.cpp has only its vocabulary of bytes that needs none, RWKV's."""
    replaces = tokenizer.replacement is not None
    if tokenizer.eot is not None:
        sign = "\ufffd" if "\ufffd" not in tokenizer.ids else "<|unknown|>"
        tokens = [*tokenizer.characters, *[sign] * replaces]
        return Vocabulary(
            "gpt2", "gpt-2", tokens, [USER_DEFINED] * len(tokens), NO_MERGES, None, []
        )
    if not tokenizer.characters.isascii():
        odd = next(c for c in tokenizer.characters if not c.isascii())
        raise ConfigError(
            f"tokenizer: llama.cpp has no vocabulary of characters such as {odd!r} without an "
            "end-of-text token; --to hf exports it, and so does --to gguf with tokenizer.kind "
            "bpe or byte"
        )
    shown = [c if c.isprintable() and c != "\\" else f"\\x{ord(c):02x}" for c in tokenizer.ids]
    shown += ["\\xff"] * replaces
    return Vocabulary("rwkv", None, shown, [NORMAL] * len(shown), [], tokenizer.replacement, [])


def with_specials(made: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """A vocabulary with the tokens that no text has, and those that end one."""
    tokens, types = [*made.tokens], [*made.types]
    more = tokenizer.vocab_size - len(tokens)
    tokens, types = tokens + [""] * more, types + [UNUSED] * more
    for name, number in tokenizer.specials.items():
        tokens[number], types[number] = name, CONTROL
    ends = [i for i in (tokenizer.eot, *tokenizer.marks.ends) if i is not None]
    return made._replace(tokens=tokens, types=types, ends=ends or made.ends)


def vocabulary_fields(made: Vocabulary, begin: int | None) -> dict[str, Any]:
    """By name, without `tokenizer.ggml.`; `begin` stands before every text."""
    named = dict(zip(ENDS, made.ends, strict=False))
    first = begin if begin is not None else next(iter(made.ends), None)
    others = {"bos_token_id": first, "unknown_token_id": made.unknown, "pre": made.pre}
    return {
        "model": made.model,
        "tokens": made.tokens,
        "token_type": made.types,
        "merges": made.merges,
        "add_bos_token": begin is not None,
        "add_eos_token": False,
        **named,
        **{name: value for name, value in others.items() if value is not None},
    }
