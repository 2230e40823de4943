"""What `gptlite eval` says: the results of its suites as sentences, a few for each.

A difference that may be noise is called that. What is withheld is named, with the reason.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Found = dict[str, Any]
SHARES = {
    "Hardly any": 0.0,
    "A twentieth": 0.05,
    "A tenth": 0.1,
    "A fifth": 0.2,
    "A quarter": 0.25,
    "A third": 1 / 3,
    "Two fifths": 0.4,
    "Half": 0.5,
    "Three fifths": 0.6,
    "Two thirds": 2 / 3,
    "Three quarters": 0.75,
    "Four fifths": 0.8,
    "Nine tenths": 0.9,
    "Nearly all": 1.0,
}
FEW = 10
"""Units: fewer are counted, of more the share is told."""
AT_ONCE = 4
"""Units of the set whose cost is told, or of the next smaller one."""


class Number(NamedTuple):
    """A number with the ends of its 95 % interval; None: there is none, or it is open."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether other text may as well give 0, or the other sign."""
        return self.low is not None and self.low <= 0 <= self.top

    @property
    def top(self) -> float:
        return math.inf if self.high is None else self.high

    @property
    def opposite(self) -> "Number":
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Number(-self.value, low, high)

    @property
    def percent(self) -> "Number":
        return Number(*(None if part is None else 100 * part for part in self))  # type: ignore[arg-type]

    @property
    def digits(self) -> int:
        """Decimals that the interval leaves a meaning to: two digits of its width."""
        known = self.low is not None and self.high is not None
        width = self.high - self.low if known else abs(self.value) / 10  # type: ignore[operator]
        return min(6, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3

    def write(self, words: str = "", digits: int | None = None) -> str:
        """As in `0.121 nats (0.094 to 0.148)`, with ` nats` for the words."""
        n = self.digits if digits is None else digits
        bounds = self.bounds(n)
        return f"{self.value:.{n}f}{words}" + (f" ({bounds})" if bounds else "")

    def bounds(self, digits: int) -> str:
        if self.low is None:
            return ""
        above = "or more" if self.high is None else f"to {self.high:.{digits}f}"
        return f"{self.low:.{digits}f} {above}"


def read(found: Found) -> Number:
    return Number(found["value"], found["low"], found["high"])


def compare(difference: Number) -> str:
    """Of two losses, as in `0.648 nats lower (0.612 to 0.684)`."""
    if difference.is_noise:
        return f"the same but for noise ({difference.bounds(difference.digits)} nats)"
    if difference.value < 0:
        return difference.opposite.write(" nats lower")
    return difference.write(" nats higher")


def describe(suite: str, result: Found) -> list[str]:
    """Sentences about the result of a suite; none of a suite that has none."""
    return list(SENTENCES[suite](result)) if suite in SENTENCES else []


def describe_loss(result: Found) -> Iterator[str]:
    def known(name: str) -> Number:
        return Number(result[name], *result["intervals"].get(name, ()))

    if result["dropout_active"]:
        yield describe_dropout(known("dropout_cost"), "the loss")
        off = result["loss_dropout_off"]
        yield f"With dropout off it is {off:.4f} nats per token."
        return
    rows = f" in {result['rows']:,} of {result['rows_of_split']:,} rows" if "rows" in result else ""
    loss = known("loss").write(" nats per token", 4)
    yield f"The loss is {loss}: perplexity {result['perplexity']:.1f}{in_bits(result)}."
    right, targets = 100 * result["accuracy"], result["targets"]
    yield f"Its likeliest token is the right one in {right:.1f} % of {targets:,} places{rows}."
    if "generalisation_gap" in result:
        gap = compare(known("generalisation_gap").opposite)
        yield f"On training text ({result['train_rows']:,} rows) the loss is {gap}."
        yield describe_dropout(known("dropout_penalty"), "the loss on that text")


def in_bits(result: Found) -> str:
    bits = result["bits_per_byte"]
    return "" if bits is None else f", {bits:.3f} bits per byte"


def describe_dropout(cost: Number, loss: str) -> str:
    """What leaving dropout on does; a model without any gives two losses that are equal."""
    if cost.value == 0:
        return "The model has no dropout that could be left on."
    return f"With dropout left on, {loss} is {compare(cost)}."


def describe_calibration(result: Found) -> Iterator[str]:
    found = result["ece"]
    if found["value"] is None:
        yield f"Whether its probabilities are right cannot be said: {found['reason']}."
        return
    error = read(found)
    noise = ", which may be noise" if error.is_noise else ""
    sure, right = 100 * result["confidence"], 100 * result["accuracy"]
    yield (
        f"It is {sure:.1f} % sure of its likeliest token, {right:.1f} % are right: calibration "
        f"error {error.percent.write(' points')}{noise}."
    )


def describe_knockout(result: Found) -> Iterator[str]:
    """What is left with units of a kind removed to their mean, at random."""
    kinds = {kind: found["mean"]["random"] for kind, found in result["kinds"].items()}
    if reason := kinds["head"]["retained_area"].get("reason"):
        yield f"What is left without some units cannot be said: {reason}."
        return
    skill = read(result["skill"]).write(" nats")
    yield f"It beats guessing by token frequency by {skill}; that is its skill."
    for kind, found in kinds.items():
        n, half = result["kinds"][kind]["n_units"], found["half_at"]
        if half["value"] is None:
            yield f"All {n:,} {kind}s can go: {half['reason']}."
        else:
            which = count_units if n < FEW else share_of_units
            gone = "can go before half of its skill is gone"
            who, how_sure = which(read(half), n)
            yield f"{who} {kind}s {gone}{how_sure}."


def count_units(half: Number, n: int) -> tuple[str, str]:
    """As in `2 of its 4`, and between which numbers. Rounded down: a part of a unit cannot go."""
    value, low, high = (int(n * min(1.0, x) + 1e-9) for x in (half.value, half.low or 0, half.top))
    known = half.low is not None and low != high
    return f"{value or 'None'} of its {n}", f" ({low} to {high})" if known else ""


def share_of_units(half: Number, n: int) -> tuple[str, str]:
    """As in `Half of the`, and the same in numbers."""
    words = min(SHARES, key=lambda each: abs(SHARES[each] - half.value))
    bounds = half._replace(high=half.high and min(1.0, half.high)).bounds(2)
    return f"{words} of the", f" ({half.value:.2f} of them{', ' + bounds if bounds else ''})"


def describe_importance(result: Found) -> Iterator[str]:
    kinds = {kind: found["mean"] for kind, found in result["kinds"].items()}
    for kind, found in kinds.items():
        yield describe_units(kind, found)
    told, untold = list[str](), dict[str, list[str]]()
    for kind, found in kinds.items():
        sizes = [size for size in found["backup"] if int(size) <= AT_ONCE]
        for size in sizes[-1:]:
            ratio = found["backup"][size]
            if ratio["value"] is None:
                untold.setdefault(ratio["reason"], []).append(f"{kind}s")
            else:
                times, words = read(ratio), "" if told else " times as much"
                told.append(f"{size} {kind}s {times.write(words, min(2, times.digits))}")
    if told:
        yield f"Removed together instead of one by one, units cost: {', '.join(told)}."
    for reason, units in untold.items():
        who = "any unit" if not told and len(untold) == 1 else " and ".join(units)
        yield f"Whether others cover for {who} cannot be said: {reason}."


def describe_units(kind: str, found: Found) -> str:
    """What the unit is worth that matters most, unless noise tells which one that is."""
    n, largest = sum(map(len, found["loss_increase"])), found["largest"]
    if n > 1 and (reason := found["gini"].get("reason")):
        return f"Which of {n:,} {kind}s matters most cannot be said: {reason}."
    worth = read(largest)
    if worth.is_noise:
        return f"What the {kind} is worth that matters most may be noise: {worth.write(' nats')}."
    many = f"{found['critical_units']:,} of {n:,} certainly more than 0.01"
    return f"The {kind} that matters most is worth {worth.write(' nats')}, {many}."


def describe_memorisation(result: Found) -> Iterator[str]:
    if "note" in result:
        yield f"What it knows by heart cannot be said: the suite {result['note']}."
        return
    told = []
    for split, text in (("train", "training"), ("val", "held-out")):
        of = result[split]
        if "note" in of:
            told.append(f"{text} text has {of['note']}")
        else:
            share = read(of["verbatim"]).percent
            told.append(share.write(f" % of {of['windows']:,} {text} windows", 1))
    yield f"Known by heart: {', '.join(told)}."
    spans = result["spans"]
    yield (
        f"Its samples have up to {spans['longest_span']} tokens in a row from training text; "
        f"held-out text has {spans['held_out_longest_span']}."
    )


def describe_passes(result: Found) -> Iterator[str]:
    if "note" in result:
        yield f"Passes with dropout on are not averaged: {result['note']}."
        return
    difference = compare(read(result["averaged_minus_deterministic"]))
    yield f"Averaged over {max(result['passes'])} passes with dropout on, the loss is {difference}."


def describe_ensemble(result: Found) -> Iterator[str]:
    n, mean, passes = result["models"], result["mean_of_logits"], result["mc_dropout"]
    loss = read(mean["loss"]).write(" nats per token", 4)
    yield f"The loss of the mean of {n} models' logits is {loss}{in_bits(mean)}."
    if n > 1:
        gain = compare(read(mean["minus_mean_member"]))
        yield f"Against the loss of one of them, on average, it is {gain}."
    if "note" in passes:
        yield f"Passes with dropout on are not compared with that: {passes['note']}."
        return
    part = passes["share_of_ensemble"]
    if part["value"] is None:
        yield f"What passes with dropout on give of that cannot be said: {part['reason']}."
    else:
        gives = read(part).write(" of that")
        yield f"{n} passes of one model with dropout on, averaged, give {gives}."


SENTENCES: dict[str, Callable[[Found], Iterator[str]]] = {
    "loss": describe_loss,
    "calibration": describe_calibration,
    "knockout": describe_knockout,
    "importance": describe_importance,
    "memorisation": describe_memorisation,
    "mc-dropout": describe_passes,
    "ensemble": describe_ensemble,
}
