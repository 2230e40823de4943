"""What the losses of a run say, in plain words, and what to try next.

Rules, not opinions: each names the numbers it rests on. Differences below NOTICEABLE are not worth
a word: another seed or another validation text moves the loss as much.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptlite.planning.regularisation import Scale, advise_decay, pick_rate
from gptlite.runs.results import Row, best_evaluation, evaluations, generalisation_gap, number

NOTICEABLE = 0.02
"""Nats."""
LEAST_RATE = 0.1
"""To try where a run overfits, however few its epochs."""
WIDE_GAP = 0.1
"""Nats between training and validation text, dropout off on both."""


class Verdict(NamedTuple):
    title: str
    found: str
    advice: list[str]
    gap: float | None = None
    """The one it speaks of: of the last evaluation, in nats."""


def verdict(rows: Sequence[Row], config: dict[str, Any], plan: dict[str, Any]) -> Verdict:
    """Of the rows of metrics.jsonl that have a validation loss; `plan` is plan.json."""
    evaluated, best = evaluations(rows), best_evaluation(rows)
    if best is None:
        return Verdict("Not evaluated", "No validation loss was logged.", [])
    last = evaluated[-1]
    epochs = number(last.get("epoch")) or number(plan.get("epochs")) or 0.0
    gap = generalisation_gap(last)
    drops = largest_rate(last) > 0
    rise = last["val/loss"] - best["val/loss"]
    fall = recent_fall(evaluated)
    if best is not last and rise > NOTICEABLE:
        rate = 0.0 if drops else max(LEAST_RATE, pick_rate(epochs)[0])
        found = overfitting(best, last, rise, gap, rate, decay_advice(config, plan))
    elif fall > NOTICEABLE and (gap is None or gap < WIDE_GAP):
        found = underfitting(fall, gap, drops, epochs)
    else:
        found = plateau(gap, drops, epochs)
    return found._replace(gap=gap)


def decay_advice(config: dict[str, Any], plan: dict[str, Any]) -> str:
    """What to try, in figures where they are known for such a run."""
    optim = config.get("optim") or {}
    decay, lr = number(optim.get("weight_decay")), number(optim.get("lr"))
    tokens, steps, epochs = (number(plan.get(key)) for key in ("train_tokens", "steps", "epochs"))
    n_embd = number((config.get("model") or {}).get("n_embd"))
    if decay is not None and lr and tokens and steps and epochs and n_embd:
        scale = Scale(tokens, steps / epochs, int(n_embd))
        told = advise_decay(optim.get("name", ""), lr, decay, scale)
        if told:
            return f"Try another weight decay: {told}."
    return f"Try more weight decay (now {decay})."


def overfitting(
    best: Row, last: Row, rise: float, gap: float | None, rate: float, more_decay: str
) -> Verdict:
    """`rate` is what to try where nothing drops yet, else 0."""
    at = f"step {best['step']}"
    epoch = number(best.get("epoch"))
    at += "" if epoch is None else f" (epoch {epoch:.1f})"
    found = f"The validation loss was lowest at {at} and has risen by {rise:.2f} nats since"
    earlier = generalisation_gap(best)
    grown = gap is not None and (earlier is None or gap > earlier)
    became = "has grown to" if grown else "is"
    found += "." if gap is None else f", while the gap to training text {became} {nats(gap)} nats."
    advice = [
        "Use the best checkpoint, which is what every command takes unless told otherwise; "
        "train.early_stop saves the time after it.",
        f"Try dropout.rate {rate:g}." if rate else "Raise the dropout rates.",
        f"{more_decay} It is dropout's rival, so compare both (gptlite study).",
        "More text helps more than either.",
    ]
    return Verdict(f"Overfitting since step {best['step']}", found, advice)


def underfitting(fall: float, gap: float | None, drops: bool, epochs: float) -> Verdict:
    found = (
        f"The validation loss was still falling, by {fall:.2f} nats in the last quarter of the run"
    )
    found += "." if gap is None else f", and the gap to training text is {nats(gap)} nats."
    advice = ["Train longer, or with a higher learning rate or a larger model."]
    if drops:
        advice.append(
            "Nothing is being overfitted yet, so dropout costs and buys nothing: try rate 0."
        )
    elif not pick_rate(epochs)[0]:
        advice.append(f"It needs no dropout: {pick_rate(epochs)[1]}.")
    return Verdict("Underfitting", found, advice)


def plateau(gap: float | None, drops: bool, epochs: float) -> Verdict:
    if gap is not None and gap >= WIDE_GAP:
        found = f"The validation loss has levelled off, {gap:.2f} nats above that of training text."
        rate = pick_rate(epochs)[0]
        dropout = "more dropout, " if drops else f"dropout (rate {rate:g}), "
        instead = f"try {dropout if rate else ''}more weight decay, or more text"
        return Verdict(
            "A wide gap, not yet overfitting", found, [f"Training longer would overfit: {instead}."]
        )
    found = "The validation loss has levelled off"
    found += "." if gap is None else f", {compare_with_training(gap)}."
    advice = ["A larger model, or a longer schedule, would learn more from this text."]
    if drops and not pick_rate(epochs)[0]:
        advice.append(f"Try it without dropout: {pick_rate(epochs)[1]}.")
    return Verdict("Levelled off", found, advice)


def nats(value: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def compare_with_training(gap: float) -> str:
    """Where the validation loss is, as seen from that of training text."""
    if nats(gap) == "0.00":
        return "level with that of training text"
    return f"{nats(abs(gap))} nats {'above' if gap > 0 else 'below'} that of training text"


def recent_fall(evaluated: Sequence[Row]) -> float:
    """By how much the validation loss fell in the last quarter of the updates."""
    last = evaluated[-1]
    before = [row for row in evaluated if row["step"] <= 0.75 * last["step"]]
    return float(before[-1]["val/loss"] - last["val/loss"]) if before else 0.0


def largest_rate(row: Row) -> float:
    rates = (number(value) for name, value in row.items() if name.startswith("dropout/"))
    return max((rate for rate in rates if rate is not None), default=0.0)
