"""A byte-level BPE learned from text by Hugging Face's `tokenizers`: which bytes become one token.

The library answers no signal while it learns and takes up to a hundred bytes of memory for a byte
of text that has no spaces. So text that keeps it busy for longer than a moment goes to a process of
its own, which Ctrl-C ends, and which takes its memory along.
"""

import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gptlite.data import workers
from gptlite.data.workers import Advance

WORTH_A_PROCESS = 1 << 18
"""Bytes of different words, which learning takes time and memory for; fewer are learned from here,
in a second or two."""
WHOLE = 100 * workers.WORTH_TELLING
"""The length of the bar: a worker reports every percent of it."""
STAGES = {"Tokenize words": (0, 0.1), "Count pairs": (0.1, 0.2), "Compute merges": (0.2, 1)}
BAR = "{l_bar}{bar}| [{elapsed}<{remaining}]"
LONG_RUN = re.compile(r"\s{1024}|\S{1024}")
AT = Path("tokenizer")
"""Stands for the file that a worker is at."""


class Lesson(NamedTuple):
    texts: list[str]
    vocab_size: int
    """Tokens, without the one for the end of text."""


def learn_vocabulary(texts: Iterable[str], vocab_size: int) -> dict[str, int]:
    """The tokens, spelled in GPT-2's visible bytes, with their ids in the order of learning."""
    lesson = Lesson(list(cut_long_runs(texts)), vocab_size)
    words = {word for text in lesson.texts for word in text.split()}
    if sum(len(word.encode(errors="replace")) for word in words) < WORTH_A_PROCESS:
        return learn(lesson)
    with tqdm(total=WHOLE, bar_format=BAR, desc="merge", disable=None, delay=2) as bar:

        def advance(_: Path, n: int) -> None:
            bar.update(n)

        vocabulary: dict[str, int]
        (vocabulary,) = workers.run_jobs(learn_in_worker, [lesson], [AT], advance)
    return vocabulary


def learn(lesson: Lesson, *, report: bool = False) -> dict[str, int]:
    """`report`: how far it is, in lines of JSON on stderr, where the library can."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=lesson.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if report and hasattr(trainer, "progress_format"):  # since 0.23
        trainer.progress_format, trainer.show_progress = "json", True
    trainee.train_from_iterator(lesson.texts, trainer)
    vocabulary: dict[str, int] = trainee.get_vocab()
    return vocabulary


def learn_in_worker(lesson: Lesson, advance: Advance) -> dict[str, int]:
    """The same in a process that has nothing else to do.

    A merge takes as long as its pair is frequent, so the time grows with the logarithm of their
    number.
    """
    reported = 0

    def follow(line: str) -> None:
        nonlocal reported
        state = json.loads(line) if line.startswith("{") else {}
        if state.get("stage") in STAGES:
            begin, end = STAGES[state["stage"]]
            share = math.log1p(state["current"]) / math.log1p(max(1, state["total"]))
            done = int(WHOLE * (begin + (end - begin) * share))
            advance(AT, done - reported)
            reported = done

    with redirect_stderr(follow):
        return learn(lesson, report=True)


@contextmanager
def redirect_stderr(follow: Callable[[str], None]) -> Iterator[None]:
    """Hand over each line written to stderr, also by code that is not Python."""
    reading, writing = os.pipe()
    before = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)

    def read() -> None:
        with os.fdopen(reading, errors="replace") as lines:
            for line in lines:
                follow(line)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        os.dup2(before, 2)  # which ends what the reader reads
        os.close(before)
        reader.join()


def cut_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside long runs: the time to learn grows with the square of a word."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]
