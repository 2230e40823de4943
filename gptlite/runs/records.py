"""What a run leaves in its directory and on the terminal while it works; nothing is read back.

Of several ranks only the first one has records; the others have `NoRecords`, which says nothing.
"""

from collections.abc import Iterable
from typing import Any

from gptlite import storage
from gptlite.runs import checkpoint
from gptlite.runs.console import Console
from gptlite.runs.metrics import MetricsFile
from gptlite.runs.sinks import RunInfo, Sinks


class NoRecords:
    """Says and writes nothing."""

    def say(self, line: str) -> None:
        """A line that stays, on the terminal and in train.log."""

    def say_head(self, lines: Iterable[str], notes: Iterable[str], most: int) -> None:
        """Lines that stay, and notes as far as they fit into so many rows of the terminal."""

    def say_folded(self, line: str) -> None:
        """A line that stays, broken between words where the terminal is narrow."""

    def note(self, line: str) -> None:
        """A line for train.log, and for the terminal of who wants to see everything."""

    def advance(self) -> None:
        """One update more."""

    def set_total(self, total: int) -> None:
        """The run will end at this update."""

    def write_row(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        """A row of metrics."""

    def sync(self) -> None:
        """All rows are on the disk when this returns. Raises StorageError."""

    def keep_checkpoints(self, step: int, best_step: int | None) -> None:
        """Let `last` and `best` name their checkpoints; delete old ones. Raises StorageError."""

    def write_sample(self, step: int, text: str) -> None:
        """samples/step-N.txt, and shown."""

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json."""

    def log_failure(self, error: BaseException) -> None:
        """Why the run ended, in train.log."""

    def close(self) -> None:
        """No more rows, and no bar; lines may follow."""


class Records(NoRecords):
    """metrics.jsonl, train.log, samples, summary.json, the names of checkpoints, and sinks."""

    def __init__(self, info: RunInfo, total: int, start: int, verbose: bool = False) -> None:
        """`info.step` is the last row that stays; the run goes on at update `start`."""
        self.directory, self.keep_last = info.directory, info.run.train.keep_last
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", info.step)
        log = self.directory / "train.log"
        self.console = Console(log, info.run.log.progress, total, start, verbose)
        self.sinks = Sinks(info, self.console.say)

    def say(self, line: str) -> None:
        self.console.say(line)

    def say_head(self, lines: Iterable[str], notes: Iterable[str], most: int) -> None:
        self.console.say_head(lines, notes, most)

    def say_folded(self, line: str) -> None:
        self.console.say_folded(line)

    def note(self, line: str) -> None:
        self.console.note(line)

    def advance(self) -> None:
        self.console.advance()

    def set_total(self, total: int) -> None:
        self.console.set_total(total)

    def write_row(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        self.metrics.write(row)
        self.sinks.write(row)
        self.console.show_progress(step, row, val_loss)

    def sync(self) -> None:
        self.metrics.sync()

    def keep_checkpoints(self, step: int, best_step: int | None) -> None:
        checkpoint.write_pointer(self.directory, "last", step)
        if best_step == step:
            checkpoint.write_pointer(self.directory, "best", step)
        checkpoint.prune(self.directory, self.keep_last, best_step)

    def write_sample(self, step: int, text: str) -> None:
        storage.write_text(self.directory / "samples" / f"step-{step:08d}.txt", text + "\n")
        shown = f":\n{text}" if text.strip() else " is empty: the model ends the text at once"
        self.say(f"sample at step {step}{shown}")

    def write_summary(self, summary: dict[str, Any]) -> None:
        storage.write_json(self.directory / "summary.json", summary)

    def log_failure(self, error: BaseException) -> None:
        self.console.log_failure(error)

    def close(self) -> None:
        self.sinks.close()
        self.console.close()
