"""What a study has found, in a sentence: which point is best, by how much, or that nobody can tell.

Decisions are those of study.json (studies/comparison.py): a difference counts where it is above the
noise of seeds. How many more seeds would tell is a normal approximation, for four cases in five.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist, stdev
from typing import Any, NamedTuple

from gptlite.runs.results import number
from gptlite.words import count

LOWER = ("loss", "gap", "perplexity", "bits", "ece", "brier", "penalty", "entropy", "deterministic")
HIGHER = ("accuracy", "area", "effective_share")
"""Parts of the names of metrics that are better when lower, or higher."""
NATS = ("loss", "gap", "penalty", "deterministic")
NOISE, POWER = 0.02, 0.8
"""The level of a study's decisions, and how often a difference is to be found."""
MOST_SEEDS = 100
"""More is no advice."""
Comparison = dict[str, Any]


class Answer(NamedTuple):
    title: str
    lines: list[str]


class Finding(NamedTuple):
    """What is said of the points that share a baseline."""

    setting: str
    """What they have in common; empty where that is all there is."""
    winner: str
    """Empty where nobody can tell."""
    words: str


def answer_of(study: dict[str, Any], metric: str) -> Answer:
    """Of the points against their baselines, in one metric."""
    runs = study.get("runs", [])
    done = sum(run.get("state") == "done" for run in runs)
    unfinished = [f"{done} of {len(runs)} runs are done, so this may change."] * (done < len(runs))
    groups: dict[str, list[Comparison]] = {}
    for comparison in study.get("comparisons", []):
        if comparison["metric"] == metric:
            groups.setdefault(comparison["against"], []).append(comparison)
    if not groups:
        return Answer("Nothing to compare yet", unfinished or ["The study has a single point."])
    n_compared = sum(map(len, groups.values()))
    found = [find_best(study, metric, base, of, n_compared) for base, of in groups.items()]
    if len(found) == 1:
        return Answer(found[0].words, [*said_of(metric), *unfinished])
    winners = {finding.winner for finding in found}
    if winners == {""}:
        title = f"Cannot tell in any of the {len(found)} settings"
    elif len(winners) == 1:
        title = f"{capital(winners.pop())} is best in all {len(found)} settings"
    else:
        title = f"It depends: {len(found)} settings, and not one answer"
    lines = [f"{finding.setting or 'All'}: {finding.words}" for finding in found]
    return Answer(title, [*lines, *said_of(metric), *unfinished])


def said_of(metric: str) -> Iterator[str]:
    direction = {-1: "; lower is better", 1: "; higher is better"}.get(direction_of(metric), "")
    yield (
        f"Measured: {metric}{direction}. ± is half of a 95 % interval over seeds; a difference is "
        "above noise where one as large would come by chance in less than 2 of 100 such studies."
    )


def direction_of(metric: str) -> int:
    """-1: lower is better; 1: higher is; 0: not known."""
    name = metric.rpartition(".")[2]
    if any(part in name for part in HIGHER):
        return 1
    return -1 if any(part in name for part in LOWER) else 0


def find_best(
    study: dict[str, Any], metric: str, base: str, against: list[Comparison], n_compared: int
) -> Finding:
    """The points that share a baseline, in a sentence."""
    direction = direction_of(metric) or -1
    gains = {id(c): direction * c["difference"] for c in against}
    ranked = sorted(against, key=lambda c: -gains[id(c)])
    certain = [c for c in ranked if c["above_seed_noise"]]
    better = [c for c in certain if gains[id(c)] > 0]
    worse = [c for c in reversed(certain) if gains[id(c)] < 0]
    open_ = [c for c in ranked if not c["above_seed_noise"]]
    setting, base_name, names = name_points(base, [c["label"] for c in against])
    name = dict(zip((c["label"] for c in against), names, strict=True))

    def amount(comparison: Comparison, verb: str) -> str:
        return f"{name[comparison['label']]} {verb} {size_words(comparison, metric)}"

    if better:
        best = better[0]
        words = f"{capital(name[best['label']])} is best: it gains {size_words(best, metric)} on "
        return Finding(setting, name[best["label"]], f"{words}{base_name} ({seeds_words(best)})")
    costs = "; ".join(amount(c, "costs") for c in worse[:3])
    if not open_:
        more = f" and {len(worse) - 3} more cost something" if len(worse) > 3 else ""
        words = f"{capital(base_name)} is best; {costs}{more} ({seeds_words(worse[0])})"
        return Finding(setting, base_name, words)
    closest = open_[0]
    words = f"Cannot tell {name[closest['label']]} from {base_name}: "
    words += doubt_words(study, metric, closest, n_compared)
    return Finding(setting, "", words + (f". But {costs}, above noise" if costs else ""))


