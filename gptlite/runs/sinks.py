"""Where the rows of metrics.jsonl also go, if asked: TensorBoard, Weights & Biases, trackio.

A sink sees what the file sees, once it is in the file. One that fails is named and left; training
goes on. Each package is imported only where it is asked for.
"""

import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gptlite.config.reader import dump
from gptlite.config.run import RunConfig
from gptlite.errors import MissingPackages
from gptlite.words import escape_controls


class RunInfo(NamedTuple):
    """What a sink needs to know of a run."""

    run: RunConfig
    directory: Path
    run_id: str
    step: int
    """Of the last row that stays, where a run goes on; else 0."""

    @property
    def config(self) -> dict[str, Any]:
        return self.run.model_dump(mode="json")


class Sink(Protocol):
    def write(self, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in tensorboard/ of the run directory."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        log_dir = str(info.directory / "tensorboard")
        self.writer = SummaryWriter(log_dir, purge_step=info.step + 1 if info.step else None)
        if not info.step:
            self.writer.add_text("config", f"```yaml\n{dump(info.run)}```")

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, int(row["step"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@contextmanager
def print_remarks() -> Iterator[None]:
    """What a package prints is a remark: on stderr, in plain letters. stdout is for results."""
    with redirect_stdout(io.StringIO()) as said:
        yield
    print(re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()), end="", file=sys.stderr)


class Board:
    """Weights & Biases, and trackio, which has the same words."""

    def __init__(self, module: Any, info: RunInfo, **more: Any) -> None:
        with print_remarks():
            self.run = module.init(
                project=info.run.log.project,
                name=info.directory.name,
                config=info.config,
                **more,
            )
        self.finish = self.run.finish

    def write(self, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        with print_remarks():
            self.finish()


class Trackio(Board):
    """Has a step of its own and renames a number of that name; knows runs by their names."""

    def __init__(self, info: RunInfo) -> None:
        import trackio

        super().__init__(trackio, info, resume="allow" if info.step else "never")
        self.finish = trackio.finish  # the run's own would be called once more at exit

    def write(self, row: Mapping[str, float]) -> None:
        rest = {name: value for name, value in row.items() if name != "step"}
        self.run.log(rest, step=int(row["step"]))


def make_wandb(info: RunInfo) -> Board:
    """Respects WANDB_MODE and all its other variables; a run that goes on keeps its page."""
    import wandb

    return Board(wandb, info, id=info.run_id, dir=str(info.directory), resume="allow")


SINKS: dict[str, Callable[[RunInfo], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": make_wandb,
    "trackio": Trackio,
}


def check_installed(names: tuple[str, ...]) -> None:
    """Raises UserError for each package that is not there, before anything is trained."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackages("log.sinks", *missing)


class Sinks:
    """Those that a run asks for; `say` tells of one that fails."""

    def __init__(self, info: RunInfo, say: Callable[[str], None]) -> None:
        self.say = say
        self.open: dict[str, Sink] = {}
        for name in info.run.log.sinks:
            self.guard(name, self.start, name, info)

    def start(self, name: str, info: RunInfo) -> None:
        self.open[name] = SINKS[name](info)

    def guard(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, training is not its business
            self.open.pop(name, None)
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.say(escape_controls(f"log.sinks: {name} failed and gets no more rows: {why:.200}"))

    def write(self, row: Mapping[str, Any]) -> None:
        """Give the finite numbers of a row to all."""
        numbers = {n: v for n, v in row.items() if v is not None and math.isfinite(v)}
        for name, sink in list(self.open.items()):
            self.guard(name, sink.write, numbers)

    def close(self) -> None:
        for name, sink in list(self.open.items()):
            self.guard(name, sink.close)
        self.open.clear()
