"""Run bundled configs and hold each result against the number that others have published.

python scripts/reproduce_published.py              what there is
python scripts/reproduce_published.py names sort   run these; exit code 1 if one fails
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/reproduce")


class Published(NamedTuple):
    """A number that was published, and how it is measured here."""

    what: str
    number: float
    tolerance: float
    """Ours may be worse by so much."""
    source: str
    measure: Callable[["Published", str], float]
    config: str
    settings: tuple[str, ...] = ()
    higher_is_better: bool = False
    gpu: bool = False
    """Takes hours without one."""

    def passes(self, ours: float) -> bool:
        worse = self.number - ours if self.higher_is_better else ours - self.number
        return worse <= self.tolerance


def gptlite(*arguments: str) -> str:
    """What a command prints on stdout; progress goes to the terminal."""
    command = [sys.executable, "-m", "gptlite", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train_config(one: Published, name: str, *more: str) -> Path:
    """The directory of the finished run; one that was interrupted goes on."""
    directory = RUNS / name
    settings = [word for setting in (*one.settings, *more) for word in ("--set", setting)]
    where = ["--out-dir", str(directory), "--resume", "auto"]
    gptlite("train", "--config", one.config, *settings, *where)
    return directory


def best_loss(one: Published, name: str) -> float:
    """Validation loss of the best step, over the whole split."""
    summary = json.loads((train_config(one, name) / "summary.json").read_text())
    return float(summary["best"]["val_loss"])


def last_loss(one: Published, name: str) -> float:
    summary = json.loads((train_config(one, name) / "summary.json").read_text())
    return float(summary["val_loss"])


def percent_sorted(one: Published, name: str) -> float:
    """Per cent of all 729 inputs that are sorted exactly, those never trained on among them."""
    inputs = ["".join(digits) for digits in itertools.product("012", repeat=6)]
    text = Path("data/cache/sort.txt")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(f"{digits}{''.join(sorted(digits))}\n" for digits in inputs))
    directory = str(train_config(one, name))
    prompts = [word for digits in inputs for word in ("--prompt", digits)]
    asked = ["--temperature", "0", "--max-new-tokens", "6", "--checkpoint", "last", "--json"]
    found = json.loads(gptlite("generate", "--run", directory, *prompts, *asked))["results"]
    right = [result["text"] == "".join(sorted(result["prompt"])) for result in found]
    return 100 * sum(right) / len(right)


NANOGPT = "https://github.com/karpathy/nanoGPT (README)"
MAKEMORE = "https://github.com/karpathy/makemore (README)"
MINGPT = "https://github.com/karpathy/minGPT (demo.ipynb)"
BOOK = "https://github.com/rasbt/LLMs-from-scratch (ch05.ipynb)"
LMXLAB = "lmxlab, hypothesis 001d: 3 M parameters, mean of 3 seeds"
PUBLISHED = {
    "shakespeare_char_cpu": Published(
        "nats per character", 1.88, 0.02, NANOGPT, best_loss, "shakespeare_char_cpu"
    ),
    "shakespeare_char_cpu_own_lr": Published(
        "nats per character, learning rate 1e-3 as published",
        1.88,
        0.05,
        NANOGPT,
        best_loss,
        "shakespeare_char_cpu",
        ("optim.lr=1e-3",),
    ),
    "shakespeare_char": Published(
        "nats per character", 1.4697, 0.02, NANOGPT, best_loss, "shakespeare_char", gpu=True
    ),
    "names": Published("nats per letter", 1.92, 0.05, MAKEMORE, best_loss, "names"),
    "sort": Published(
        "% sorted exactly", 100.0, 0.0, MINGPT, percent_sorted, "sort", higher_is_better=True
    ),
    "the_verdict_best": Published(
        "nats per token, best step", 6.123, 0.1, BOOK, best_loss, "the_verdict"
    ),
    "the_verdict": Published(
        "nats per token, last step", 6.373, 0.2, BOOK, last_loss, "the_verdict"
    ),
    **{
        f"shakespeare_3m_{rate:g}": Published(
            "nats per character",
            number,
            0.03,
            LMXLAB,
            best_loss,
            "shakespeare_3m",
            (f"dropout.rate={rate:g}",),
        )
        for rate, number in ((0.0, 1.611), (0.1, 1.573), (0.2, 1.560))
    },
}


def list_published() -> str:
    lines = []
    for name, one in PUBLISHED.items():
        marked = "  needs a GPU, or hours" if one.gpu else ""
        lines.append(f"{name:30} {one.number:8.4g} {one.what}; {one.source}{marked}")
    return "\n".join(lines)


def reproduce(name: str) -> bool:
    """Run one and print its line; whether it passes."""
    one = PUBLISHED[name]
    ours = one.measure(one, name)
    verdict = "pass" if one.passes(ours) else "FAIL"
    print(
        f"{name}: published {one.number:.4g}, ours {ours:.4g} {one.what}, tolerance "
        f"{one.tolerance:g}: {verdict} ({one.source})",
        flush=True,
    )
    return one.passes(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    if not names:
        print(list_published())
        return
    if unknown := [name for name in names if name not in PUBLISHED]:
        parser.error(f"no {', '.join(unknown)}; there are: {', '.join(PUBLISHED)}")
    results = [reproduce(name) for name in names]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
