"""`gptlite train --data my.txt`: a config for one's own text, from its size and the time there is.

Every choice is a Choice with its reason; together they are a YAML file that can be kept, changed
and run again. Speed is measured on this machine, with the text itself, before choosing a model.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from gptlite import auto, readers, run_directory, sources, storage
from gptlite.config import DataConfig, RunConfig
from gptlite.config_reader import Dumper, merge, read_layers, validate
from gptlite.metrics import human, wants_bar
from gptlite.model import GPT
from gptlite.plan import seconds_per_update
from gptlite.prepare import prepare
from gptlite.strict_yaml import Document

SURVEYED = 1 << 24
"""Characters that are looked at; of a longer text, its beginning."""
FEWEST_NAMES, LONGEST_NAME = 200, 40
"""Lines, and characters of a line, from which a list of names is known."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 300, 1 << 14
TOKENS_PER_PARAMETER = 4
MOST_EPOCHS = 60
LADDER = (
    *((2, 64, 64), (4, 96, 64), (4, 128, 128), (6, 192, 128), (6, 256, 256), (8, 384, 256)),
    *((8, 512, 512), (12, 768, 1024)),
)
"""(n_layer, n_embd, context_length), the smallest model first."""
TOKENS_PER_UPDATE = 2048
RATES = (
    (13, 0.0, "in runs as short as this dropout costs up to about 13"),
    (40, 0.1, "the best rate of short runs at about 20"),
    (math.inf, 0.2, "the best rate of short runs at about 60"),
)
"""Up to so many epochs, the rate, and why: docs/dropout-study.md, section 1."""
LOOKS = 10
EVALUATION_SHARE, UPDATE_PER_EVALUATION = 0.1, 3
"""Of the training time; and how much longer an update of a batch takes than evaluating it."""
TRAINING_SHARE = 0.75
"""Of the time; the rest goes to evaluations, samples and saving."""


class Choice(NamedTuple):
    key: str
    value: Any
    reason: str


class Survey(NamedTuple):
    """What a look at a text finds."""

    n_bytes: int
    n_distinct: int
    """Different characters."""
    longest_line: int | None
    """In characters, where each line is a word or a name by itself; else None."""


def survey(data: DataConfig) -> Survey:
    """Raises DataError, as reading the text does."""
    files = sources.locate(validate(Document({"data": data.model_dump()}), to_train=False))
    lines = DataConfig(**{**data.model_dump(), "layout": "documents"})
    characters: set[str] = set()
    seen = n_lines = spaced = longest = 0
    for text, ends in (chunk for file in files for chunk in readers.read_file(file, lines)):
        characters.update(text)
        seen += len(text.encode("utf-8", errors="replace")) + ends
        n_lines += ends
        spaced += " " in text.strip()
        longest = max(longest, len(text))
        if seen > SURVEYED:
            break
    on_disk = sum(file.stat().st_size for file in files)
    names = n_lines >= FEWEST_NAMES and longest <= LONGEST_NAME and spaced < 0.2 * n_lines
    n_bytes = max(on_disk, seen) if seen > SURVEYED else seen
    return Survey(n_bytes, len(characters) + 1, longest if names else None)


def of_text(found: Survey) -> Iterator[Choice]:
    """How a text is cut into tokens."""
    if found.longest_line is not None:
        yield Choice("data.layout", "documents", "lines of a word each: every line by itself")
        yield Choice("tokenizer.kind", "char", f"words of {found.n_distinct} different letters")
        return
    nearest = 1 << round(math.log2(max(1, found.n_bytes)) / 2)
    vocabulary = min(LARGEST_VOCABULARY, max(SMALLEST_VOCABULARY, nearest))
    yield Choice("tokenizer.kind", "bpe", "fewer bits per byte than characters, at any size")
    yield Choice("tokenizer.vocab_size", vocabulary, "about the square root of the bytes")


def of_model(size: tuple[int, int, int], longest_line: int | None) -> dict[str, Any]:
    """The model of a rung of the ladder; it never needs to see more than a whole line."""
    n_layer, n_embd, context = size
    context = context if longest_line is None else min(context, longest_line + 1)
    return {
        "n_layer": n_layer,
        "n_head": n_embd // 32,
        "n_embd": n_embd,
        "context_length": context,
        "position": "rope",
        "norm": "rmsnorm",
        "mlp": "relu2",
        "bias": False,
        "qk_norm": True,
    }


class Trial(NamedTuple):
    """A model that was timed on this text and machine."""

    model: dict[str, Any]
    n_parameters: int
    seconds: float
    """Of an update."""
    batch_size: int
    n_rows: int
    n_val_rows: int
    steps: int
    """That fit into the time."""

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * int(self.model["context_length"])


