"""What commands print: results on stdout, one JSON document or text; remarks on stderr."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from gptlite.cli.sentences import SENTENCES, describe
from gptlite.runs.results import scalars
from gptlite.terminal import fold, is_terminal, tell
from gptlite.words import escape_controls

WIDTH = 110
"""Characters of a line of sentences."""


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=not sys.stdout.encoding.startswith("utf"))
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_sentences(results: dict[str, Any]) -> None:
    """What was found, in words; numbers by their names where a suite has no words."""
    sentences = [line for suite, result in results.items() for line in describe(suite, result)]
    for line in sentences:
        print(fold(escape_controls(line), indent=2, columns=WIDTH))
    if any(" to " in line for line in sentences):
        print("In brackets: what 95 of 100 other texts of this kind would give.")
    print_results({suite: each for suite, each in results.items() if suite not in SENTENCES})


def print_results(results: dict[str, Any]) -> None:
    """Every number by its name; lists are for the file."""
    for suite, result in results.items():
        rows = list(result_rows(result))
        width = max((len(name) for name, _ in rows), default=0)
        print(f"{suite}:")
        for name, value in rows:
            print(escape_controls(f"  {name:{width}}  {value}"))


def result_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and what is printed of them; losses of a part of the text say which."""
    bounds, parts = result.get("intervals", {}), parts_measured(result)
    for name, value in scalars(result):
        if name in bounds:
            low, high = bounds[name]
            value = {"value": value, "low": low, "high": high}
        yield name, format_result(value) + parts.get(name, "")


def parts_measured(result: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """By the name of each loss, on how much text it was measured."""
    found = dict[str, str]()
    for name, value in result.items():
        if isinstance(value, dict):
            found |= parts_measured(value, f"{prefix}{name}.")
        elif name == "train_loss":
            found[prefix + name] = f"  on {result['train_rows']:,} rows of training text"
    if "targets" in result:
        losses = [name for name in result if name.endswith("loss") and name != "train_loss"]
        found |= {prefix + name: f"  on {result['targets']:,} targets" for name in losses}
    return found


def format_result(value: Any) -> str:
    if isinstance(value, dict):
        if value["value"] is None:
            return f"none: {value['reason']}"
        number = format_result(value["value"])
        if value["low"] is None:
            return number
        return f"{number}  [{format_result(value['low'])}, {format_result(value['high'])}]"
    if value is None:
        return "none"
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def print_texts(generation: Any) -> None:
    """Stream a single continuation; several are printed one after the other when all are done."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    on_screen = is_terminal(sys.stdout)

    def write(text: str) -> None:
        print(escape_controls(text, keep="\n\t") if on_screen else text, end="", flush=True)

    if len(generation.streams) == 1:
        write(generation.prompts[0])
        for piece in generation.pieces():
            write(piece.text)
        write("\n")
        return
    for number, result in enumerate(generation.results()):
        write("\n" if number else "")
        write(f"--- prompt {result['prompt']!r}, sample {result['sample']}\n")
        write(result["prompt"] + result["text"] + "\n")


def tell_notes(trained: Any) -> None:
    """Which damaged checkpoints a model was not taken from, and what this machine lacks."""
    for note in trained.notes:
        tell(f"not as in training: {note}")
    for problem in trained.problems:
        step = trained.state.step
        tell(f"{problem}; using the one of step {step}")
