"""What a run measures while it works: its pace, and metrics.jsonl.

metrics.jsonl is the truth: one object per line, appended whole. A resumed run first cuts it
back to its step, so that each step is there once.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptlite import storage
from gptlite.errors import StorageError
from gptlite.runs.results import parse_row
from gptlite.storage import write_bytes


class Meter:
    """Tokens per second of training alone: time spent evaluating, sampling and saving is out."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.elapsed_seconds = 0.0
        self.tokens = 0
        self.window_tokens, self.window_seconds = 0, 0.0
        self.since: float | None = None

    def resume(self) -> None:
        if self.since is None:
            self.since = self.clock()

    def pause(self) -> None:
        if self.since is not None:
            passed = self.clock() - self.since
            self.elapsed_seconds += passed
            self.window_seconds += passed
            self.since = None

    def count(self, tokens: int) -> None:
        self.tokens += tokens
        self.window_tokens += tokens

    def rate(self) -> float:
        """Tokens per second since the last call."""
        running = self.since is not None
        self.pause()
        tokens, seconds = self.window_tokens, self.window_seconds
        self.window_tokens, self.window_seconds = 0, 0.0
        if running:
            self.resume()
        return tokens / seconds if seconds > 0 else 0.0


class MetricsFile:
    """Appends rows; a value that is not finite is written as null."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        write_bytes(path, b"".join(line + b"\n" for line in lines if is_kept(line, resumed_step)))

    def write(self, row: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(null_nonfinite(row)))

    def sync(self) -> None:
        """Before a checkpoint: who resumes there must find the rows until there."""
        try:
            storage.disk.sync(self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None


def null_nonfinite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is written: JSON has no word for what is not finite."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else None
        for key, value in row.items()
    }


def is_kept(line: bytes, resumed_step: int) -> bool:
    """Whether a line is the row of a step until there, and not what a crash cut short."""
    try:
        row = parse_row(line.decode())
    except UnicodeDecodeError:
        return False
    return row is not None and row["step"] <= resumed_step


def append_line(path: Path, line: str) -> None:
    try:
        storage.disk.append(path, line.encode(errors="replace") + b"\n")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
