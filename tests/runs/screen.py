"""A terminal of some columns: what a reader sees of the bytes that a program has written to it."""

import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BAR = re.compile(r" *\d+% ")
PIECE = re.compile(r"\x1b\[(\d*)A|(.)", re.DOTALL)


class Screen:
    """Knows what tqdm uses: returns, new lines, and the way up."""

    def __init__(self, columns: int, text: str = "") -> None:
        self.columns = columns
        self.lines: list[str] = [""]
        self.row = self.column = 0
        self.passed: list[str] = []
        """Every state of a bar, which was then written over."""
        for piece in PIECE.finditer(text):
            up, character = piece.groups()
            if character is None:
                self.row -= int(up or 1)
            else:
                self.write(character)

    def write(self, character: str) -> None:
        line = self.lines[self.row]
        if character == "\r":
            if BAR.match(line):
                self.passed.append(line.rstrip())
            self.column = 0
        elif character == "\n" or self.column == self.columns:
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.lines):
                self.lines.append("")
            if character != "\n":
                self.write(character)
        else:
            begin = line[: self.column].ljust(self.column)
            self.lines[self.row] = begin + character + line[self.column + 1 :]
            self.column += 1

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n") + "\n"


class Written:
    text = ""


@contextmanager
def open_terminal(columns: int) -> Iterator[tuple[TextIO, Written]]:
    """A terminal of so many columns to write to; what was written is known afterwards."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    got: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                got.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    written = Written()
    try:
        with open(theirs, "w", encoding="utf-8") as stream:
            yield stream, written
    finally:
        reader.join()
        os.close(ours)
        written.text = b"".join(got).decode()
