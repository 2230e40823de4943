"""What a run says while it works: metrics.jsonl, train.log and the line on the terminal.

metrics.jsonl is the truth: one object per line, flushed. A resumed run first cuts it back to its
step, so that each step is there once.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from gptlite.errors import StorageError
from gptlite.run_directory import write_text

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
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash cut short
        write_text(path, "".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        finite = {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in row.items()
        }
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None

    def close(self) -> None:
        self.file.close()


def wants_bar(progress: str, stream: TextIO) -> bool:
    """A bar only where someone can see it move."""
    if progress != "auto":
        return progress == "bar"
    plain = os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


class Console:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere; all lines go to train.log."""

    def __init__(self, log: Path | None, progress: str, total: int, start: int) -> None:
        self.log = log.open("a", encoding="utf-8") if log else None
        self.total = total
        shown = wants_bar(progress, sys.stderr)
        screen = shutil.get_terminal_size()  # some terminals say 0; this then says 80 x 24
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            disable=not shown,
            ncols=screen.columns,
            nrows=screen.lines,
            file=sys.stderr,
            bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt}{postfix} "
            "[{elapsed}, {remaining} left]",
        )
        self.started, self.start = time.perf_counter(), start
        self.said_at = -math.inf

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)

    def progress(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        """The numbers of now; without a bar a line, at every evaluation and else now and then."""
        parts = [f"loss {row['train/loss']:.3f}"]
        if val_loss is not None:
            parts.append(f"val {val_loss:.3f}")
        parts.append(f"{human(row['tokens_per_second'])} tok/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
            return
        now = time.perf_counter()
        if "val/loss" not in row and now - self.said_at < SECONDS_BETWEEN_LINES:
            return
        self.said_at, passed = now, now - self.started
        left = passed / max(1, step - self.start) * (self.total - step)
        self.say(f"step {step}/{self.total}  {'  '.join(parts)}  {clock(left)} left")

    def advance(self) -> None:
        self.bar.update(1)

    def close(self) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()


def human(number: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
