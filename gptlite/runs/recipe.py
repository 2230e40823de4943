"""`gptlite train --data my.txt`: a config for one's own text, from its size and the time there is.

Every choice is a Choice with its reason; together they are a YAML file that can be kept, changed
and run again. Speed is measured on this machine, with the text itself, before choosing a model.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gptlite import storage
from gptlite.config.reader import Dumper, merge, read_layers, validate
from gptlite.config.run import DataConfig, RunConfig
from gptlite.config.strict_yaml import Document
from gptlite.core.device import pick_device
from gptlite.data import readers, sources
from gptlite.data.prepare import prepare
from gptlite.data.token_files import TokenFiles
from gptlite.errors import ConfigError
from gptlite.planning.budget import (
    LOOKS,
    Budget,
    Fit,
    Rung,
    clamp,
    climb,
    fit_run,
    guess_fit,
    make_rung,
)
from gptlite.planning.regularisation import Scale, pick_decay, pick_rate
from gptlite.planning.rehearsal import count_evaluated, rehearse
from gptlite.runs.directory import create_directory
from gptlite.runs.origin import given_tokenizer, inherit
from gptlite.terminal import format_number

SURVEYED = 1 << 24
"""Characters that are looked at; of a longer text, its beginning."""
FEWEST_NAMES, LONGEST_NAME, USUAL_NAME = 200, 40, 16
"""Lines, characters of a line, and their mean, from which a list of names is known."""
OPENING = 32
"""Characters of a text, at most, that samples begin with."""
FEWEST_LETTERS = 7
"""Different ones; DNA and figures have fewer than names."""
UNNAMED = re.compile(
    r"""[!"#$%&()*+,/:;<=>?@[\]^{|}~\u00a1\u00ab\u00bb\u00bf\u2013-\u2015\u201c-\u201e\u2026\u060c\u061f\u0964]"""
)
"""What names do not have: punctuation, and the signs of code."""
UNSPACED = re.compile(r"[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese: no spaces between words."""
BPE_FROM = 1 << 11
"""Bytes of text from which a BPE is at least as good as characters: docs/own-text.md."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 300, 1 << 14
LADDER = (
    (2, 64, 64),
    (4, 96, 64),
    (4, 128, 128),
    (6, 192, 128),
    (6, 256, 256),
    (8, 384, 256),
    (8, 512, 512),
    (12, 768, 1024),
)
"""(n_layer, n_embd, context_length), the smallest model first."""
TOKENS_PER_UPDATE = 2048
LR = 0.01
"""Of Muon, for all sizes of the ladder."""
CHOSEN_SHARE = 0.03
"""Of the time, for timing the model that was chosen; one to ten seconds."""


class Choice(NamedTuple):
    key: str
    value: Any
    reason: str


class Recipe(NamedTuple):
    """A config that was made for a text."""

    run: RunConfig
    text: str
    """Its YAML, with the reasons."""
    seconds: float
    """That the whole command is expected to take."""


class Survey(NamedTuple):
    """What a look at a text finds."""

    n_bytes: int
    n_distinct: int
    """Different characters."""
    longest_line: int | None
    """In characters, where each line is a word or a name by itself; else None."""
    opening: str = ""
    """Its first words."""


def survey(data: DataConfig) -> Survey:
    """Raises DataError, as reading the text does."""
    files = sources.locate(validate(Document({"data": data.model_dump()}), to_train=False))
    lines = Lines()
    as_lines = DataConfig(**{**data.model_dump(), "layout": "documents"})
    for text, ends in (chunk for file in files for chunk in readers.read_documents(file, as_lines)):
        lines.add(text, ends)
        if lines.n_bytes > SURVEYED:
            break
    on_disk = sum(file.stat().st_size for file in files)
    n_bytes = max(on_disk, lines.n_bytes) if lines.n_bytes > SURVEYED else lines.n_bytes
    longest = lines.longest if lines.are_names() else None
    return Survey(n_bytes, len(lines.characters) + 1, longest, lines.opening)


class Lines:
    """What the lines of a text look like."""

    def __init__(self) -> None:
        self.characters: set[str] = set()
        self.n_bytes = self.n = self.spaced = self.signs = self.unspaced = 0
        self.longest = self.length = 0
        self.opening = ""

    def add(self, text: str, ends: bool) -> None:
        self.opening = self.opening or first_words(text)
        self.characters.update(text)
        self.n_bytes += len(text.encode("utf-8", errors="replace")) + ends
        self.n += ends
        self.spaced += " " in text.strip()
        self.signs += UNNAMED.search(text) is not None
        self.unspaced += UNSPACED.search(text) is not None
        self.length += len(text)
        self.longest = max(self.longest, len(text))

    def are_names(self) -> bool:
        """Short lines of a word each, in a script where that shows; not verse, DNA or code."""
        few = 0.2 * self.n
        letters = {letter for c in self.characters if c.isalpha() for letter in c.casefold()}
        return (
            self.n >= FEWEST_NAMES
            and self.longest <= LONGEST_NAME
            and self.length <= USUAL_NAME * self.n
            and max(self.spaced, self.signs, self.unspaced) < few
            and len(letters) >= FEWEST_LETTERS
        )


def first_words(text: str) -> str:
    """What a line begins with, as far as it can be shown; nothing of a line of blanks."""
    line = text.strip().partition("\n")[0]
    if not line or not line.isprintable():
        return ""
    return textwrap.wrap(line, OPENING, break_on_hyphens=False)[0]


def text_choices(found: Survey) -> Iterator[Choice]:
    """How a text is cut into tokens."""
    if found.longest_line is not None:
        yield Choice("data.layout", "documents", "lines of a word each: every line by itself")
        yield Choice("tokenizer.kind", "char", f"words of {found.n_distinct} different letters")
        return
    if found.n_bytes < BPE_FROM:
        why = f"fewer bits per byte than a BPE below {BPE_FROM} bytes"
        yield Choice("tokenizer.kind", "char", why)
        return
    nearest = 1 << round(math.log2(max(1, found.n_bytes)) / 2)
    vocabulary = min(LARGEST_VOCABULARY, max(SMALLEST_VOCABULARY, nearest))
    yield Choice(
        "tokenizer.kind", "bpe", f"fewer bits per byte than characters, from {BPE_FROM} bytes on"
    )
    yield Choice("tokenizer.vocab_size", vocabulary, "about the square root of the bytes")


def sample_choices(found: Survey, asked: Document) -> Iterator[Choice]:
    """What samples continue. From nothing a model may end the text at once."""
    names, foreign = found.longest_line is not None, "init_from" in asked.values
    if found.opening and not names and not foreign:
        yield Choice("sample.prompts", [found.opening], "how the text begins")


def model_section(size: tuple[int, int, int], longest_line: int | None) -> dict[str, Any]:
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


def lay_over(choices: Iterable[Choice], asked: Document) -> Document:
    """These choices, and what is asked for over them."""
    values: dict[str, Any] = {}
    for key, value, _ in choices:
        section, _, name = key.rpartition(".")
        inside = values.setdefault(section, {}) if section else values
        inside[name] = value
    document = Document(values)
    merge(document, asked)
    if asked.value(("dropout", "preset")) == "none" and "dropout" in values:
        values["dropout"]["rate"] = asked.value(("dropout", "rate"))  # the chosen one would be idle
    return document


def make_run(choices: Iterable[Choice], asked: Document) -> RunConfig:
    """The run of these choices; what is asked for wins. Raises ConfigError."""
    return validate(lay_over(choices, asked))


def final_choices(choices: Sequence[Choice], asked: Document) -> Iterator[Choice]:
    """The choices that stand, and what is asked for in the place of the others."""
    reasons = {choice.key: choice.reason for choice in choices}
    for section, values in lay_over(choices, asked).values.items():
        inside = values if isinstance(values, dict) else {"": values}
        for name, value in inside.items():
            path = (section, name) if name else (section,)
            key = ".".join(path)
            is_asked = asked.value(path) is not None
            yield Choice(key, value, "as asked" if is_asked else reasons.get(key, ""))


def size_choices(
    size: tuple[int, int, int], longest_line: int | None, asked: Document, why: str = ""
) -> Iterator[Choice]:
    """A model, its batches and its optimizer; `why` says why it is this large."""
    model = model_section(size, longest_line)
    for key, value in model.items():
        yield Choice(f"model.{key}", value, why if key == "n_layer" else "")
    context = asked.value(("model", "context_length"))
    if not isinstance(context, int) or context < 1:  # a wrong one is refused with the others
        context = model["context_length"]
    batch_size = max(8, TOKENS_PER_UPDATE // context)
    yield Choice("train.batch_size", batch_size, f"about {TOKENS_PER_UPDATE} tokens")
    yield Choice("optim.name", "muon", "the same loss in less time than AdamW at these sizes")
    yield Choice("optim.lr", LR, "")
    yield Choice("optim.min_lr", 0.0, "falls to nothing at the end")
    yield Choice("optim.schedule", "linear", "")


UNTRAINED = (
    Choice("train.max_steps", 1 << 20, ""),
    Choice("optim.warmup_steps", 0, ""),
    Choice("dropout.preset", "gpt2", ""),
    Choice("dropout.rate", 0.0, ""),
    Choice("compile", False, ""),
)
"""What a model is timed with as long as its training is not known."""


def candidates(
    choices: list[Choice], asked: Document, longest_line: int | None
) -> list[tuple[tuple[int, int, int], RunConfig]]:
    """The sizes of the ladder that go with what is asked for. Raises ConfigError if none does."""
    found, refusal = [], ConfigError()
    for size in LADDER:
        try:
            run = make_run([*choices, *size_choices(size, longest_line, asked), *UNTRAINED], asked)
            found.append((size, run))
        except ConfigError as error:  # such as a width that n_head does not divide
            refusal = error
    if not found:
        raise refusal
    return found


def rehearse_training(
    choices: list[Choice], asked: Document, files: TokenFiles, rung: Rung, budget: Budget
) -> Fit:
    """What fits, by trying the run; again if that many updates call for another dropout rate."""
    timing = clamp(1.0, CHOSEN_SHARE * budget.seconds, 10.0)
    n_val, fitting = count_evaluated(rung.run, files), guess_fit(rung, budget)
    for _ in range(2):
        rate, _ = dropout_rate(fitting.steps, rung)
        tried = [*choices, *training_choices(rung, fitting)]
        costs = rehearse(make_run(tried, asked), files, timing)
        fitting = fit_run(costs, rung, n_val, budget, asked)
        if dropout_rate(fitting.steps, rung)[0] == rate:
            break
    return fitting


def dropout_rate(steps: int, rung: Rung) -> tuple[float, str]:
    """The rate for a run of so many updates, and why."""
    return pick_rate(steps * rung.run.train.batch_size / rung.n_rows)


def training_choices(rung: Rung, fitting: Fit) -> Iterator[Choice]:
    """How a model is trained, and for how long."""
    yield Choice("train.max_steps", fitting.steps, fitting.why)
    looks = f"{LOOKS} looks at the loss, {fitting.evaluating:.1%} of the time"
    yield Choice("train.eval_interval", math.ceil(fitting.steps / LOOKS), looks)
    if fitting.eval_batches is not None:
        why = "spread over the validation text; all of it would take too much of the time"
        yield Choice("train.eval_batches", fitting.eval_batches, why)
    run, updates = rung.run, rung.n_rows / rung.run.train.batch_size
    if run.optim.name == "muon" and run.optim.lr:
        decay, why = pick_decay(Scale(rung.text_tokens, updates, run.model.n_embd), run.optim.lr)
        yield Choice("optim.weight_decay", decay, why)
    rate, why = dropout_rate(fitting.steps, rung)
    yield Choice("dropout.preset", "gpt2", "the places of GPT-2")
    yield Choice("dropout.rate", rate, why)
    yield Choice("optim.warmup_steps", min(50, fitting.steps // 20), "")


def format_recipe(choices: Iterable[Choice]) -> str:
    """The choices with the reasons behind them."""
    sections: dict[str, list[str]] = {}
    for key, value, reason in choices:
        section, _, name = key.rpartition(".")
        text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000)
        line = f"{name}: " + text.removesuffix("...\n").strip()
        line = f"  {line}" if section else line
        head = [f"{section}:"] if section else []
        sections.setdefault(section, head).append(f"{line}  # {reason}" if reason else line)
    return "\n".join(line for lines in sections.values() for line in lines) + "\n"


def look_at_source(source: list[str], asked: Document) -> tuple[list[Choice], int | None]:
    """What a text calls for, whatever the time; and its longest line, if it is one of names."""
    given = asked.values.get("data", {})
    named = source[0] if len(source) == 1 else source
    data = {**(given if isinstance(given, dict) else {}), "source": named}
    found = survey(validate(Document({"data": data}), to_train=False).data)
    size = f"{format_number(found.n_bytes)} bytes"
    choices = [Choice("data.source", named, size), *text_choices(found)]
    return [*choices, *sample_choices(found, asked)], found.longest_line


def make_recipe(
    source: list[str], minutes: float, overrides: list[str], began: float | None = None
) -> Recipe:
    """A run for this text and time. `overrides` as of --set win.

    `began` is when the command began, by time.perf_counter; None: now. Raises ConfigError,
    DataError.
    """
    budget = Budget(minutes, began)
    asked = read_layers([], overrides)
    inherit(asked)
    choices, longest_line = look_at_source(source, asked)
    runs = candidates(choices, asked, longest_line)
    files = prepare(runs[0][1], given_tokenizer(runs[0][1]))
    rung = climb((make_rung(size, run, files) for size, run in runs), files, budget)
    size = f"{format_number(rung.n_parameters)} parameters; "
    size += "the largest there is" if rung.size == LADDER[-1] else "the next sees too little text"
    if pick_device(rung.run.device)[0].startswith("cuda"):
        choices.append(
            Choice("compile", False, "timed without; compiling takes a minute by itself")
        )
    choices += size_choices(rung.size, longest_line, asked, size)
    fitting = rehearse_training(choices, asked, files, rung, budget)
    choices += training_choices(rung, fitting)
    head = f"# For {', '.join(source)} in {minutes:g} minutes; keep it, change it, run it again.\n"
    text = head + format_recipe(final_choices(choices, asked))
    return Recipe(make_run(choices, asked), text, fitting.seconds)


def write_recipe(text: str, directory: Path) -> Path:
    """recipe.yaml in the run directory."""
    create_directory(directory)
    storage.write_text(directory / "recipe.yaml", text)
    return directory / "recipe.yaml"
