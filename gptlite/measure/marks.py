"""A picture of what fell in characters: a string for each row of numbers. No torch."""

from collections.abc import Sequence

FALLEN, KEPT, EMPTY = "×", "·", " "
"""It was there and fell; it was there and stayed; nothing was there that could fall."""


def marks_of(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> list[str]:
    return [
        "".join(EMPTY if b == 0 else KEPT if a else FALLEN for b, a in zip(x, y, strict=True))
        for x, y in zip(before, after, strict=True)
    ]


def marks_of_mask(fallen: Sequence[Sequence[bool]]) -> list[str]:
    return ["".join(FALLEN if fell else KEPT for fell in row) for row in fallen]
