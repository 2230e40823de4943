"""What a run leaves in its directory and on the terminal while it works; nothing is read back.

Of several ranks only the first one has records; the others have `Unrecorded`, which says nothing.
"""

from typing import Any

from gptlite import storage
from gptlite.runs import checkpoint
from gptlite.runs.metrics import Console, MetricsFile
from gptlite.runs.sinks import Place, Sinks


class Unrecorded:
    """Says and writes nothing."""

    def say(self, line: str) -> None:
        """A line that stays, on the terminal and in train.log."""

    def advance(self) -> None:
        """One update more."""

    def row(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        """A row of metrics."""

    def sync(self) -> None:
        """All rows are on the disk when this returns. Raises StorageError."""

    def saved(self, step: int, best_step: int | None) -> None:
        """Let `last` and `best` name their checkpoints; delete old ones. Raises StorageError."""

    def sample(self, step: int, text: str) -> None:
        """samples/step-N.txt."""

    def summary(self, summary: dict[str, Any]) -> None:
        """summary.json."""

    def failed(self, error: BaseException) -> None:
        """Why the run ended, in train.log."""

    def close(self) -> None:
        """No more rows."""


class Records(Unrecorded):
    """metrics.jsonl, train.log, samples, summary.json, the names of checkpoints, and sinks."""

    def __init__(self, place: Place, total: int, start: int) -> None:
        """`place.step` is the last row that stays; the run goes on at update `start`."""
        self.directory, self.keep_last = place.directory, place.run.train.keep_last
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", place.step)
        log = self.directory / "train.log"
        self.console = Console(log, place.run.log.progress, total, start)
        self.sinks = Sinks(place, self.console.say)

    def say(self, line: str) -> None:
        self.console.say(line)

    def advance(self) -> None:
        self.console.advance()

    def row(self, step: int, row: dict[str, Any], val_loss: float | None) -> None:
        self.metrics.write(row)
        self.sinks.write(row)
        self.console.progress(step, row, val_loss)

    def sync(self) -> None:
        self.metrics.sync()

    def saved(self, step: int, best_step: int | None) -> None:
        checkpoint.write_pointer(self.directory, "last", step)
        if best_step == step:
            checkpoint.write_pointer(self.directory, "best", step)
        checkpoint.prune(self.directory, self.keep_last, best_step)

    def sample(self, step: int, text: str) -> None:
        storage.write_text(self.directory / "samples" / f"step-{step:08d}.txt", text + "\n")

    def summary(self, summary: dict[str, Any]) -> None:
        storage.write_json(self.directory / "summary.json", summary)

    def failed(self, error: BaseException) -> None:
        self.console.log_failure(error)

    def close(self) -> None:
        self.sinks.close()
        self.console.close()