def timed(values: dict[str, Any], model: dict[str, Any], seconds: float) -> Trial:
    """How many updates of a model fit into `seconds`, by doing some."""
    batch_size = max(8, TOKENS_PER_UPDATE // model["context_length"])
    train = {"max_steps": 1, "batch_size": batch_size}
    optim = {"warmup_steps": 0}
    probe = validate(Document({**values, "model": model, "train": train, "optim": optim}))
    files = prepare(probe)
    rows = files.rows("train", model["context_length"])
    vocab_size = files.meta["vocab_size"]
    run, _ = auto.resolve(probe, vocab_size=vocab_size, n_rows=rows.n_rows)
    network = GPT.of_run(run, vocab_size)
    each = seconds_per_update(run, network, rows)
    n_parameters = run.model.n_parameters(vocab_size)
    steps = max(20, int(seconds / each))
    n_val_rows = files.rows("val", model["context_length"]).n_rows
    return Trial(model, n_parameters, each, batch_size, rows.n_rows, n_val_rows, steps)


def climbed(values: dict[str, Any], longest_line: int | None, seconds: float) -> list[Trial]:
    """The ladder up to the first model that is too large for the time."""
    trials: list[Trial] = []
    hidden = not wants_bar("auto", sys.stderr)
    for size in tqdm(LADDER, "timing models", leave=False, disable=hidden, file=sys.stderr):
        trial = timed(values, of_model(size, longest_line), seconds)
        if trials and trial.tokens < TOKENS_PER_PARAMETER * trial.n_parameters:
            break
        trials.append(trial)
    return trials


def of_training(trials: list[Trial], minutes: float, asked: int | None) -> Iterator[Choice]:
    """The model and its training; `asked` is the number of updates, if it was set."""
    chosen, tried = trials[-1], len(trials)
    largest = tried == len(LADDER)
    why = (
        f"{human(chosen.n_parameters)} parameters, timed at {1e3 * chosen.seconds:.3g} ms an update"
    )
    why += "; the largest of the ladder" if largest else "; the next larger would see too little"
    for key, value in chosen.model.items():
        yield Choice(f"model.{key}", value, why if key == "n_layer" else "")
    most = max(20, math.ceil(MOST_EPOCHS * chosen.n_rows / chosen.batch_size))
    steps = min(chosen.steps, most)
    why = f"what fits into {minutes:g} minutes"
    if asked is not None:
        steps, why = asked, "asked for"
    elif steps < chosen.steps:
        why = f"{MOST_EPOCHS} passes over the text: more bring nothing, though there is more time"
    yield Choice("train.max_steps", steps, why)
    yield Choice("train.batch_size", chosen.batch_size, f"about {TOKENS_PER_UPDATE} tokens")
    yield Choice("train.eval_interval", max(1, steps // LOOKS), f"{LOOKS} looks at the loss")
    batches = max(2, round(EVALUATION_SHARE * UPDATE_PER_EVALUATION * steps / LOOKS))
    if batches * chosen.batch_size < chosen.n_val_rows:
        why = "spread over the validation text; all of it would take too much of the time"
        yield Choice("train.eval_batches", batches, why)
    epochs = steps * chosen.batch_size / chosen.n_rows
    rate, why = next((rate, why) for most, rate, why in RATES if epochs <= most)
    yield Choice("dropout.preset", "gpt2" if rate else "none", f"{epochs:.1f} epochs: {why}")
    if rate:
        yield Choice("dropout.rate", rate, "")
    yield Choice("optim.name", "muon", "the same loss in less time than AdamW at these sizes")
    yield Choice("optim.lr", 1e-2, "")
    yield Choice("optim.min_lr", 0.0, "falls to nothing at the end")
    yield Choice("optim.schedule", "linear", "")
    yield Choice("optim.warmup_steps", min(50, steps // 20), "")


def written(choices: list[Choice]) -> tuple[dict[str, Any], str]:
    """The choices as a nested mapping, and as YAML with the reasons behind them."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    for key, value, reason in choices:
        section, _, name = key.partition(".")
        if section not in values:
            lines.append(f"{section}:")
        values.setdefault(section, {})[name] = value
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000)
        shown = text.removesuffix("...\n").strip()
        line = f"  {name}: {shown}"
        lines.append(f"{line}  # {reason}" if reason else line)
    return values, "\n".join(lines) + "\n"


def compose(source: list[str], minutes: float, overrides: list[str]) -> tuple[RunConfig, str]:
    """A run for this text and time, and its YAML. `overrides` as of --set win.

    Raises ConfigError, DataError.
    """
    asked = read_layers([], overrides)
    given = asked.values.get("data", {})
    named = {"source": source[0] if len(source) == 1 else source}
    data = {**(given if isinstance(given, dict) else {}), **named}
    first = validate(Document({"data": data}), to_train=False)
    found = survey(first.data)
    choices = [Choice("data.source", named["source"], f"{human(found.n_bytes)} bytes")]
    choices += of_text(found)
    values, _ = written(choices)
    seconds = 60 * minutes * TRAINING_SHARE
    steps = asked.value(("train", "max_steps"))
    whole = {**values, "data": {**data, **values["data"]}}
    trials = climbed(whole, found.longest_line, seconds)
    choices += of_training(trials, minutes, steps if isinstance(steps, int) else None)
    values, text = written(choices)
    document = Document(values)
    merge(document, asked)
    head = f"# For {', '.join(source)} in {minutes:g} minutes; keep it, change it, run it again.\n"
    changed = "".join(f"# --set {override}\n" for override in overrides)
    return validate(document), head + changed + text


def keep(text: str, directory: Path) -> None:
    """recipe.yaml in the run directory."""
    run_directory.create(directory)
    storage.write_text(directory / "recipe.yaml", text)
