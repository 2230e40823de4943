"""Text ↔ token ids. Four kinds behind one protocol; each is one JSON document that travels.

`<|endoftext|>` written in a text stays text: the end-of-text id is only ever put between documents.
Ids decode to bytes, so a text decodes exactly however its tokens are cut.
"""

import base64
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import tiktoken
from numpy.typing import NDArray

from gptlite import storage
from gptlite.config.run import TokenizerConfig
from gptlite.data import bpe
from gptlite.data.marks import NO_MARKS, Marks
from gptlite.errors import ConfigError, DataError
from gptlite.words import did_you_mean

UNKNOWN = get_args(TokenizerConfig.model_fields["unknown"].annotation)
EOT = "<|endoftext|>"
PIECE = 1 << 16
MOST_TOKENS = 1 << 21
MOST_BYTES = 1 << 27
"""Of a tokenizer's file."""
MOST_PATTERN = 4096
PROBE = "It's 12 o'clock,\n\n  café\t漢字 😀... \r\n_x  "
"""A pattern that is none, or leaves text out, shows here."""
DOWNLOAD_SECONDS = 8.0

# GPT-2's split into words, with possessive repeats so that long runs cost no backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same words in half the time: one group of all that never looks ahead, without possessive
# repeats, runs as an automaton, which does not backtrack either.
GPT2_GROUPED = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"


class UnknownCharacter(ConfigError):
    """A character that a vocabulary lacks, in a text that may be a piece of a larger one."""

    def __init__(self, character: str, position: int, known: Set[str]) -> None:
        self.known = known
        self.why = (
            f"is not in the vocabulary of {len(known)} characters; leave it out, or train with "
            "tokenizer.unknown: replace (or kind: byte)"
        )
        super().__init__(f"character {character!r} at position {position} {self.why}")

    def first_in(self, text: str) -> int | None:
        """Where the first such character of a text stands."""
        return min((text.index(one) for one in set(text) - self.known), default=None)


