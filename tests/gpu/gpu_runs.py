"""What the checks of gpu_check.py share: where they run, what they train, how they say no."""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptlite.config.reader import validate
from gptlite.config.run import RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.train import Trainer
from gptlite.data.prepare import prepare
from gptlite.planning import auto

Row = tuple[str, ...]
Steps = Generator[Row, None, str]
"""A check: the rows of its table, the names of the columns first; then what was found, in words."""
RECIPE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256, "bias": False}
"""nanoGPT's 10.65 M for tinyshakespeare."""
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024, "bias": False}
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "bias": False}


class Failed(Exception):
    """What a check found that must not be."""


class Skipped(Exception):
    """Why a check says nothing here."""


class Place(NamedTuple):
    """Where a check runs, and what it may use."""

    name: str
    """Of the check."""
    device: str
    small: bool
    """In a reduced size, to try the script itself."""
    text: Path | None
    """tinyshakespeare, if it is at hand."""
    folder: Path
    """For its own files; the checks of a run share it, so text is tokenized once."""
    ends_at: float
    """When its time is over, by time.monotonic()."""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def sizes(self, model: dict[str, Any]) -> dict[str, Any]:
        return TINY if self.small else model

    def lacks_compiler(self) -> str | None:
        return auto.missing_to_compile(torch.device(self.device))


def describe_run(place: Place, **sections: Any) -> RunConfig:
    """A run on the documentation of this Python by bytes, unless a section says otherwise."""
    plain = {
        "device": place.device,
        "data": {"source": "python-docs", "cache_dir": str(place.folder / "cache")},
        "tokenizer": {"kind": "byte"},
        "optim": {"warmup_steps": 0},
        "sample": {"max_new_tokens": 1},
    }
    return validate(Document({**plain, **sections}))


def resolve_run(run: RunConfig) -> RunConfig:
    """The run with every `auto` replaced."""
    files = prepare(run)
    n_rows = files.rows("train", run.model.context_length).n_rows
    return auto.resolve_run(run, vocab_size=files.meta["vocab_size"], n_rows=n_rows)[0]


def make_trainer(run: RunConfig) -> Trainer:
    """As `gptlite train` makes it."""
    files = prepare(run)
    rows = files.rows("train", run.model.context_length)
    return Trainer(resolve_run(run), rows, files.meta["vocab_size"])


def tokens_per_second(trainer: Trainer, n: int, warm: int = 3) -> float:
    """Of n updates, batches and checks included, after some that do not count."""
    updates = trainer.updates(trainer.max_steps)
    for _ in range(warm):
        next(updates)
    began, tokens = time.perf_counter(), 0
    for _ in range(n):
        tokens += next(updates).targets  # each update reads its loss, so the device has finished
    return tokens / (time.perf_counter() - began)


def forget_graphs() -> None:
    """Free what earlier models left on the device, and every graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_graphs() -> tuple[int, int]:
    """Graphs that were compiled since `forget_graphs`, and breaks between them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def relative_difference(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-12)
