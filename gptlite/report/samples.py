"""What a run wrote while it was trained: each text with its step and the loss of that time."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from gptlite.report.series import shorten
from gptlite.runs.results import DAMAGED, LONGEST_SAMPLE, Row, RunFiles

LONGEST = 4000
"""Characters of a text that are shown."""
LONGEST_NAME, LONGEST_PREVIEW = 60, 120
PER_PROMPT = 8
"""Continuations of each prompt where rows are documents (runs/session.py); else it is one."""


class Sample(NamedTuple):
    title: str
    loss: str
    """The validation loss of the last evaluation until then, in words; empty if there was none."""
    texts: list[tuple[str, str]]
    """A heading, empty where there is one text, and the text."""
    preview: str
    """The beginning, in a line."""


def samples_of(run: RunFiles) -> list[Sample]:
    prompts, times = prompts_of(run.config)
    evaluated = run.evaluations
    return [
        Sample(
            f"step {step:,}",
            loss_words(evaluated, step),
            [(name, shorten(part, LONGEST)) for name, part in split_sample(text, prompts, times)],
            shorten(" ".join(text[:LONGEST].split()), LONGEST_PREVIEW),
        )
        for step, text in run.samples
    ]


def loss_words(evaluated: list[Row], step: int) -> str:
    known = [row for row in evaluated if row["step"] <= step]
    if not known:
        return ""
    last = max(known, key=lambda row: int(row["step"]))
    of_step = "" if last["step"] == step else f" at step {last['step']:,}"
    return f"validation loss {last['val/loss']:.2f} nats{of_step}"


def prompts_of(config: dict[str, Any]) -> tuple[list[str], int]:
    """The prompts of a run, and how many continuations of each a sample has."""
    try:
        prompts = [str(prompt) for prompt in config["sample"]["prompts"]]
        return prompts, PER_PROMPT if config["data"]["layout"] == "documents" else 1
    except DAMAGED:
        return [], 1


def split_sample(text: str, prompts: list[str], times: int) -> list[tuple[str, str]]:
    """The text of each prompt under its name, or all as it is where they cannot be told apart."""
    text = text.removesuffix("\n")
    if len(prompts) < 2 or len(text) + 1 >= LONGEST_SAMPLE:
        return [("", text)]
    starts = starts_of(text, [prompt for prompt in prompts for _ in range(times)])
    if starts is None:
        return [("", text)]
    bounds = pairwise([*starts[::times], len(text) + 1])
    parts = [text[start : end - 1] for start, end in bounds]
    return list(zip(map(prompt_name, prompts), parts, strict=True))


def starts_of(text: str, prompts: Sequence[str]) -> list[int] | None:
    """Where each continuation begins; None where that is not certain.

    A file holds, one after the other, each prompt with its continuation, parted by an end of line.
    A model may write ends of lines and prompts too: it is certain only where the first places that
    the prompts can have are also the last.
    """
    first = [0]
    for before, prompt in pairwise(prompts):
        at = text.find("\n" + prompt, first[-1] + len(before))
        if at < 0:
            return None
        first.append(at + 1)
    last, end = [0], len(text)
    for prompt in reversed(prompts[1:]):
        end = text.rfind("\n" + prompt, 0, end)
        last.insert(1, end + 1)
    return first if text.startswith(prompts[0]) and first == last else None


def prompt_name(prompt: str) -> str:
    line = prompt.replace("\n", "⏎")
    return f"From “{shorten(line, LONGEST_NAME)}”" if line else "From nothing"