class Tokenizer(Protocol):
    marks: Marks
    specials: dict[str, int]
    """Every token that no text has, by name."""

    @property
    def kind(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot(self) -> int | None:
        """Id of the end-of-text token, if there is one."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> NDArray[Any]:
        """The same ids, made without a list; for a piece of `cut_pieces`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one id; none for the end-of-text token."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


class Decoder(ABC):
    """What all tokenizers do in the same way."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


def token_lengths(tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of every id."""
    return [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's document: equal digests mean equal ids."""
    text = json.dumps(tokenizer.to_json(), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cut_pieces(text: str, *, final: bool) -> tuple[list[str], str]:
    """Pieces to encode one by one, and the rest that waits for more text.

    A piece ends before a single space between two visible characters: in every pattern used here
    a token begins there, so pieces encode as the whole would. A stretch of 64 Ki characters without
    such a place is cut all the same: tiktoken cannot take a million spaces (tiktoken issue 15).
    Where text is cut depends on the text alone, never on how it was read.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE + 1:
        end = text.rfind(" ", start + 1, start + PIECE + 1)
        while end > 0 and (text[end - 1].isspace() or text[end + 1].isspace()):
            end = text.rfind(" ", start + 1, end)
        end = end if end > 0 else start + PIECE
        pieces.append(text[start:end])
        start = end
    rest = text[start:]
    if final and rest:
        return [*pieces, rest], ""
    return pieces, rest


class ByteTokenizer(Decoder):
    kind = "byte"

    def __init__(self, *, eot: bool, marks: Marks = NO_MARKS) -> None:
        self.eot, self.marks = 256 if eot else None, marks
        self.specials = marks.named_specials(EOT, self.eot)
        self.vocab_size = 256 + eot

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == self.eot else bytes([token])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "eot": self.eot is not None, **self.marks.to_json()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "ByteTokenizer":
        return cls(eot=require_one_of(saved["eot"], True, False), marks=Marks.from_json(saved))


class CharTokenizer(Decoder):
    kind = "char"

    def __init__(
        self, characters: str, *, eot: bool, unknown: str, marks: Marks = NO_MARKS
    ) -> None:
        self.characters, self.unknown = characters, unknown
        self.marks = marks
        self.ids = {character: i for i, character in enumerate(characters)}
        self.replacement = len(characters) if unknown == "replace" else None
        size = len(characters) + (self.replacement is not None)
        self.eot = size if eot else None
        self.specials = marks.named_specials(EOT, self.eot)
        self.vocab_size = size + eot

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            return list(self.encode_around_unknown(text))

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """Id by code point; -1 where there is none."""
        points = [ord(character) for character in self.characters]
        table = np.full(max(points, default=0) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def encode_array(self, text: str) -> NDArray[Any]:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        return np.array(self.encode(text)) if (ids < 0).any() else ids

    def encode_around_unknown(self, text: str) -> Iterator[int]:
        for at, character in enumerate(text):
            if character in self.ids:
                yield self.ids[character]
            elif self.unknown == "error":
                raise UnknownCharacter(character, at + 1, self.ids.keys())
            elif self.replacement is not None:
                yield self.replacement

    def token_bytes(self, token: int) -> bytes:
        if token == self.eot:
            return b""
        return ("\ufffd" if token == self.replacement else self.characters[token]).encode()

    def to_json(self) -> dict[str, Any]:
        named = {"kind": self.kind, "characters": self.characters, "unknown": self.unknown}
        return {**named, "eot": self.eot is not None, **self.marks.to_json()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "CharTokenizer":
        characters, unknown = saved["characters"], require_one_of(saved["unknown"], *UNKNOWN)
        if not isinstance(characters, str) or len(characters) != len(set(characters)):
            raise ValueError("characters are not a text of distinct ones")
        characters.encode()  # half a surrogate pair could never be written out
        eot = require_one_of(saved["eot"], True, False)
        return cls(characters, eot=eot, unknown=unknown, marks=Marks.from_json(saved))


class BPETokenizer(Decoder):
    """A byte-level BPE run by tiktoken, trained here or one of OpenAI's."""

    def __init__(
        self,
        kind: str,
        name: str,
        pattern: str,
        ranks: dict[bytes, int],
        eot: int | None,
        marks: Marks = NO_MARKS,
    ) -> None:
        self.kind, self.name = kind, name
        self.pattern, self.ranks = pattern, ranks
        self.eot, self.marks = eot, marks
        self.specials = marks.named_specials(EOT, eot)
        self.vocab_size = max(*self.specials.values(), *ranks.values()) + 1
        self.local = threading.local()

    @property
    def encoding(self) -> tiktoken.Encoding:
        """One for each thread: two that share its regular expression can be slower than one."""
        made: tiktoken.Encoding | None = getattr(self.local, "encoding", None)
        if made is None:
            made = tiktoken.Encoding(
                self.name,
                pat_str=GPT2_GROUPED if self.pattern == GPT2_PATTERN else self.pattern,
                mergeable_ranks=self.ranks,
                special_tokens=self.specials,
            )
            self.local.encoding = made
        return made

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    def encode(self, text: str) -> list[int]:
        pieces, _ = cut_pieces(text, final=True)
        try:
            return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]
        except BaseException as error:  # noqa: BLE001 - a panic of tiktoken is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise DataError("tokenizer: its pattern cannot split this text") from None

    def encode_array(self, text: str) -> NDArray[Any]:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair; encode_ordinary mends it
            return np.array(self.encoding.encode_ordinary(text))

    def token_bytes(self, token: int) -> bytes:
        return self.tokens.get(token, b"")  # some encodings leave numbers unused

    def to_json(self) -> dict[str, Any]:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.ranks.items()}
        names = {"kind": self.kind, "name": self.name, "pattern": self.pattern}
        return {**names, "eot": self.eot, "ranks": ranks, **self.marks.to_json()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "BPETokenizer":
        ranks = {base64.b64decode(token): rank for token, rank in saved["ranks"].items()}
        eot, marks = saved["eot"], Marks.from_json(saved)
        ids = [*ranks.values(), *marks.named_specials(EOT, eot).values()]
        numbers = all(type(i) is int and 0 <= i < MOST_TOKENS for i in ids)
        if not numbers or len(set(ids)) < len(ids):
            raise ValueError(f"ids are not distinct numbers below {MOST_TOKENS}")
        if not all(bytes([byte]) in ranks for byte in range(256)) or b"" in ranks:
            raise ValueError("not every byte has an id of its own")
        if eot not in (None, *ids[len(ranks) :]):
            raise ValueError("its end-of-text token has no name")
        made = cls(saved["kind"], saved["name"], saved["pattern"], ranks, eot, marks)
        if len(made.pattern) > MOST_PATTERN or made.decode(made.encode(PROBE)) != PROBE:
            raise ValueError("its pattern loses text")
        return made


def require_one_of(value: Any, *values: Any) -> Any:
    if value not in values or type(value) not in map(type, values):
        raise ValueError(f"{value!r} is none of {values}")
    return value


TOKENIZERS: dict[str, Callable[[dict[str, Any]], Tokenizer]] = {
    "byte": ByteTokenizer.from_json,
    "char": CharTokenizer.from_json,
    "bpe": BPETokenizer.from_json,
    "tiktoken": BPETokenizer.from_json,
}


def from_json(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer a document describes; DataError if it describes none."""
    try:
        return TOKENIZERS[saved["kind"]](saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a tokenizer ({error!r:.200})") from None


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer's sealed file; DataError if it is damaged, or none."""
    try:
        return from_json(storage.unseal(storage.read_regular(path, MOST_BYTES)))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def from_config(
    config: TokenizerConfig, *, eot: bool, characters: Iterable[str], texts: Iterable[str]
) -> Tokenizer:
    """The tokenizer a config asks for.

    `characters` are those of the whole text, `texts` the training text in pieces; `eot` says that
    documents must be told apart. Only the kinds that learn look at either.
    """
    if config.kind == "byte":
        return ByteTokenizer(eot=eot)
    if config.kind == "char":
        return CharTokenizer("".join(sorted(characters)), eot=eot, unknown=config.unknown)
    if config.kind == "bpe":
        return train_bpe(texts, config.vocab_size)
    return load_pretrained(config.name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE with at most `vocab_size` tokens, learned by Hugging Face's `tokenizers`.

    Its merges are monotone, so vocabulary ids are tiktoken ranks and both give the same ids.
    """
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    by_rank = sorted(bpe.learn_vocabulary(texts, vocab_size - 1).items(), key=lambda item: item[1])
    ranks = {bytes(to_byte[c] for c in token): rank for token, rank in by_rank}
    return BPETokenizer("bpe", "bpe", GPT2_PATTERN, ranks, eot=len(ranks))


def byte_characters() -> Sequence[str]:
    """The visible character that stands for each byte in GPT-2's vocabulary files."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def load_pretrained(name: str) -> BPETokenizer:
    """One of tiktoken's encodings; ConfigError when there is none or it cannot be had in time."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        has = f"tiktoken has {', '.join(known)}{did_you_mean(name, known)}"
        raise ConfigError(f"tokenizer.name: no encoding {name!r}; {has}")
    got: list[tiktoken.Encoding] = []
    failed: list[BaseException] = []

    def load() -> None:
        try:
            got.append(tiktoken.get_encoding(name))
        except BaseException as error:  # noqa: BLE001 - reported below, in the caller's thread
            failed.append(error)

    # tiktoken downloads without a time-out; a thread can at least be left behind.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not got:
        why = type(failed[0]).__name__ if failed else f"no answer in {DOWNLOAD_SECONDS:.0f} s"
        raise ConfigError(
            f"tokenizer.name: the vocabulary of {name!r} is not cached and could not be fetched "
            f"({why}); set TIKTOKEN_CACHE_DIR to a folder that has it, connect once, or choose "
            "tokenizer.kind bpe, char or byte"
        )
    encoding = got[0]
    if encoding.eot_token is None:
        raise ConfigError(f"tokenizer.name: {name!r} has no end-of-text token")
    return BPETokenizer(
        "tiktoken", name, encoding._pat_str, encoding._mergeable_ranks, encoding.eot_token
    )
