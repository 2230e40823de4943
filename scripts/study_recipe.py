"""Those tables of docs/dropout-study.md that are about the recipe of `train --data`: what its rule
of weight decay gains, and how the rule was found (it is gptlite/planning/regularisation.py).

A part of reproduce_dropout_study.py.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from study_cells import DOCS, Study, difference, mean, mean_of, runs_of, table

from gptlite.planning.regularisation import Scale, pick_decay, pick_rate


def recipe_size(study: Study) -> Iterator[str]:
    """The same for larger models; then forms of a rule, and what the rule misses."""
    yield from by_decay(study, 1)
    yield from rule(study)


def recipe(study: Study) -> Iterator[str]:
    """Weight decay for each text, number of passes and model; then what the rule of `train --data`
    gains, and each of the other means."""
    decays = study["axes"]["optim.weight_decay"]
    usual, *_ = decays
    yield from by_decay(study, usual)

    def against(amount: float, name: str, than: float, other: str) -> Any:
        ours, theirs = f"weight_decay={amount:g}, {name}", f"weight_decay={than:g}, {other}"
        return difference(study, ours, theirs, "loss.loss")

    rows = []
    for name in (name for name in names_of(study) if is_of_the_rule(name)):
        ruled, _ = pick_decay(Scale(tokens_of(name), tokens_of(name) / 2048, width_of(name)), 0.01)
        nearest = min(decays, key=lambda amount: abs(math.log(amount / ruled)))
        rows.append([name, f"{ruled:g}", f"{nearest:g}", against(nearest, name, usual, name)])
    columns = ["", "decay of the rule", "the nearest here", f"it minus weight decay {usual:g}"]
    yield f"What the rule gains:\n\n{table(columns, rows)}"
    rows = [[n, *(against(a, it, a, no) for a in decays)] for n, (it, no) in MEANS.items()]
    head = ["", *(f"weight decay {amount:g}" for amount in decays)]
    usually = "at 20 passes over 40,000 tokens where it does not say another"
    yield f"What each other means adds, {usually}:\n\n{table(head, rows)}"


def by_decay(study: Study, usual: float) -> Iterator[str]:
    """Losses of each decay, and their differences to one of them."""
    decays = study["axes"]["optim.weight_decay"]
    others = [amount for amount in decays if amount != usual]

    def label(amount: Any, name: str) -> str:
        return f"weight_decay={amount:g}, {name}"

    names = names_of(study)
    rows = [[n, *(mean(study, label(a, n), "loss.loss") for a in decays)] for n in names]
    head = ["", *(f"weight decay {amount:g}" for amount in decays)]
    yield f"Test loss at the best step, nats:\n\n{table(head, rows)}"
    rows = [
        [n, *(difference(study, label(a, n), label(usual, n), "loss.loss") for a in others)]
        for n in names
    ]
    head = ["", *(f"weight decay {amount:g}" for amount in others)]
    yield f"Minus that of weight decay {usual:g}:\n\n{table(head, rows)}"


def names_of(study: Study) -> list[str]:
    """What the points are called beside the decay."""
    return list(dict.fromkeys(point["label"].split(", ", 1)[1] for point in study["points"]))


def is_of_the_rule(name: str) -> bool:
    """Whether `train --data` would do this, but for the decay: dropout where it says so alone, a
    decay that stays, no average."""
    passes = int(name.split(" tokens ")[1].partition(" time")[0])
    dropped = name.partition(", dropout 0.1")
    return not dropped[2] and bool(dropped[1]) == bool(pick_rate(passes)[0])


LARGER = "40k tokens 20 times, 7 times the parameters"
DROPPED = "40k tokens 20 times, dropout 0.1"
MEANS = {
    "dropout 0.1 at 5 passes": ("40k tokens 5 times, dropout 0.1", "40k tokens 5 times"),
    "dropout 0.1 at 7 passes over 400,000 tokens": (
        "400k tokens 7 times, dropout 0.1",
        "400k tokens 7 times",
    ),
    "dropout 0.1": (DROPPED, "40k tokens 20 times"),
    "dropout 0.1, 7 times the parameters": (f"{LARGER}, dropout 0.1", LARGER),
    "an average of weights": (f"{DROPPED}, average of weights", DROPPED),
    "a decay that falls with the rate": (f"{DROPPED}, decay falling with the rate", DROPPED),
    "60 passes instead of 20": ("40k tokens 60 times, dropout 0.1", DROPPED),
}
"""Two points of the study of the recipe that differ in one means alone."""


class Cell(NamedTuple):
    """Runs that differ in the decay alone."""

    name: str
    scale: Scale
    shares: list[float]
    """Of a weight in an update."""
    losses: list[float]
    """Test losses, means over seeds."""

    def excess(self, share: float) -> float:
        """Nats above the lowest loss, between two shares along a line in their logarithms."""
        at = np.interp(np.log(share), np.log(self.shares), self.losses)
        return float(at) - min(self.losses)


FORMS = {
    "the same share in each pass": (0.0, 0.0),
    "as the square root of the text": (0.0, 0.5),
    "as the width of the model": (1.0, 0.0),
    "as the width, and the fourth root of the text": (1.0, 0.25),
    "as the width, and the square root of the text": (1.0, 0.5),
}
"""How the share that a pass takes grows with n_embd and with the tokens of text: powers of them."""


def rule(study: Study) -> Iterator[str]:
    """Forms, each with its best constant; then the rule, for each text and model."""
    cells = [*cells_of(study, 0.01, 2048), *cells_of(read("recipe"), 0.01, 2048)]
    cells += cells_of(read("decay"), 0.008, 1024)
    rows = []
    for name, powers in FORMS.items():
        found = [
            ([cell.excess(share_of(cell.scale, constant, *powers)) for cell in cells], constant)
            for constant in np.geomspace(0.2, 2, 101)
        ]
        excess, constant = min(found, key=lambda pair: float(np.mean(pair[0])))
        rows.append([name, f"{constant:.2f}", f"{np.mean(excess):.3f}", f"{max(excess):.3f}"])
    head = ["the share that a pass takes", "share", "above the lowest, mean", "at most"]
    yield f"Forms of a rule, test loss in nats over {len(cells)} texts and models:\n\n" + table(
        head, rows
    )
    rows = []
    for cell in cells:
        ruled = 0.01 * pick_decay(cell.scale, 0.01)[0]
        best = cell.shares[int(np.argmin(cell.losses))]
        rows.append([cell.name, f"{best:.2%}", f"{ruled:.2%}", f"{cell.excess(ruled):.3f}"])
    head = ["", "lowest of those tried", "the rule", "above the lowest"]
    yield f"Share of a weight that an update takes:\n\n{table(head, rows)}"


def share_of(scale: Scale, constant: float, width: float, text: float) -> float:
    """What an update takes; `constant` is what a pass over 40,000 tokens takes at width 64."""
    in_a_pass = constant * (scale.n_embd / 64) ** width * (scale.text_tokens / 40_000) ** text
    return min(0.1, max(0.001, in_a_pass / scale.updates))  # what was tried


def read(name: str) -> Study:
    lines = (DOCS / f"{name}.jsonl").read_text().splitlines()
    return {"runs": [json.loads(line) for line in lines]}


def cells_of(study: Study, lr: float, update_tokens: int) -> Iterator[Cell]:
    """Of runs with a decay that stays, without dropout or with rate 0.1."""
    found: dict[str, dict[float, float]] = {}
    for label in dict.fromkeys(run["label"] for run in study["runs"]):
        decay = re.search(r"weight_decay=([\d.]+), ", label)
        name = label.replace(decay[0], "") if decay else ""
        if decay and runs_of(study, label) and not re.search(r"average|falling|rate=0.[^1]", name):
            found.setdefault(name, {})[float(decay[1])] = mean_of(study, label, "loss.loss")
    for name, losses in found.items():
        tokens = tokens_of(name)
        scale = Scale(tokens, tokens / update_tokens, width_of(name))
        shares = sorted(losses)
        yield Cell(name, scale, [lr * d for d in shares], [losses[d] for d in shares])


def tokens_of(name: str) -> float:
    thousands = re.search(r"(\d+)k tokens", name)
    exact: Any = re.search(r"train_tokens=(\d+)", name)
    return 1000 * float(thousands[1]) if thousands else float(exact[1])


def width_of(name: str) -> int:
    """Of the networks of the three studies."""
    widths = {"7 times the parameters": 128, "0.85 M": 128, "2.8 M": 192, "train_tokens": 96}
    return next((width for words, width in widths.items() if words in name), 64)
