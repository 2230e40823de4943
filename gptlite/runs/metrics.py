"""What a run says while it works: metrics.jsonl, train.log and the line on the terminal.

metrics.jsonl is the truth: one object per line, appended whole. A resumed run first cuts it
back to its step, so that each step is there once.
"""

import json
import math
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gptlite import storage
from gptlite.errors import StorageError, UserError
from gptlite.runs.results import parse_row
from gptlite.storage import write_bytes
from gptlite.terminal import format_duration, format_number, in_notebook, wants_bar
from gptlite.words import escape_controls

SECONDS_BETWEEN_LINES = 5.0


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


class Console:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere; all lines go to train.log."""

    def __init__(self, log: Path | None, progress: str, total: int, start: int) -> None:
        self.log = log
        self.total = total
        shown = wants_bar(progress, sys.stderr)
        screen = shutil.get_terminal_size()  # some terminals say 0; this then says 80 x 24
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            disable=not shown,
            ncols=None if in_notebook() else screen.columns,
            nrows=screen.lines,
            file=sys.stderr,
            bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt}{postfix} "
            "[{elapsed}, {remaining} left]",
        )
        self.started = time.perf_counter()
        self.start = start
        self.said_at = -math.inf

    def say(self, line: str) -> None:
        """A line that stays."""
        line = escape_controls(line, keep="\n\t")
        if self.log is not None:
            append_line(self.log, line)
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)

    def log_failure(self, error: BaseException) -> None:
        """Why a run ended, in train.log alone; of what was not foreseen, the place in the code."""
        if self.log is not None:
            foreseen = isinstance(error, UserError)
            text = str(error) if foreseen else "".join(traceback.format_exception(error))
            with suppress(StorageError):  # the disk may be why
                append_line(self.log, escape_controls(text, keep="\n"))

    def show_progress(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        """The numbers of now; without a bar a line, at every evaluation and else now and then."""
        loss = row["train/loss"]
        parts = [f"loss {math.nan if loss is None else loss:.3f}"]
        if val_loss is not None:
            parts.append(f"val {val_loss:.3f}")
        parts.append(f"{format_number(row['tokens_per_second'])} tok/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
            return
        now = time.perf_counter()
        if "val/loss" not in row and now - self.said_at < SECONDS_BETWEEN_LINES:
            return
        self.said_at = now
        left = (now - self.started) / max(1, step - self.start) * (self.total - step)
        self.say(f"step {step}/{self.total}  {'  '.join(parts)}  {format_duration(left)} left")

    def advance(self) -> None:
        self.bar.update(1)

    def set_total(self, total: int) -> None:
        self.total = self.bar.total = total

    def close(self) -> None:
        self.bar.close()
