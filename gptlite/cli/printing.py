"""What commands print: results on stdout, one JSON document or text; remarks on stderr."""

import json
import re
import sys
from typing import Any

from gptlite.runs.results import scalars
from gptlite.terminal import is_terminal, tell
from gptlite.words import escape_controls


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=not sys.stdout.encoding.startswith("utf"))
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_results(results: dict[str, Any]) -> None:
    """Numbers by their names; lists are for the file."""
    for suite, result in results.items():
        rows = [(name, format_result(value)) for name, value in scalars(result)]
        width = max(len(name) for name, _ in rows)
        print("\n".join([f"{suite}:", *(f"  {name:{width}}  {value}" for name, value in rows)]))


def format_result(value: Any) -> str:
    if isinstance(value, dict):
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