def name_points(base: str, labels: Sequence[str]) -> tuple[str, str, list[str]]:
    """What all labels have in common, and what is left of the baseline's and of each."""
    parts = [label.split(", ") for label in (base, *labels)]
    if len(set(map(len, parts))) > 1:
        return "", plain(base), [plain(label) for label in labels]
    common = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    shared = ", ".join(part for part, same in zip(parts[0], common, strict=True) if same)
    own = [
        ", ".join(part for part, same in zip(each, common, strict=True) if not same)
        for each in parts
    ]
    return plain(shared), plain(own[0]), [plain(name) for name in own[1:]]


def plain(label: str) -> str:
    """As it is said: rate=0.1 is rate 0.1."""
    return label.replace("=", " ")


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def size_words(comparison: Comparison, metric: str) -> str:
    """How large a difference is, without its sign."""
    half = half_width(comparison)
    around = "" if half is None else f" ± {half:.2g}"
    return f"{abs(comparison['difference']):.2g}{around}{unit_of(metric)}"


def unit_of(metric: str) -> str:
    return " nats" if any(part in metric.rpartition(".")[2] for part in NATS) else ""


def half_width(comparison: Comparison) -> float | None:
    low, high = number(comparison["low"]), number(comparison["high"])
    return None if low is None or high is None else (high - low) / 2


def seeds_words(comparison: Comparison) -> str:
    return f"{count(comparison['n'], 'seed')}, above noise"


def doubt_words(study: dict[str, Any], metric: str, comparison: Comparison, n_compared: int) -> str:
    n = comparison["n"]
    if n < 2:
        words = f"the difference is {comparison['difference']:+.2g}{unit_of(metric)}, of one seed, "
        return words + "which has no noise to compare it with; run at least two more"
    half = half_width(comparison) or 0.0
    words = f"the difference is {comparison['difference']:+.2g} ± {half:.2g}{unit_of(metric)} "
    words += f"({count(n, 'seed')}, within noise); "
    more = seeds_needed(differences(study, metric, comparison), n_compared)
    if more is None or more > MOST_SEEDS:
        return words + f"more than {MOST_SEEDS} more seeds would be needed, if it stays so small"
    seeds = "seed" if more == 1 else "seeds"
    return words + f"about {more} more {seeds} would tell, if it stays as large"


def differences(study: dict[str, Any], metric: str, comparison: Comparison) -> list[float]:
    """To the baseline, seed by seed."""
    by_label: dict[str, dict[Any, float]] = {}
    for run in study.get("runs", []):
        value = number(run.get("metrics", {}).get(metric))
        if run.get("state") == "done" and value is not None:
            by_label.setdefault(run["label"], {})[run["seed"]] = value
    mine, base = (by_label.get(comparison[key], {}) for key in ("label", "against"))
    return [mine[seed] - base[seed] for seed in mine if seed in base]


def seeds_needed(found: Sequence[float], n_compared: int) -> int | None:
    """How many seeds more would show a difference of this size and noise; None: no number would."""
    if len(found) < 2 or not (mean := sum(found) / len(found)):
        return None
    normal = NormalDist()
    sure = normal.inv_cdf(1 - NOISE / (2 * max(1, n_compared))) + normal.inv_cdf(POWER)
    total = math.ceil((sure * stdev(found) / mean) ** 2) + 2  # of few seeds the spread is not known
    return max(1, total - len(found))
