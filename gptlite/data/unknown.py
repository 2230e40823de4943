"""Characters that a tokenizer does not know: where they stand, and how much of a text they are."""

from collections import Counter
from pathlib import Path
from typing import Any

from gptlite.config.run import DataConfig
from gptlite.data import readers
from gptlite.data.tokenizers import CharTokenizer, Tokenizer, UnknownCharacter
from gptlite.errors import DataError
from gptlite.terminal import tell

WORTH_TELLING = 0.01
"""Share of a text's bytes."""
MOST_LOST = 0.5


def count_unknown(built: Tokenizer, text: str) -> dict[str, int]:
    """Characters of the text that have no token of their own, and their bytes; nothing if none."""
    if not isinstance(built, CharTokenizer):
        return {}
    unknown = set(text) - built.ids.keys()
    if not unknown:
        return {}
    times = {character: n for character, n in Counter(text).items() if character in unknown}
    n_bytes = sum(len(c.encode("utf-8", errors="replace")) * n for c, n in times.items())
    return {"unknown": sum(times.values()), "unknown_bytes": n_bytes}


def tell_lost(splits: dict[str, Any], source: str) -> None:
    """Say how much of a text its tokens lack. Raises DataError if that is most of it."""
    lost = sum(split.get("unknown_bytes", 0) for split in splits.values())
    whole = sum(split["bytes"] for split in splits.values())
    share = lost / max(1, whole)
    why = f"{source}: {share:.1%} of its bytes are characters that the vocabulary does not have"
    if share > MOST_LOST:
        raise DataError(f"data.source: {why}; it needs a model of its own alphabet, or of bytes")
    if share > WORTH_TELLING:
        tell(f"{why} (tokenizer.unknown says what stands for them)")


def error_with_place(unknown: UnknownCharacter, files: list[Path], data: DataConfig) -> DataError:
    """The same error with the place in the source where the first of these characters stands."""
    for file in files:
        find = place_in_lines if readers.is_plain(file) else place_in_records
        if place := find(file, unknown, data):
            return DataError(f"data.source: {file}{place} {unknown.why}")
    return DataError(f"data.source: {unknown}")  # the file has changed meanwhile


def place_in_lines(file: Path, unknown: UnknownCharacter, data: DataConfig) -> str:
    line = column = 1
    for text in readers.read_utf8(file):
        at = unknown.first_in(text)
        head = text[:at]
        if "\n" in head:
            line, column = line + head.count("\n"), len(head) - head.rindex("\n")
        else:
            column += len(head)
        if at is not None:
            return f":{line}:{column}: character {text[at]!r}"
    return ""


def place_in_records(file: Path, unknown: UnknownCharacter, data: DataConfig) -> str:
    document = place = 1
    for text, ends in readers.read_documents(file, data):
        at = unknown.first_in(text)
        if at is not None:
            return f": document {document}, position {place + at}: character {text[at]!r}"
        document, place = document + ends, 1 if ends else place + len(text)
    return ""
