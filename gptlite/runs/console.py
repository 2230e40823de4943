"""What a run says while it works: lines that stay, and how far it is.

A line stays, on the screen and in train.log: the head, evaluations, samples, the end. How far a run
is passes: in a bar on a terminal, which is gone at the end, elsewhere in a line now and then. It is
not in train.log, which is therefore the same with a bar and without.
"""

import math
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gptlite.errors import StorageError, UserError
from gptlite.runs.metrics import append_line
from gptlite.terminal import (
    columns_of,
    fold,
    format_duration,
    format_number,
    in_notebook,
    is_watched,
    wants_bar,
)
from gptlite.words import escape_controls

SECONDS_BETWEEN_LINES = 5.0
NARROWEST = 10
"""Columns of the bar itself; where less is left, a number beside it leaves first."""
BESIDE = len("100%") + 2
"""Columns of the percentage, and of the blanks on both sides of the bar."""
LEAVE_FIRST = ("rate", "val", "loss")
"""Numbers beside the bar, the least wanted first."""


class Console:
    """What is said goes to stderr and to train.log."""

    def __init__(
        self, log: Path | None, progress: str, total: int, start: int, verbose: bool = False
    ) -> None:
        self.log, self.verbose = log, verbose
        self.total, self.start, self.step = total, start, start
        self.numbers: dict[str, str] = {}
        """Losses and pace of the latest row, in words."""
        self.has_bar = wants_bar(progress, sys.stderr)
        self.bar: tqdm[Any] | None = None
        """From the first update on: before there is nothing to see in it."""
        self.started = time.perf_counter()
        self.shown_at = -math.inf

    def say(self, line: str) -> None:
        """A line that stays."""
        line = escape_controls(line, keep="\n\t")
        self.write_to_log(line)
        self.show(line)

    def say_head(self, lines: Iterable[str], notes: Iterable[str], most: int) -> None:
        """Lines that stay, and as many notes as fit with them into so many rows of the terminal;
        the other notes are for train.log."""
        for line in lines:
            most -= len(self.fold(line))
            self.say_folded(line)
        for line in notes:
            most -= len(self.fold(line))
            if most >= 0:
                self.say_folded(line)
            else:
                self.note(line)

    def say_folded(self, line: str) -> None:
        """A line that stays, broken between words where the terminal is narrow."""
        line = escape_controls(line)
        self.write_to_log(line)
        self.show("\n".join(self.fold(line)))

    def fold(self, line: str) -> list[str]:
        """The rows of the terminal that a line takes; elsewhere it is one."""
        if not is_watched(sys.stderr):
            return [line]
        return fold(line, indent=2, columns=columns_of(sys.stderr)).split("\n")

    def note(self, line: str) -> None:
        """A line for train.log, and for who wants to see everything."""
        if self.verbose:
            self.say(line)
        else:
            self.write_to_log(escape_controls(line, keep="\n\t"))

    def log_failure(self, error: BaseException) -> None:
        """Why a run ended, in train.log alone; of what was not foreseen, the place in the code."""
        foreseen = isinstance(error, UserError)
        text = str(error) if foreseen else "".join(traceback.format_exception(error))
        with suppress(StorageError):  # the disk may be why
            self.write_to_log(escape_controls(text, keep="\n"))

    def write_to_log(self, line: str) -> None:
        if self.log is not None:
            append_line(self.log, line)

    def show(self, line: str) -> None:
        """Above the bar, if there is one."""
        if self.bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)

    def show_progress(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        """The numbers of a row: in a line that stays if it is of an evaluation, else in passing."""
        loss = row["train/loss"]
        self.step = step
        self.numbers = {"loss": f"loss {math.nan if loss is None else loss:.3f}"}
        if val_loss is not None:
            self.numbers["val"] = f"val {val_loss:.3f}"
        self.numbers["rate"] = f"{format_number(row['tokens_per_second'])} tok/s"
        if self.bar is not None:
            self.bar.set_description_str(self.describe_progress(self.bar.ncols), refresh=False)
        line = "  ".join([f"step {step}/{self.total}", *self.numbers.values()])
        if step < self.total:
            line += f"  {self.time_left()}"
        if "val/loss" in row:
            self.say(line)
        elif not self.has_bar and self.is_time_to_show():
            self.show(line)

    def is_time_to_show(self) -> bool:
        """Whether the last line that passes is some time ago."""
        now = time.perf_counter()
        if now - self.shown_at < SECONDS_BETWEEN_LINES:
            return False
        self.shown_at = now
        return True

    def time_left(self) -> str:
        """At the pace until now, with all that is done between updates."""
        passed = time.perf_counter() - self.started
        left = passed / max(1, self.step - self.start) * (self.total - self.step)
        return f"{format_duration(left)} left"

    def advance(self) -> None:
        """One update more; the bar is drawn again if it is time to."""
        self.step += 1
        if not self.has_bar:
            return
        wide = None if in_notebook() else columns_of(sys.stderr)
        beside = self.describe_progress(wide)
        if self.bar is None:
            self.bar = tqdm(
                desc=beside,
                total=self.total,
                initial=self.step - 1,
                ncols=wide,
                leave=False,
                file=sys.stderr,
                bar_format="{percentage:3.0f}% {bar} {desc}",
            )
        self.bar.ncols = wide
        self.bar.set_description_str(beside, refresh=False)
        self.bar.update(1)

    def describe_progress(self, columns: int | None) -> str:
        """What stands beside the bar, as far as there is room for it on a line of so many."""
        count, left = f"{self.step}/{self.total}", self.time_left()
        numbers = dict(self.numbers)
        line = "  ".join([count, *numbers.values(), left])
        for name in LEAVE_FIRST:
            if columns is None or len(line) <= columns - BESIDE - NARROWEST:
                break
            numbers.pop(name, None)
            line = "  ".join([count, *numbers.values(), left])
        return line

    def set_total(self, total: int) -> None:
        self.total = total
        if self.bar is not None:
            self.bar.total = total

    def close(self) -> None:
        """The bar is gone; lines may follow."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.has_bar = None, False
